"""Datasets of the library `datasets` as tables: their rows stay in their Arrow files."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

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
    tables = files_in_place(rows)
    if not tables:
        return [file_in_memory(table_in_memory(rows), where, split)]
    files, start = [], 0
    for path, table in tables:
        file = TableFile(path, where, prefix, table.schema, len(table), partial(_read, table), split, start)
        files.append(replace(file, version=version_of(path)))
        start += len(table)
    return files


def files_in_place(rows: "Dataset") -> list[tuple[str, pa.Table]]:
    """The Arrow files that hold a dataset as it is, each with its table; empty if it was changed or is in memory."""
    if rows._indices is not None:
        return []
    schema = rows.data.schema
    paths = [each["filename"] for each in rows.cache_files]
    tables = [(path, pa.ipc.open_stream(pa.memory_map(path)).read_all()) for path in paths]
    same = sum(len(table) for _, table in tables) == len(rows) and all(table.schema == schema for _, table in tables)
    return tables if same else []


def table_in_memory(rows: "Dataset") -> pa.Table:
    """The rows of a dataset as one table."""
    return rows.flatten_indices().data.table if rows._indices is not None else rows.data.table


def prefix_column(rows: "Dataset", column: str, prefix: str) -> "Dataset":
    """The same rows, with a prefix in front of each text of a column. Only this column is copied into memory."""
    texts = pc.binary_join_element_wise(pa.scalar(prefix), rows.data.column(column), "")  # null stays null
    table = rows.data.set_column(rows.data.schema.get_field_index(column), column, texts)
    return type(rows)(table, info=rows.info.copy(), split=rows.split, indices_table=rows._indices)


def file_in_memory(table: pa.Table, where: str, split: str | None, folder: str = "") -> TableFile:
    """A table in memory in place of a file.

    Args:
        table: its rows.
        where: table and split, for messages.
        split: name of the split, None if there is none.
        folder: folder that paths of images are relative to; "" for any path.
    """
    prefix = f"{split}-" if split else ""
    return TableFile(where, where, prefix, table.schema, len(table), partial(_read, table), split, bounds=folder,
                     image=partial(_image_in_memory, table, folder))  # fmt: skip


def _read(table: pa.Table, columns: TableColumns, texts: list[str], with_images: bool) -> Iterator[Block]:
    names = list(dict.fromkeys([*texts, columns.image]))  # nothing is read before it is looked at
    for batch in table.select(names).to_batches(4096):
        yield batch, held_images(batch.column(columns.image), columns.kind)


def _image_in_memory(table: pa.Table, folder: str, row: int, column: str) -> bytes:
    cell: Any = table[column][row].as_py()
    content = cell["bytes"] if isinstance(cell, dict) else cell
    if content and not isinstance(content, str):
        return bytes(content)
    path = cell["path"] if isinstance(cell, dict) else cell
    return Path(folder, path).read_bytes()
