"""Rows of images in tables (Parquet and Arrow files), read without reading the images."""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError, Problem, one_line
from ..columns import IMAGE_COLUMNS, NEGATIVES, caption_columns, has_captions, optional_column
from ..problems import OnProblem
from ..readers.image_files import BAD_FILES, bad_files
from ..readers.record_captions import captions_of_record, join_captions, negatives_at, texts_of
from ..rows import ReadOptions, Row
from ..shards.shard_url import place_of, read_place, table_url
from ..splits import split_of_value
from .same_images import Identity, SameImages

# Columns that identify the image of a row, for tables that repeat an image once for each caption.
NAME_COLUMNS = ("filename", "file_name", "image_id", "img_id")
BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
WEBDATASET_COLUMNS = ("json", "txt")
MOST_LISTED = 20  # columns that a message names


@dataclass(frozen=True)
class TableColumns:
    """The columns to read.

    Args:
        image: column of the images.
        kind: what it holds: `struct` (`{bytes, path}`, as `datasets` writes it), `bytes` or `path`.
        captions: caption columns; empty if there are none.
        name: column that names the image of each row.
        split, group, id, negatives: columns of these values.
    """

    image: str
    kind: str
    captions: list[str]
    name: str | None = None
    split: str | None = None
    group: str | None = None
    id: str | None = None
    negatives: str | None = None

    @property
    def texts(self) -> list[str]:
        """Columns to read in any case."""
        path = self.image if self.kind == "path" else None
        others = (self.name, self.split, self.group, self.id, self.negatives, path)
        return list(dict.fromkeys(filter(None, (*self.captions, *others))))


# What rows hold: nothing, an image, or the path of one.
NONE, HELD, NAMED = 0, 1, 2

# Text columns of some rows, and which of these hold what, int8 `[rows]`. Without columns, a batch has no rows.
Block = tuple[pa.RecordBatch, np.ndarray]


@dataclass(frozen=True)
class TableFile:
    """A file of a table.

    Args:
        path: path of the file, as it is named in `row://` names.
        where: file, or dataset and split, for messages.
        prefix: start of the names of rows without a name, before their number.
        schema: its columns.
        rows: number of its rows.
        read: function that reads the rows of some text columns and, if asked to, the column of images. Where a row
            holds a path, the images are read in any case.
        split: split that its name says.
        start: number of rows in the files before it, if rows are numbered over all of them.
        bounds: folder that paths of images are relative to and may not leave; "" for any path.
        image: function that returns the image in a row and column of a table that is no file.
        version: its version, see [`version_of`][modeling_miniclip.data.shards.shard_url.version_of]; "" for any.
        group: rows and bytes of the largest column in one of its row groups, which are read at once.
    """

    path: str
    where: str
    prefix: str
    schema: pa.Schema
    rows: int
    read: Callable[[TableColumns, list[str], bool], Iterator[Block]]
    split: str | None = None
    start: int = 0
    bounds: str = ""
    image: Callable[[int, str], bytes] | None = None
    version: str = ""
    group: tuple[int, int] = (0, 0)

    def image_at(self, row: int, column: str) -> str | bytes:
        """The image in a row: its `row://` name, or its bytes."""
        return table_url(self.path, row, column, self.version) if self.image is None else self.image(row, column)


def find_columns(schema: pa.Schema, where: str, options: ReadOptions) -> TableColumns:
    """The columns of a table with images.

    Args:
        schema: its columns.
        where: file, or dataset and split, for the error.
        options: columns to look for.

    Raises:
        DataError: there is no image column or no caption column, or several that are as likely.
    """
    image, kind = _image_column(schema, where, options.columns.image)
    names = [name for name in schema.names if name != image or kind == "path"]
    if has_captions(names, options.columns.caption) or not ("__key__" in names or options.all_images):
        captions = caption_columns(names, where, None, options.columns.caption)
    else:  # a WebDataset, as `datasets` reads it; or images for an index
        captions = [each for each in WEBDATASET_COLUMNS if each in names and "__key__" in names]
    name = image if kind == "path" else next((name for name in NAME_COLUMNS if name in names), None)
    others = ("split", "group", NEGATIVES)
    split, group, negatives = (optional_column(names, each, {image, *captions}) for each in others)
    caption_id = options.columns.id if options.columns.id in names else None
    return TableColumns(image, kind, captions, name, split, group, caption_id, negatives)


def _image_column(schema: pa.Schema, where: str, wanted: str) -> tuple[str, str]:
    kinds = {field.name: kind for field in schema if (kind := kind_of_column(field.type)) is not None}
    if wanted in kinds:
        return wanted, kinds[wanted]
    for kind, usual in (("struct", ()), ("bytes", BYTES_COLUMNS), ("path", IMAGE_COLUMNS)):
        found = [name for name, each in kinds.items() if each == kind]
        likely = [name for name in usual if name in found]
        if likely or (len(found) == 1 and kind != "path"):
            return (likely or found)[0], kind
        if found and kind != "path":
            text = f"expected an image column {wanted!r}, found image columns {found} among {_listed(schema.names)}"
            raise DataError(Problem("unusable", f"{text}; name it with image_column", where))
    text = f"expected an image column {wanted!r}, found image columns none among {_listed(schema.names)}"
    raise DataError(Problem("unusable", f"{text}; name it with image_column", where))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")


def kind_of_column(column: pa.DataType) -> str | None:
    """What images a column of this type can hold: a kind of [`TableColumns`], or None."""
    if pa.types.is_struct(column):
        return "struct" if {"bytes", "path"} <= {field.name for field in column} else None
    if pa.types.is_binary(column) or pa.types.is_large_binary(column) or pa.types.is_binary_view(column):
        return "bytes"
    is_text = pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)
    return "path" if is_text else None


def held_images(images: pa.Array, kind: str) -> np.ndarray:
    """`[rows]` int8, which rows hold an image ([`HELD`]), a path ([`NAMED`]) or nothing ([`NONE`]).

    Only the validity and the sizes of the images are read, and paths.
    """
    if kind == "struct":
        content, path = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
        named = pc.fill_null(pc.greater(pc.binary_length(path), 0), False).to_numpy(zero_copy_only=False)
    else:
        content, named = images, np.zeros(len(images), bool)
    held = pc.fill_null(pc.greater(pc.binary_length(content), 0), False).to_numpy(zero_copy_only=False)
    if kind == "path":
        return np.where(held, NAMED, NONE).astype(np.int8)
    return np.where(held, HELD, np.where(named, NAMED, NONE)).astype(np.int8)


# --- rows -----------------------------------------------------------------------------------------------------------


def read_tables(
    files: Sequence[TableFile], options: ReadOptions, on_problem: OnProblem, compare_all: bool = False
) -> Iterator[Row]:
    """The rows of all files of a table that have an image and a caption.

    Rows with the same name show the same image only if their images are the same, byte for byte. If a name stands for
    several images, it is qualified by the split, and if need be by a row.

    Args:
        files: files of the table, of all its splits.
        options: how to read them.
        on_problem: function called with the number of rows that are left out (kind `left-out`), once per file, and
            with each path of an image that cannot be used.
        compare_all: whether to look for equal images also where no column names them.

    Raises:
        DataError: the columns are not there.
    """
    columns = [find_columns(file.schema, file.where, options) for file in files]
    same = _same_images(files, columns, compare_all)
    done = 0
    for file, found in zip(files, columns, strict=True):
        try:
            yield from _rows_of_file(file, found, options, on_problem, same, done)
        except DataError as error:
            if error.problem is None or error.problem.kind != "shard":
                raise
            on_problem(error.problem)
        except (OSError, pa.ArrowException) as error:
            text = f"cannot be read to its end: {one_line(error)}; copy or download it again to use all its images"
            on_problem(Problem(kind_of_error(error), text, file.where))
        done += file.rows


def kind_of_error(error: Exception) -> str:
    """The kind of problem of a table that raised an error: damaged, unless the system could not read it."""
    return "shard" if getattr(error, "errno", None) is not None else "damaged-shard"


def _rows_of_file(
    file: TableFile, columns: TableColumns, options: ReadOptions, on_problem: OnProblem, same: SameImages, done: int
) -> Iterator[Row]:
    number, left_out = 0, _LeftOut()
    for batch, held in file.read(columns, columns.texts, False):
        cells = {name: batch.column(name).to_pylist() for name in columns.texts}
        identities = same.of_rows(done + number, done + number + len(held))
        paths = _Paths(file, columns, options, on_problem)
        for i, holds in enumerate(held.tolist()):
            row = file.start + number + i
            captions = _captions(columns.captions, cells, i, options.columns.caption)
            if holds == NONE or not (captions or options.all_images):
                left_out.add("an image" if holds == NONE else "a caption", row)
                continue
            image = paths.check(batch, i, row) if holds == NAMED else file.image_at(number + i, columns.image)
            if image is None:
                continue
            split = (split_of_value(cells[columns.split][i]) if columns.split else None) or file.split
            key, name = _key_and_name(file, columns, cells, i, row, identities.get(done + number + i), split)
            yield Row(
                name=name,
                image=image,
                captions=captions,
                key=key,
                split=split,
                group=_text(cells[columns.group][i]) if columns.group else None,
                ids=_ids(cells[columns.id][i], len(captions)) if columns.id else [],
                file=file.where,
                number=row,
                column=columns.image,
                negatives=negatives_at(cells[columns.negatives][i], file.where, row, on_problem, columns.negatives)
                if columns.negatives
                else [],
            )
        number += len(held)
    left_out.report(number, file.where, on_problem)


@dataclass
class _LeftOut:
    """Rows that are left out of a file, with the number of the first one."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, number: int) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, number)

    def report(self, total: int, where: str, on_problem: OnProblem) -> None:
        parts = [
            f"{count} without {reason} (first: row {self.first[reason]})" for reason, count in self.counts.items()
        ]
        if parts:
            on_problem(Problem("left-out", f"of {total} rows, left out {', '.join(parts)}", where))


@dataclass
class _Paths:
    """The paths of images in a table."""

    file: TableFile
    columns: TableColumns
    options: ReadOptions
    on_problem: OnProblem

    def check(self, batch: pa.RecordBatch, i: int, row: int) -> str | None:
        """The path in a row of a batch; None if it cannot be used, which is reported."""
        cell = batch.column(self.columns.image)[i].as_py()
        path = cell["path"] if self.columns.kind == "struct" else cell
        if not self.file.bounds:
            return path
        folder = Path(self.options.image_dir or self.file.bounds)
        name = posixpath.normpath(path.strip().replace("\\", "/"))
        for _, kind in bad_files(folder, folder, [name], self.options.columns.allow_outside_images):
            text = f"image file {name!r} {BAD_FILES[kind].format(folder=folder)}"
            self.on_problem(Problem(kind, text, self.file.where, row, self.columns.image, name))
            return None
        return os.path.join(folder, name)


def _captions(columns: list[str], cells: dict[str, list[Any]], i: int, wanted: str) -> list[str]:
    """Captions in a row, each once."""
    if "json" in columns or "txt" in columns:
        record = cells.get("json", {i: None})[i]
        texts = texts_of(cells.get("txt", {i: None})[i])
        return join_captions(texts, captions_of_record(record, wanted) if isinstance(record, Mapping) else [])
    return list(dict.fromkeys(text for name in columns for text in texts_of(cells[name][i])))


def _key_and_name(
    file: TableFile,
    columns: TableColumns,
    cells: dict[str, list[Any]],
    i: int,
    row: int,
    identity: Identity | None,
    split: str | None,
) -> tuple[str | None, str]:
    """What identifies the image of a row, None if no other row has it, and its name."""
    name = _text(cells[columns.name][i]) if columns.name else None
    if name is None:
        return identity.digest if identity else None, f"{file.prefix}{row:06d}"
    if columns.kind == "path":
        name = posixpath.normpath(name.replace("\\", "/"))
        return name, name
    if identity is None:
        return None, name
    key = f"{name}\0{identity.digest}"
    if identity.split and split is not None:
        name = f"{split}/{name}"
    if identity.row is not None or (identity.split and split is None):
        name = f"{name}#{identity.row if identity.row is not None else row}"
    return key, name


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value).strip()


def _ids(value: Any, count: int) -> list[str]:
    if not isinstance(value, list):
        return [str(value)] * count
    return [str(each) for each in value] if len(value) == count else []


# --- rows of the same image -----------------------------------------------------------------------------------------


def _same_images(files: Sequence[TableFile], columns: Sequence[TableColumns], compare_all: bool) -> SameImages:
    starts = np.cumsum([0, *(file.rows for file in files)])
    hashes, has_image = np.zeros(starts[-1], np.int64), np.zeros(starts[-1], bool)
    splits = np.zeros(starts[-1], np.int32)
    numbers: dict[str | None, int] = {}  # of the splits
    for file, found, start in zip(files, columns, starts.tolist(), strict=False):
        by_name = found.name is not None and found.kind != "path"
        if not by_name and (found.name is not None or not compare_all):
            continue
        wanted = [name for name in (found.name, found.split) if name is not None]
        with suppress(OSError, DataError, pa.ArrowException):  # which reading the rows reports
            for batch, held in file.read(found, wanted, not by_name):
                here = slice(start, start + len(held))
                start += len(held)
                if by_name:
                    names = [_text(cell) for cell in batch.column(found.name).to_pylist()]
                    hashes[here] = [hash(name) for name in names]
                    has_image[here] = (held != NONE) & [name is not None for name in names]
                else:
                    hashes[here] = hashes_of_images(batch.column(found.image), found.kind, held)
                    has_image[here] = held != NONE
                cells = batch.column(found.split).to_pylist() if found.split else [None] * len(held)
                splits[here] = [numbers.setdefault(split_of_value(cell) or file.split, len(numbers)) for cell in cells]

    def content(row: int) -> bytes | None:
        at = int(starts.searchsorted(row, "right")) - 1
        try:
            image = files[at].image_at(row - int(starts[at]), columns[at].image)
            place = place_of(image) if isinstance(image, str) else None
            return read_place(place) if place is not None else image if isinstance(image, bytes) else None
        except (OSError, DataError, pa.ArrowException):  # whoever decodes it reports it
            return None

    return SameImages(hashes, has_image, splits, content)


SAMPLE = 32  # bytes in the middle of an image that are compared first


def hashes_of_images(images: pa.Array, kind: str, held: np.ndarray) -> np.ndarray:
    """A hash of the length and some bytes of each image, int64 `[rows]`: most different images differ in them."""
    content = pc.struct_field(images, "bytes") if kind == "struct" else images
    hashes = np.zeros(len(images), np.int64)
    for i in np.flatnonzero(held == HELD).tolist():
        data = memoryview(content[i].as_buffer())
        hashes[i] = hash((len(data), bytes(data[len(data) // 2 :][:SAMPLE])))
    for i in np.flatnonzero(held == NAMED).tolist():
        hashes[i] = hash(images[i].as_py()["path"])
    return hashes
