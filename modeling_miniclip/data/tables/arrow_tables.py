"""Datasets of the library `datasets` as tables: their rows stay in their Arrow files."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..shards.shard_url import version_of
from ..splits import split_of_value
from .table_rows import Block, TableColumns, TableFile, held_images

if TYPE_CHECKING:
    from datasets import Dataset


def files_of_dataset(rows: "Dataset", where: str, split: str | None) -> list[TableFile]:
    """The Arrow files of a dataset; for one that is in memory, a table in memory.

    Args:
        rows: the dataset, or one of its splits.
        where: dataset and split, for messages.
        split: name of the split, None if there is none.
    """
    split = split_of_value(split)
    prefix = f"{split}-" if split else ""
    paths = [each["filename"] for each in rows.cache_files]
    tables = [pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in paths]
    if rows._indices is not None or sum(map(len, tables)) != len(rows) or not paths:
        table = rows.flatten_indices().data.table if rows._indices is not None else rows.data.table
        return [
            TableFile(where, where, prefix, table.schema, len(table), partial(_read, table), split,
                      image=partial(_image_in_memory, table))
        ]  # fmt: skip
    files, start = [], 0
    for path, table in zip(paths, tables, strict=True):
        file = TableFile(path, where, prefix, table.schema, len(table), partial(_read, table), split, start)
        files.append(replace(file, version=version_of(path)))
        start += len(table)
    return files


def _read(table: pa.Table, columns: TableColumns, texts: list[str], with_images: bool) -> Iterator[Block]:
    names = list(dict.fromkeys([*texts, columns.image]))  # nothing is read before it is looked at
    for batch in table.select(names).to_batches(4096):
        yield batch, held_images(batch.column(columns.image), columns.kind)


def _image_in_memory(table: pa.Table, row: int, column: str) -> bytes:
    cell: Any = table[column][row].as_py()
    return bytes(cell["bytes"] if isinstance(cell, dict) else cell)
