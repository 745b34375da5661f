"""The order of the rows of an epoch, computed from seed, epoch and place: nothing has to be read or remembered.

| order | memory | reads |
|---|---|---|
| `InOrder` | none | one after the other |
| `Shuffled` | 8 bytes per row | anywhere |
| `ShuffledInWindows` | a window of shards | a few shards at a time |
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

WINDOW_ROWS = 1024  # a window has about as many rows,
WINDOW_SHARDS = 4  # but at least about as many shards
PIECE = 65_536  # rows in a piece of an order, at most
OF_SHARDS, OF_ROWS = 1, 2  # the last word of a seed: what is shuffled


class RowOrder(Protocol):
    """An order of rows for each epoch."""

    num_rows: int  # in an epoch

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The keys of an epoch from place `start` on, in arrays `[n, 2]`: number of a pass over the data, and row.

        No two epochs have the same key; without weights, the pass is the epoch.
        """


def keys_of(epoch: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of one pass as pieces of keys."""
    for first in range(0, len(rows), PIECE):
        piece = rows[first : first + PIECE]
        yield np.stack([np.full(len(piece), epoch), piece], axis=1)


class InOrder:
    """The order of the split, in every epoch."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See [`RowOrder`]."""
        for first in range(start, self.num_rows, PIECE):
            yield from keys_of(epoch, np.arange(first, min(first + PIECE, self.num_rows)))


class Shuffled:
    """All rows in a random order, another one in each epoch.

    Args:
        num_rows: number of rows of the split.
        seed: random seed of the order.
        number: number of the dataset, which gives those of one size different orders.
    """

    def __init__(self, num_rows: int, seed: int = 0, number: int = 0):
        self.num_rows, self.seed, self.number = num_rows, seed, number

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See [`RowOrder`]."""
        order = np.random.default_rng([self.seed, epoch, self.number]).permutation(self.num_rows)
        yield from keys_of(epoch, order[start:])


class ShuffledInWindows:
    """Shards in a random order, and rows in a random order within a window of shards that follow each other.

    Args:
        boundaries: row where each shard starts, and the number of rows: `[0, ..., num_rows]`.
        seed: random seed of the order.
        number: number of the dataset, which gives those of one size different orders.
        on_next: function called with the first row of each shard of a window before its rows are needed: when the
            window before it begins.
    """

    def __init__(
        self,
        boundaries: np.ndarray,
        seed: int = 0,
        number: int = 0,
        on_next: Callable[[np.ndarray], None] = lambda rows: None,
    ):
        self.starts, self.sizes = boundaries[:-1].astype(np.int64), np.diff(boundaries).astype(np.int64)
        self.num_rows, self.seed, self.number, self.on_next = int(self.sizes.sum()), seed, number, on_next

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See [`RowOrder`]. Windows before `start` are only counted."""
        shards = self._rng(epoch, 0, OF_SHARDS).permutation(len(self.sizes))
        # A window ends with the shard at which this sum reaches a multiple of WINDOW_ROWS.
        filled = np.cumsum(np.minimum(self.sizes[shards], WINDOW_ROWS // WINDOW_SHARDS))
        cuts = np.flatnonzero(np.diff(np.append(0, filled) // WINDOW_ROWS)) + 1
        windows = np.split(shards, cuts[cuts < len(shards)])
        ends = np.cumsum([self.sizes[window].sum() for window in windows])
        first = int(ends.searchsorted(start, "right"))
        for number in range(first, len(windows)):
            for following in windows[number + (number > first) : number + 2]:
                self.on_next(self.starts[following])
            rows = self._rows(windows[number])
            self._rng(epoch, number, OF_ROWS).shuffle(rows)
            yield from keys_of(epoch, rows[max(0, start - (int(ends[number]) - len(rows))) :])

    def _rows(self, window: np.ndarray) -> np.ndarray:
        """All rows of a window's shards."""
        return np.concatenate(
            [np.arange(self.starts[shard], self.starts[shard] + self.sizes[shard]) for shard in window]
            or [np.zeros(0, np.int64)]
        )

    def _rng(self, epoch: int, number: int, kind: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, number, kind, self.number])
