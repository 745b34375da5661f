"""An order of rows that fetches the remote shards of its next rows while the current ones are read."""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .order import RowOrder
from .remote_shards import current_cache, is_url
from .shard_url import place_of

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT = 1000  # shards


class FetchedAhead:
    """The same order as another one; each piece of it is returned when the shards of the next one are being fetched.

    Args:
        order: the order.
        rows: rows of the split.
        boundaries: row where each shard starts, and the number of rows.
    """

    def __init__(self, order: RowOrder, rows: "Dataset", boundaries: np.ndarray):
        self.order, self.boundaries = order, boundaries
        self.num_rows = order.num_rows
        paths = rows.select_columns(["image"]).with_format("arrow")

        @cache
        def shard_of(number: int) -> str:
            image = paths[int(boundaries[number])]["image"][0].as_py()
            place = place_of(image["path"] or "")
            return place.shard if place is not None else ""

        self.shard_of = shard_of

    @property
    def has_remote_shards(self) -> bool:
        """Whether there is anything to fetch, as far as a look at some of the shards shows."""
        count = len(self.boundaries) - 1
        return any(is_url(self.shard_of(number)) for number in range(0, count, count // LOOKED_AT + 1))

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See [`RowOrder`][modeling_miniclip.data.order.RowOrder]."""
        before = None
        for piece in self.order.pieces(epoch, start):
            self._fetch(piece[:, 1])
            if before is not None:
                yield before
            before = piece
        if before is not None:
            yield before

    def _fetch(self, rows: np.ndarray) -> None:
        numbers, first = np.unique(self.boundaries.searchsorted(rows, "right") - 1, return_index=True)
        current_cache().fetch_ahead([self.shard_of(number) for number in numbers[np.argsort(first)].tolist()])


def fetched_ahead(order: RowOrder, rows: "Dataset", boundaries: np.ndarray | None) -> RowOrder:
    """An order as [`FetchedAhead`], if it goes through remote shards one after the other."""
    if boundaries is None:
        return order
    ahead = FetchedAhead(order, rows, boundaries)
    return ahead if ahead.has_remote_shards else order
