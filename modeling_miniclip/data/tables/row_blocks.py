"""Columns of a split in blocks of rows, so that memory does not grow with the split."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK = 4_096  # rows that are read at a time
MOST_CAPTIONS = 100_000  # captions that statistics look at; of larger splits, they take a sample


def record_batches(rows: "Dataset", columns: list[str], size: int = BLOCK) -> Iterator[pa.RecordBatch]:
    """Columns of a split as Arrow batches, in the order of its rows.

    Args:
        rows: rows of a split, or a selection of them.
        columns: names of the columns.
        size: number of rows in each batch but the last.
    """
    return selected_batches(rows.data.table.select(columns), rows, size)


def selected_batches(table: pa.Table, rows: "Dataset", size: int = BLOCK) -> Iterator[pa.RecordBatch]:
    """The rows of a table that a split selects, as Arrow batches.

    Args:
        table: columns made from all rows of the table behind `rows`.
        rows: rows of a split, or a selection of them.
        size: number of rows in each batch but the last.
    """
    if rows._indices is None:
        yield from batches_of(table.to_batches(), size)
        return
    blocks = table.to_batches()
    starts = np.cumsum([0, *(block.num_rows for block in blocks)])
    for part in batches_of(rows._indices.table.to_batches(), size):
        yield take_rows(blocks, starts, part.column(0).to_numpy().astype(np.int64))


def batches_of(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of another size; only the last one may be smaller."""
    waiting: list[pa.RecordBatch] = []
    missing = size
    for batch in batches:
        while batch.num_rows:
            waiting.append(batch[:missing])
            missing -= waiting[-1].num_rows
            batch = batch[waiting[-1].num_rows :]
            if missing == 0:
                yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)
                waiting, missing = [], size
    if waiting:
        yield pa.concat_batches(waiting)


def take_rows(blocks: list[pa.RecordBatch], starts: np.ndarray, places: np.ndarray) -> pa.RecordBatch:
    """Rows of a table of several blocks. (`Table.take` would first copy the whole table.)

    Args:
        blocks: the blocks, as `Table.to_batches` returns them.
        starts: `[blocks + 1]`, the first row of each block.
        places: `[n]` int64, at least one row, in any order.
    """
    order = np.argsort(places, kind="stable")
    places = places[order]
    numbers = starts.searchsorted(places, "right") - 1
    cuts = np.flatnonzero(np.diff(numbers)) + 1
    parts = [
        blocks[number].take(pa.array(here - starts[number]))
        for number, here in zip(numbers[[0, *cuts]], np.split(places, cuts), strict=True)
    ]
    taken: pa.RecordBatch = pa.concat_batches(parts)
    return taken if (np.diff(order) > 0).all() else taken.take(pa.array(order.argsort()))


def caption_counts(rows: "Dataset") -> np.ndarray:
    """`[rows]` int64, the number of captions of each row."""
    chunks = rows.data.table.column("captions").chunks
    counts = np.concatenate([np.zeros(0, np.int32), *(pc.list_value_length(chunk).to_numpy() for chunk in chunks)])
    if rows._indices is not None:
        counts = counts[rows._indices.table.column(0).to_numpy()]
    return counts.astype(np.int64)


class Captions:
    """The captions of each row of a split, read block by block; can be iterated again and again."""

    def __init__(self, rows: "Dataset"):
        self.rows = rows

    def __iter__(self) -> Iterator[list[str]]:
        for batch in record_batches(self.rows, ["captions"]):
            yield from batch["captions"].to_pylist()


def sample_rows(rows: "Dataset", most: int, seed: int = 0) -> "Dataset":
    """At most `most` rows of a split, drawn by the seed, in their order."""
    return rows if len(rows) <= most else rows.select(sample_numbers(len(rows), most, seed))


def sample_numbers(count: int, size: int, seed: int = 0) -> np.ndarray:
    """`[size]` different numbers below `count`, drawn by the seed, ascending."""
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def sample_of_captions(rows: "Dataset", size: int | None = None) -> "Dataset":
    """The rows of a split; of one with more than [`MOST_CAPTIONS`] captions, some with about `size` captions.

    Args:
        rows: rows of a split.
        size: number of captions in the sample; None takes [`MOST_CAPTIONS`].
    """
    captions, size = int(caption_counts(rows).sum()), size or MOST_CAPTIONS
    return sample_rows(rows, len(rows) if captions <= MOST_CAPTIONS else max(1, size * len(rows) // captions))
