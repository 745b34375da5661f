"""Read a caption file (CSV, TSV, JSON, JSON Lines, Flickr8k tokens) into one row per image."""

import csv
import difflib
import io
import json
import posixpath
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, Problem, one_line
from .problems import raise_problem

CAPTION_FILES = ("captions.csv", "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")


METADATA_FILES = ("metadata.csv", "metadata.jsonl")


# Five rows of the original Flickr8k.token.txt name an image with a second suffix that was never published.
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"


@dataclass
class CaptionedImage:
    """One image of a caption file with everything that is said of it."""

    captions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each caption
    file: str = ""
    column: str = ""  # that names the image

    @property
    def where(self) -> str:
        """File, row and column that name it first."""
        return f"{self.file}, row {self.rows[0]}, column {self.column!r}"


@dataclass(frozen=True)
class ResolvedColumns:
    """Names of the columns of a source; `captions` are several where each caption has a column of its own."""

    image: str
    captions: list[str]
    id: str | None = None


# Number of a row as an editor shows it (that of its first line), its cells by column, and what is where.
Row = tuple[int, Mapping[str, Any], ResolvedColumns]


# Tells from the names of the columns what is where; file and row are for its errors.
FindColumns = Callable[[Collection[str], str], ResolvedColumns]


# Told of what is wrong; if it returns, the reader goes on without the row.
OnProblem = Callable[[Problem], Any]


def read_caption_file(
    path: Path, find_columns: FindColumns, found: OnProblem = raise_problem
) -> dict[str, CaptionedImage]:
    """Captions by image name, in the order of the file.

    Args:
        path: CSV (also `.txt`), TSV or JSON lines with named columns, or Flickr8k's own `name#0<tab>caption`.
        find_columns: which columns to take.
        found: told of each problem: not UTF-8, a row that has too few fields, an empty caption or image name.

    Raises:
        DataError: a column is missing, there are no captions, or by `found`.
    """
    images: dict[str, CaptionedImage] = {}
    stray = 0
    for number, cells, columns in _read_rows(path, find_columns, found):
        name = _image_name(cells[columns.image], str(path), number, columns.image, found)
        if name == FLICKR8K_STRAY:
            stray += 1
        captions = _captions_of(cells, columns, str(path), number, found)
        if name in (None, FLICKR8K_STRAY) or (columns.captions and not captions):
            continue
        entry = images.setdefault(str(name), CaptionedImage(file=str(path), column=columns.image))
        entry.captions += captions
        entry.rows += [number] * (len(captions) or 1)
        if columns.id is not None:
            entry.ids.append(str(cells[columns.id]).strip())
    if stray:
        warnings.warn(
            f"{path}: dropped {stray} rows of {FLICKR8K_STRAY}, an image that was never published", stacklevel=2
        )
    if not images:
        raise DataError(f"{path}: no captions; expected a header and one row per caption")
    return images


def _read_rows(path: Path, find_columns: FindColumns, found: OnProblem) -> Iterator[Row]:
    text = _read_utf8(path, found)
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text, find_columns, found)
    first_line = _lines(text, 1)[0]
    if re.match(r"[^\t,]+#\d+\t", first_line):
        return _token_rows(path, text, found)
    tabs = path.suffix.lower() == ".tsv" or ("\t" in first_line and "," not in first_line)
    other = next((sign for sign in ";|" if sign in first_line and not tabs and "," not in first_line), None)
    if other is not None:
        found(Problem("separator", f"fields are separated by {other!r}; save the file with commas", str(path), 1))
    return _csv_rows(path, text, "\t" if tabs else other or ",", find_columns, found)


def _csv_rows(path: Path, text: str, delimiter: str, find_columns: FindColumns, found: OnProblem) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    start = 0  # line behind which the reader began

    def reader_behind(line: int) -> Any:
        # strict: a quotation mark that is never closed would silently swallow the rows behind it
        return csv.reader(islice(lines, line, None), delimiter=delimiter, skipinitialspace=True, strict=True)

    reader = reader_behind(0)
    header: list[str] = []
    while True:
        number = start + reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            told = (
                f"{error}; put a field that holds a comma or a quotation mark between quotation "
                'marks ("...") and write those within it twice ("")'
            )
            found(Problem("quotes", told, str(path), number))
            start, reader = number, reader_behind(number)
            continue
        if row is None:
            return
        if not header:
            header = [cell.strip() for cell in row]
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise DataError(f"{path}, row {number}: two columns are named {twice!r}; rename or delete one")
            columns = find_columns(header, f"{path}, row {number}")
        elif len(row) > 1 or "".join(row).strip():
            if len(row) != len(header):
                told = (
                    f"{len(row)} fields where the header has {len(header)} ({', '.join(header)}); put a caption that "
                    'holds a comma between quotation marks ("...")'
                )
                found(Problem("fields", told, str(path), number))
                continue
            yield number, dict(zip(header, row, strict=True)), columns


def _json_rows(path: Path, text: str, find_columns: FindColumns, found: OnProblem) -> Iterator[Row]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
            json.dumps(cells, ensure_ascii=False).encode()  # fails at half a character, such as "\\ud800"
        except (ValueError, RecursionError) as error:
            found(Problem("json", f"not JSON that can be read: {one_line(error)}", str(path), number))
            continue
        if not isinstance(cells, dict):
            found(Problem("json", f"expected an object {{...}}, got {line[:80]!r}", str(path), number))
            continue
        yield number, cells, find_columns(cells, f"{path}, row {number}")


def _token_rows(path: Path, text: str, found: OnProblem) -> Iterator[Row]:
    """Rows of the original `Flickr8k.token.txt`, which has no header."""
    columns = ResolvedColumns("image", ["caption"])
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            told = f"expected name#number, a tab and a caption, got {line[:80]!r}"
            found(Problem("fields", told, str(path), number))
            continue
        yield number, {"image": name.rpartition("#")[0], "caption": caption}, columns


UNDECODED = re.compile("[\udc80-\udcff]")  # what stands for a byte that is not UTF-8


def _read_utf8(path: Path, found: OnProblem) -> str:
    """The text of a file, in which a byte that is not UTF-8 is a lone surrogate; each row with one is a problem."""
    data = path.read_bytes()
    text = data.decode("utf-8-sig", "surrogateescape")
    position = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    row, done, told = 1, 0, 0
    for match in UNDECODED.finditer(text):
        before = text[done : match.start()]
        position += len(before.encode("utf-8", "surrogateescape"))
        row, done = row + len(_lines(before)) - 1, match.start()
        if row != told:
            what = f"byte {position} (0x{data[position]:02x}) is not UTF-8; save the file as UTF-8 (likely it is "
            what += "UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252: iconv -f CP1252 -t UTF-8)"
            found(Problem("encoding", what, str(path), row))
            told = row
    return text


def _lines(text: str, most: int = 0) -> list[str]:
    return re.split("\r\n|\r|\n", text, maxsplit=most)  # str.splitlines() also splits where no editor does


def _header_hint(column: str, names: Collection[str]) -> str:
    if any(re.search(r"\.(jpe?g|png|gif|bmp|webp|tiff?)(#\d+)?$", name.lower()) for name in names):
        return "; this row looks like data: write a header such as image,caption above it"
    near = difflib.get_close_matches(column, [name.lower() for name in names], n=1)
    return f"; did you mean {next(name for name in names if name.lower() == near[0])!r}?" if near else ""


def caption_columns(names: Collection[str], where: str, wanted: str) -> list[str]:
    """Where captions are in a data set of someone else's: in `wanted`, in `wanted_0`, `wanted_1`, ... or as is usual.

    Raises:
        DataError: none of them is there.
    """
    numbered = [name for name in names if re.fullmatch(re.escape(wanted) + r"_?\d+", name)]
    numbered.sort(key=lambda name: int(name.removeprefix(wanted).lstrip("_")))
    for candidates in ([wanted], numbered, ["captions"], ["text"], ["sentences"]):
        if candidates and set(candidates) <= set(names):
            return candidates
    raise DataError(
        f"{where}: no captions: expected a column {wanted!r} (text or list) or columns {wanted}_0, {wanted}_1, ... "
        f"among {', '.join(names)}; name it with caption_column"
    )


def _image_name(cell: Any, file: str, row: int, column: str | None, found: OnProblem) -> str | None:
    # One spelling for a file, that an image may not be two: "a.jpg" is also "./a.jpg", and "sub\\a.jpg" on Windows.
    name = cell.strip().replace("\\", "/") if isinstance(cell, str) else ""
    if not name:
        found(Problem("no-name", f"no image name, found {cell!r}; fill the cell or delete the row", file, row, column))
        return None
    return posixpath.normpath(name)


def _captions_of(
    cells: Mapping[str, Any], columns: ResolvedColumns, file: str, row: int, found: OnProblem = raise_problem
) -> list[str]:
    """All captions of a row: of one column with text or a list of texts, or of several columns."""
    captions = []
    for column in columns.captions:
        value = cells[column]
        for caption in value if isinstance(value, list) and value else [value]:
            if isinstance(caption, str) and caption.strip():
                captions.append(caption.strip())
            else:
                told = f"the caption is empty or no text, found {caption!r}; fill it or delete the row"
                found(Problem("empty-caption", told, file, row, column))
    return captions
