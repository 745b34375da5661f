"""Read a caption file (CSV, TSV, JSON Lines or Flickr8k tokens) into one entry per image."""

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, Problem, one_line
from .columns import ResolvedColumns, captions_of_row, image_name
from .problems import OnProblem, raise_problem

# Five rows of the original Flickr8k.token.txt name an image with a second suffix that was never published.
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"

UNDECODED = re.compile("[\udc80-\udcff]")  # characters in place of bytes that are not UTF-8


@dataclass
class CaptionedImage:
    """One image of a caption file with everything that its rows say about it.

    Args:
        captions: all captions of the image.
        ids: values of the id column, one per row.
        rows: row number of each caption.
        file: path of the caption file.
        column: name of the column that names the image.
    """

    captions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    file: str = ""
    column: str = ""

    @property
    def where(self) -> str:
        """File, row and column where the image is named first."""
        return f"{self.file}, row {self.rows[0]}, column {self.column!r}"


# Row number as an editor shows it (of the row's first line), cells by column name, and the columns to read.
Row = tuple[int, Mapping[str, Any], ResolvedColumns]

# Picks the columns to read from the names in a header; its file and row are for the DataError if one is missing.
FindColumns = Callable[[Collection[str], str, int], ResolvedColumns]


def read_caption_file(
    path: Path, find_columns: FindColumns, on_problem: OnProblem = raise_problem
) -> dict[str, CaptionedImage]:
    """Read the captions by image name, in the order of the file.

    Args:
        path: CSV (also `.txt`), TSV or JSON Lines with named columns, or Flickr8k's `name#0<tab>caption`.
        find_columns: function that picks the columns to read.
        on_problem: function called with each bad row (not UTF-8, too few fields, no caption, no image name); if it
            returns, the row is skipped.

    Raises:
        DataError: a column is missing, or there are no captions.
    """
    images: dict[str, CaptionedImage] = {}
    stray = 0
    for number, cells, columns in _read_rows(path, find_columns, on_problem):
        name = image_name(cells[columns.image], str(path), number, columns.image, on_problem)
        if name == FLICKR8K_STRAY:
            stray += 1
        captions = captions_of_row(cells, columns, str(path), number, on_problem)
        if name in (None, FLICKR8K_STRAY) or (columns.captions and not captions):
            continue
        entry = images.setdefault(str(name), CaptionedImage(file=str(path), column=columns.image))
        entry.captions += captions
        entry.rows += [number] * (len(captions) or 1)
        if columns.id is not None:
            entry.ids.append(str(cells[columns.id]).strip())
    if stray:
        message = f"{path}: dropped {stray} rows of {FLICKR8K_STRAY}, an image that was never published"
        warnings.warn(message, stacklevel=2)
    if not images:
        text = "no captions; expected a header and one row per caption"
        raise DataError(Problem("unusable", text, str(path)))
    return images


# --- file formats ---------------------------------------------------------------------------------------------------


def _read_rows(path: Path, find_columns: FindColumns, on_problem: OnProblem) -> Iterator[Row]:
    """Rows of a file; its suffix and first line show its format."""
    text = read_utf8(path, on_problem)
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text, find_columns, on_problem)
    first_line = split_lines(text, 1)[0]
    if re.match(r"[^\t,]+#\d+\t", first_line):
        return _token_rows(path, text, on_problem)
    tabs = path.suffix.lower() == ".tsv" or ("\t" in first_line and "," not in first_line)
    other = next((sign for sign in ";|" if sign in first_line and not tabs and "," not in first_line), None)
    if other is not None:
        problem = f"fields are separated by {other!r}; save the file with commas"
        on_problem(Problem("separator", problem, str(path), 1))
    return _csv_rows(path, text, "\t" if tabs else other or ",", find_columns, on_problem)


def read_utf8(path: Path, on_problem: OnProblem) -> str:
    """Read a text file; bytes that are not UTF-8 become [`UNDECODED`] characters, and their row a problem."""
    try:
        data = path.read_bytes()
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
        raise DataError(Problem("unusable", text, str(path))) from error
    text = data.decode("utf-8-sig", "surrogateescape")
    position = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    row, done, reported = 1, 0, 0
    for match in UNDECODED.finditer(text):
        before = text[done : match.start()]
        position += len(before.encode("utf-8", "surrogateescape"))
        row, done = row + len(split_lines(before)) - 1, match.start()
        if row != reported:
            problem = f"byte {position} (0x{data[position]:02x}) is not UTF-8; save the file as UTF-8 (it is probably "
            is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
            problem += "UTF-16)" if is_utf16 else "Windows-1252: iconv -f CP1252 -t UTF-8)"
            on_problem(Problem("encoding", problem, str(path), row))
            reported = row
    return text


def split_lines(text: str, most: int = 0) -> list[str]:
    """Lines as an editor counts them: `str.splitlines()` also splits at other characters.

    Args:
        text: text to split.
        most: number of splits after which the rest stays in one piece; 0 for no limit.
    """
    return re.split("\r\n|\r|\n", text, maxsplit=most)


def _csv_rows(
    path: Path, text: str, delimiter: str, find_columns: FindColumns, on_problem: OnProblem
) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    start = 0  # number of lines before the first one of the current reader

    def reader_after(line: int) -> Any:
        # strict: without it, an open quotation mark would silently swallow all rows that follow.
        return csv.reader(islice(lines, line, None), delimiter=delimiter, skipinitialspace=True, strict=True)

    reader = reader_after(0)
    header: list[str] = []
    while True:
        number = start + reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            problem = (
                f"{error}; put a field that contains a comma or a quotation mark in quotation "
                'marks ("...") and double those within it ("")'
            )
            on_problem(Problem("quotes", problem, str(path), number))
            start, reader = number, reader_after(number)
            continue
        if row is None:
            return
        if not header:
            header = [cell.strip() for cell in row]
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                problem = f"two columns are named {twice!r}; rename or delete one"
                raise DataError(Problem("unusable", problem, str(path), number))
            columns = find_columns(header, str(path), number)
        elif len(row) > 1 or "".join(row).strip():
            if len(row) != len(header):
                problem = (
                    f"{len(row)} fields, but the header has {len(header)} ({', '.join(header)}); put a caption that "
                    'contains a comma in quotation marks ("...")'
                )
                on_problem(Problem("fields", problem, str(path), number))
                continue
            yield number, dict(zip(header, row, strict=True)), columns


def _json_rows(path: Path, text: str, find_columns: FindColumns, on_problem: OnProblem) -> Iterator[Row]:
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
            json.dumps(cells, ensure_ascii=False).encode()  # fails at a lone surrogate, such as "\\ud800"
        except (ValueError, RecursionError) as error:
            on_problem(Problem("json", f"not valid JSON: {one_line(error)}", str(path), number))
            continue
        if not isinstance(cells, dict):
            on_problem(Problem("json", f"expected an object {{...}}, got {line[:80]!r}", str(path), number))
            continue
        yield number, cells, find_columns(cells, str(path), number)


def _token_rows(path: Path, text: str, on_problem: OnProblem) -> Iterator[Row]:
    """Rows of the original `Flickr8k.token.txt`, which has no header."""
    columns = ResolvedColumns("image", ["caption"])
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            problem = f"expected name#number, a tab and a caption, got {line[:80]!r}"
            on_problem(Problem("fields", problem, str(path), number))
            continue
        yield number, {"image": name.rpartition("#")[0], "caption": caption}, columns
