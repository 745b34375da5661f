"""Where the shards of a split begin, from the names of its images: rows that an order keeps close to each other."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..tables.row_blocks import selected_batches
from .remote_shards import current_cache
from .shard_url import PREFIX, place_of, row_groups

if TYPE_CHECKING:
    from datasets import Dataset

LOOSE = 1024  # images outside shards that count as a shard


class SplitShards(NamedTuple):
    """The shards of a split.

    Args:
        boundaries: row where each shard, or row group of a Parquet file, starts, and the number of rows.
        names: path or URL of each of these shards; "" for images outside shards.
        need_windows: whether rows in any order would be slow to read: those of Parquet files and remote shards.
    """

    boundaries: np.ndarray
    names: list[str]
    need_windows: bool

    def fetch_ahead(self, rows: np.ndarray) -> None:
        """Fetch the remote shards of some rows in the background."""
        numbers = self.boundaries.searchsorted(rows, "right") - 1
        current_cache().fetch_ahead(list(dict.fromkeys(self.names[number] for number in numbers)))


class _Unit(NamedTuple):
    """Rows that are read together: of an archive, of a row group, or images outside shards, whose shard is ""."""

    shard: str
    group: int = 0
    needs_window: bool = False


def find_shards(rows: "Dataset") -> SplitShards:
    """Find the shards of a split, without opening images.

    Args:
        rows: rows of a split with the column `image`; those of a shard follow each other.
    """
    paths = pa.table({"path": pc.struct_field(rows.data.table["image"], "path").cast(pa.string())})
    groups_of = cache(row_groups)

    def unit_of(name: str | None) -> _Unit:
        place = place_of(name or "")
        if place is None:
            return _Unit("")
        is_remote = "://" in place.shard
        starts = groups_of(place.shard) if place.size < 0 and not is_remote else None
        group = 0 if starts is None else int(starts.searchsorted(place.start, "right"))
        return _Unit(place.shard, group, is_remote or starts is not None)

    starts: list[int] = []
    units: list[_Unit] = []
    row = 0
    for batch in selected_batches(paths, rows):
        for i, unit in _first_rows(batch["path"], unit_of):
            if not units or unit != units[-1]:
                starts.append(row + i)
                units.append(unit)
        row += len(batch)
    edges = [*starts, row]
    parts = [
        np.arange(start, stop, max(1, stop - start) if unit.shard else LOOSE)
        for unit, start, stop in zip(units, edges[:-1], edges[1:], strict=True)
    ]
    boundaries = np.concatenate([*parts, [row]]).astype(np.int64)
    names = [unit.shard for unit, part in zip(units, parts, strict=True) for _ in part]
    return SplitShards(boundaries, names, any(unit.needs_window for unit in units))


def _first_rows(names: pa.Array, unit_of: Callable[[str | None], _Unit]) -> Iterator[tuple[int, _Unit]]:
    """The first row of each unit; most rows are not looked at, as those between two of one unit are of it too."""
    in_shards = pc.sum(pc.starts_with(names, PREFIX)).as_py() or 0
    if 0 < in_shards < len(names):  # images outside shards are one unit, which shards may interrupt
        yield from ((i, unit_of(name)) for i, name in enumerate(names.to_pylist()))
        return
    unit_at = cache(lambda i: unit_of(names[i].as_py()))

    def changes(first: int, last: int) -> Iterator[int]:
        if unit_at(first) == unit_at(last):
            return
        if last == first + 1:
            yield last
            return
        middle = (first + last) // 2
        yield from changes(first, middle)
        yield from changes(middle, last)

    yield from ((i, unit_at(i)) for i in (0, *changes(0, len(names) - 1)))
