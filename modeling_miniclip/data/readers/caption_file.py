"""Caption files: CSV, TSV, JSON and Flickr8k's tokens, read line by line, with the images that they name."""

import csv
import json
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import DataError, Problem, one_line
from ...utils.names import is_utf8, name_of
from ..columns import NEGATIVES, ResolvedColumns, captions_of_row, find_columns, image_name
from ..problems import OnProblem
from ..rows import ReadOptions, Row, SplitName
from ..splits import find_split_files, read_split_files, split_of_value
from ..tables.table_cache import content_of
from .image_files import SAMPLE, rows_with_images
from .layouts import find_caption_files, find_images
from .record_captions import negatives_at
from .text_files import LONGEST, Lines, check_surrogates, is_json_list, json_list

# Five rows of the original Flickr8k.token.txt name an image with a second suffix that was never published.
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"

TOKENS = re.compile(r"[^\t,]+#\d+\t")
EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
KINDS_OF_OBJECTS = 1000  # sets of keys whose columns are kept


def read_caption_file(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """Read a caption file, or the caption files of a folder: one row per caption, or per line of JSON.

    Args:
        source: one of
            - a CSV (also `.txt`), TSV or JSON Lines file with named columns, a JSON list of objects, or Flickr8k's
              `name#0<tab>caption`, next to its images or in the folder above them;
            - a folder with such a file under one of its usual names, or with one for each split, such as `train.csv`
              and `val.csv`.
        options: columns, and the folder of the images. With `all_images`, captions are optional.
        on_problem: function called with each bad row (not UTF-8, wrong quotation marks, too few fields, no caption, no
            image name) and each image that is missing, empty or outside the folder of images.

    Raises:
        DataError: a column is missing, there are no captions or there is no folder of images.
    """
    path = Path(source)
    check_path(path, options)
    for split, file in find_caption_files(path):
        rows = read_table(file, options, on_problem)
        head = list(islice(rows, SAMPLE))
        folder, bounds = find_images(file.parent, split, (row.name for row in head), options.image_dir)
        check_path(folder, options)
        for row in rows_with_images(
            chain(head, rows), folder, options.columns.allow_outside_images, on_problem, bounds, options.bad_images
        ):
            row.split = row.split or split
            yield row


def check_path(path: Path, options: ReadOptions) -> None:
    """Check that the rows of a path can be stored; an index escapes it instead.

    Raises:
        DataError: it is not UTF-8.
    """
    if not options.all_images and not is_utf8(path.absolute()):
        raise DataError(Problem("unusable", "its path is not UTF-8; rename the file or folder", name_of(path)))


def inputs_caption_file(source: str, options: ReadOptions) -> Iterator[Any]:
    """What the rows depend on, for the key of their table; arguments as in [`read_caption_file`]."""
    for _, file in find_caption_files(Path(source)):
        yield content_of(file)
    yield from map(content_of, _split_files(source).values())


def split_lines(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[SplitName] | None:
    """The lines of the split files next to a caption file, None without any; arguments as in [`read_caption_file`]."""
    files = _split_files(source)
    return read_split_files(files, on_problem, options.image_dir) if files else None


def _split_files(source: str) -> dict[str, Path]:
    path = Path(source)
    files = find_caption_files(path)
    if len(files) != 1 or files[0][0] is not None:
        return {}
    return find_split_files(path if path.is_dir() else path.parent, files[0][1])


def read_table(file: Path, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """Rows of a caption file without looking for the images: `image` is empty, `name` relative to their folder.

    Arguments and errors as in [`read_caption_file`].
    """
    table = _Table(file, options, on_problem)
    count = 0
    for row in table.rows():
        count += 1
        yield row
    if table.stray:
        message = f"{file}: dropped {table.stray} rows of {FLICKR8K_STRAY}, an image that was never published"
        warnings.warn(message, stacklevel=2)
    if not count:
        text = "no captions; expected a header and one row per caption"
        raise DataError(Problem("unusable", text, str(file)))


class _Table:
    """A caption file as rows; its suffix and first line show its format."""

    def __init__(self, path: Path, options: ReadOptions, on_problem: OnProblem):
        self.path, self.file, self.options, self.on_problem = path, str(path), options, on_problem
        self.lines = Lines(path, on_problem)
        self.stray = 0
        self.splits: dict[Any, str | None] = {}

    def rows(self) -> Iterator[Row]:
        """All rows that can be used."""
        if self.path.suffix.lower() != ".jsonl" and is_json_list(self.path):
            return self._object_rows(json_list(self.path))
        lines = iter(self.lines)
        first = next(lines, "")
        text = first.rstrip("\r\n")
        suffix = self.path.suffix.lower()
        if suffix == ".jsonl":
            return self._object_rows(self._json_lines(chain([first], lines)))
        if TOKENS.match(first):
            return self._token_rows(chain([first], lines))
        if declared := EXCEL_SEPARATOR.fullmatch(text.strip(" ")):
            return self._csv_rows(lines, declared[1], 1)
        tabs = suffix == ".tsv" or ("\t" in first and "," not in first)
        other = next((sign for sign in ";|" if sign in first and not tabs and "," not in first), None)
        if other is not None:
            problem = f"fields are separated by {other!r}; save the file with commas"
            self.on_problem(Problem("separator", problem, self.file, 1))
        return self._csv_rows(chain([first] if first else [], lines), "\t" if tabs else other or ",", 0)

    # --- formats ----------------------------------------------------------------------------------------------------

    def _csv_rows(self, lines: Iterator[str], delimiter: str, before: int) -> Iterator[Row]:
        """Rows of a CSV file, of which `before` lines were read."""
        found = self._cells(lines, delimiter, before)
        number, end, first = next(found, (0, 0, None))
        if first is None:
            return
        header = [cell.strip() for cell in first]
        columns = self._columns(header, number)
        place = {name: i for i, name in enumerate(header)}
        image = place[columns.image]
        caption = place[columns.captions[0]] if len(columns.captions) == 1 else None
        split, group, ids, negatives = (
            None if column is None else place[column]
            for column in (columns.split, columns.group, columns.id, columns.negatives)
        )
        cell, name = "", None
        for number, end, cells in found:
            if len(cells) != len(header):
                if len(cells) > 1 or "".join(cells).strip():
                    self._wrong_fields(cells, header, number)
                continue
            if self.lines.undecoded and self.lines.are_undecoded(number, end):
                continue
            if cell != cells[image] or name is None:
                cell = cells[image]
                name = image_name(cell, self.file, number, columns.image, self.on_problem)
            text = "" if caption is None else cells[caption].strip()
            captions = [text] if text else self._captions(dict(zip(header, cells, strict=True)), columns, number)
            if self._is_used(name, captions, columns):
                yield Row(
                    name,
                    "",
                    captions,
                    name,
                    None if split is None else self._split(cells[split]),
                    None if group is None else cells[group].strip() or None,
                    [] if ids is None else [cells[ids].strip()] * len(captions),
                    self.file,
                    number,
                    columns.image,
                    [] if negatives is None else self._negatives(cells[negatives], columns, number),
                )

    def _columns(self, header: list[str], number: int) -> ResolvedColumns:
        if twice := next((name for name in header if name and header.count(name) > 1), None):
            problem = f"two columns are named {twice!r}; rename or delete one"
            raise DataError(Problem("unusable", problem, self.file, number))
        return find_columns(header, self.file, number, self.options.columns, not self.options.all_images)

    def _cells(self, lines: Iterator[str], delimiter: str, before: int) -> Iterator[tuple[int, int, list[str]]]:
        """The cells of each row, with the numbers of its first and its last line."""
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST))  # a longer field is an open quotation mark
        kept: list[str] = []  # lines of the current row
        again: deque[str] = deque()  # lines to read again, after a row with wrong quotation marks

        def read() -> Iterator[str]:
            while again:
                kept.append(again.popleft())
                yield kept[-1]
            for line in lines:
                kept.append(line)
                yield line

        end = before
        while True:
            # strict: without it, an open quotation mark would silently swallow all rows that follow.
            reader = csv.reader(read(), delimiter=delimiter, skipinitialspace=True, strict=True)
            try:
                for cells in reader:
                    number, end = end + 1, before + reader.line_num
                    kept.clear()
                    yield number, end, cells
                return
            except csv.Error as error:
                problem = (
                    f"{error}; put a field that contains a comma or a quotation mark in quotation "
                    'marks ("...") and double those within it ("")'
                )
                end = before = end + 1
                self.on_problem(Problem("quotes", problem, self.file, end))
                again.extendleft(reversed(kept[1:]))
                kept.clear()

    def _wrong_fields(self, cells: list[str], header: list[str], number: int) -> None:
        problem = (
            f"{len(cells)} fields, but the header has {len(header)} ({', '.join(header)}); put a caption that "
            'contains a comma in quotation marks ("...")'
        )
        self.on_problem(Problem("fields", problem, self.file, number))

    def _object_rows(self, objects: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Rows of JSON objects, each with its row number."""
        known: dict[tuple[str, ...], ResolvedColumns] = {}  # the columns of objects by their keys
        for number, cells in objects:
            if not isinstance(cells, dict):
                text = f"expected an object {{...}}, got {json.dumps(cells)[:80]}"
                self.on_problem(Problem("json", text, self.file, number))
                continue
            columns = known.get(keys := tuple(cells))
            if columns is None:
                columns = find_columns(cells, self.file, number, self.options.columns, not self.options.all_images)
                if len(known) < KINDS_OF_OBJECTS:
                    known[keys] = columns
            name = image_name(cells[columns.image], self.file, number, columns.image, self.on_problem)
            captions = self._captions(cells, columns, number)
            if self._is_used(name, captions, columns):
                group = None if columns.group is None else cells[columns.group]
                yield Row(
                    name,
                    "",
                    captions,
                    name,
                    None if columns.split is None else self._split(cells[columns.split]),
                    None if group is None else str(group).strip() or None,
                    [] if columns.id is None else [str(cells[columns.id]).strip()] * len(captions),
                    self.file,
                    number,
                    columns.image,
                    self._negatives(cells.get(columns.negatives), columns, number),
                )

    def _json_lines(self, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            if not line.strip() or self.lines.are_undecoded(number, number):
                continue
            try:
                value = json.loads(line)
                if "\\u" in line:
                    check_surrogates(value)
            except (ValueError, RecursionError) as error:
                self.on_problem(Problem("json", f"not valid JSON: {one_line(error)}", self.file, number))
                continue
            yield number, value

    def _token_rows(self, lines: Iterable[str]) -> Iterator[Row]:
        """Rows of the original `Flickr8k.token.txt`, which has no header."""
        columns = ResolvedColumns("image", ["caption"])
        for number, line in enumerate(lines, 1):
            if not line.strip() or self.lines.are_undecoded(number, number):
                continue
            place, tab, caption = line.partition("\t")
            if not tab or "#" not in place:
                text = f"expected name#number, a tab and a caption, got {line.strip()[:80]!r}"
                self.on_problem(Problem("fields", text, self.file, number))
                continue
            name = image_name(place.rpartition("#")[0], self.file, number, "image", self.on_problem)
            captions = self._captions({"caption": caption}, columns, number)
            if self._is_used(name, captions, columns):
                yield Row(name, "", captions, name, file=self.file, number=number, column="image")

    # --- cells ------------------------------------------------------------------------------------------------------

    def _captions(self, cells: Mapping[str, Any], columns: ResolvedColumns, number: int) -> list[str]:
        return captions_of_row(cells, columns, self.file, number, self.on_problem)

    def _negatives(self, cell: Any, columns: ResolvedColumns, number: int) -> list[str]:
        return negatives_at(cell, self.file, number, self.on_problem, columns.negatives or NEGATIVES)

    def _is_used(self, name: str | None, captions: list[str], columns: ResolvedColumns) -> TypeGuard[str]:
        if name == FLICKR8K_STRAY:
            self.stray += 1
            return False
        return name is not None and bool(captions or self.options.all_images)

    def _split(self, cell: Any) -> str | None:
        text = str(cell)
        if text not in self.splits:
            if len(self.splits) >= KINDS_OF_OBJECTS:
                self.splits.clear()
            self.splits[text] = split_of_value(cell)
        return self.splits[text]
