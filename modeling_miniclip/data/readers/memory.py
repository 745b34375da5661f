"""Data that a Python program passes: held in this process under a name, while a run uses it.

The name is made from the content. So the same data has the same name in each process of a run and when a run is
resumed, and its table on disk is found again.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ...errors import DataError, Problem
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..splits import split_of_value
from ..tables.arrow_tables import file_in_memory, files_in_place, files_of_dataset, table_in_memory
from ..tables.memory_tables import kind_of_data, parts_of
from ..tables.table_cache import digest_of, stat_of
from ..tables.table_rows import TableFile, kind_of_column, read_tables

if TYPE_CHECKING:
    from datasets import Dataset

# `paths` if images are named by their paths, as in a caption file; `images` if there are images in the data.
NAME = re.compile(r"memory:(paths|images)-[0-9a-f]{32}")
HASHED_TOGETHER = 1000  # rows


class Part(NamedTuple):
    """A split of data that is held.

    Args:
        rows: its rows.
        where: data and split, for messages.
        split: name of the split; None without splits.
    """

    rows: "pa.Table | Dataset"
    where: str
    split: str | None


_held: dict[str, list[Part]] = {}


def is_memory(source: str) -> bool:
    """Whether a source is the name of data of a Python program."""
    return NAME.fullmatch(source) is not None


def names_paths(source: str) -> bool:
    """Whether such data names its images by their paths."""
    return source.startswith("memory:paths")


@contextmanager
def held(data: Any, wanted: Collection[str] = ()) -> Iterator[str]:
    """Within the block, data can be read in this process under the name that it yields.

    Args:
        data: data as for [`parts_of`][modeling_miniclip.data.tables.memory_tables.parts_of]; paths of images in it are
            relative to `image_dir` or to the working folder.
        wanted: names of columns that are read in any case.

    Raises:
        DataError: it is none of these, or holds something else than images and texts.
    """
    what = kind_of_data(data)
    parts = [
        Part(rows, f"{what}, split {split}" if split else what, split)
        for split, rows in parts_of(data, wanted).items()
    ]
    has_images = any(kind_of_column(column) in ("struct", "bytes") for part in parts for column in _schema(part).types)
    name = f"memory:{'images' if has_images else 'paths'}-{digest_of(map(_identity, parts))}"
    _held[name] = parts
    try:
        yield name
    finally:
        _held.pop(name, None)


def _schema(part: Part) -> pa.Schema:
    return part.rows.schema if isinstance(part.rows, pa.Table) else part.rows.data.schema


def _identity(part: Part) -> list[Any]:
    """What identifies the content of a split: the files that hold it, or a hash of all rows."""
    in_place = [] if isinstance(part.rows, pa.Table) else files_in_place(part.rows)
    if in_place:
        return [part.split, *(stat_of(path) for path, _ in in_place)]
    table = part.rows if isinstance(part.rows, pa.Table) else table_in_memory(part.rows)
    whole = blake2b(table.schema.remove_metadata().to_string().encode(), digest_size=16)
    for batch in table.to_batches(HASHED_TOGETHER):
        whole.update(batch.serialize())
    return [part.split, whole.hexdigest()]


def read_memory(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of data that is held under a name, as [`read_tables`] yields them; relative paths may lead anywhere.

    Raises:
        DataError: this process does not hold it, or it has no column of images or of captions.
    """
    if source not in _held:
        text = "data that a Python program passed to train(), which is not here any more; pass it again"
        raise DataError(Problem("unusable", text, source))
    folder = _folder(options)
    options = replace(options, image_dir=folder, columns=replace(options.columns, allow_outside_images=True))
    files = [file for part in _held[source] for file in _files(part, folder)]
    yield from read_tables(files, options, on_problem, compare_all=True)


def _files(part: Part, folder: str) -> list[TableFile]:
    if isinstance(part.rows, pa.Table):
        return [file_in_memory(part.rows, part.where, split_of_value(part.split), folder)]
    return [replace(file, bounds=folder) for file in files_of_dataset(part.rows, part.where, part.split)]


def inputs_memory(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows depend on, for the key of their table: the content, and where its paths begin."""
    yield [source, _folder(options)]


def _folder(options: ReadOptions) -> str:
    return os.path.abspath(options.image_dir or os.getcwd())
