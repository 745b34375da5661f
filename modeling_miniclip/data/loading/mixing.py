"""Several datasets in one epoch, by weights: which row of which dataset is at a place is computed (see `order.py`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

import numpy as np

from .order import RowOrder, Shuffled, ShuffledInWindows

OF_BATCH = 3  # the last word of a seed, as in `order.py`


def shuffled_order(
    num_rows: int,
    batch_size: int,
    seed: int = 0,
    boundaries: np.ndarray | None = None,
    sizes: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    on_next: Callable[[np.ndarray], None] = lambda rows: None,
) -> RowOrder:
    """The order of training rows.

    Args:
        num_rows: number of rows of all datasets.
        batch_size: number of rows per global batch.
        seed: random seed of the order.
        boundaries: row where each shard starts, and `num_rows`, to shuffle in windows of shards; None for any order.
        sizes: number of rows of each dataset; their rows follow each other.
        weights: weight of each dataset; None uses each row once per epoch.
        on_next: function called with the first row of each shard of the next window, see [`ShuffledInWindows`].
    """
    ends = np.cumsum(sizes or [num_rows])
    firsts = ends - (sizes or [num_rows])
    cuts = None if boundaries is None else np.union1d(boundaries, np.append(firsts, num_rows))

    def order_of(first: int, end: int, number: int) -> RowOrder:
        if cuts is None:
            return Shuffled(end - first, seed, number)
        own = cuts[(cuts >= first) & (cuts <= end)] - first
        return ShuffledInWindows(own, seed, number, lambda rows: on_next(rows + first))

    if weights is None:
        return order_of(0, num_rows, 0)
    parts = zip(firsts.tolist(), ends.tolist(), strict=True)
    orders = [order_of(first, end, number) for number, (first, end) in enumerate(parts)]
    return Mixture(orders, weights, batch_size, seed)


class Mixture:
    """Rows of several datasets by weights; they are numbered as if the datasets followed each other.

    An epoch has as many rows as the datasets together. Each dataset's share is exact to one row per epoch and spread
    evenly over the batches. A dataset that runs out starts again in a new order, and goes on in the next epoch where
    it stopped.

    Args:
        orders: order of each dataset's rows, numbered from 0; a pass over the dataset is one of its epochs.
        weights: weight of each dataset.
        batch_size: number of rows per global batch.
        seed: random seed of the order.
    """

    def __init__(self, orders: Sequence[RowOrder], weights: Sequence[float], batch_size: int, seed: int = 0):
        self.orders, self.batch_size, self.seed = orders, batch_size, seed
        self.sizes = [order.num_rows for order in orders]
        self.num_rows = sum(self.sizes)
        used = [weight if size else 0.0 for weight, size in zip(weights, self.sizes, strict=True)]
        self.shares = shares_of(self.num_rows, used)

    def times_used(self, epochs: float) -> list[float]:
        """How often each row of each dataset was used after some epochs, on average."""
        return [epochs * share / max(size, 1) for share, size in zip(self.shares, self.sizes, strict=True)]

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See [`RowOrder`]; the arrays end where batches end, and a pass is one over the row's dataset."""
        firsts = np.cumsum([0, *self.sizes])
        readers: dict[int, _Reader] = {}
        while start < self.num_rows:
            batch, rest = divmod(start, self.batch_size)
            stop = min(start + self.batch_size - rest, self.num_rows)
            # All of the batch, as it is shuffled as a whole: the shares of all processes have rows of all datasets.
            owner, use = owners(np.arange(batch * self.batch_size, stop), self.shares)
            keys = np.empty((len(owner), 2), np.int64)
            for number in np.unique(owner):
                mine = owner == number
                if number not in readers:
                    first_use = epoch * self.shares[number] + int(use[mine][0])
                    readers[number] = _Reader(self._endless(number, first_use))
                keys[mine] = readers[number].take(int(mine.sum()))
            keys[:, 1] += firsts[owner]
            np.random.default_rng([self.seed, epoch, batch, OF_BATCH]).shuffle(keys)
            yield keys[rest:]
            start = stop

    def _endless(self, number: int, first_use: int) -> Iterator[np.ndarray]:
        """The keys of a dataset from a use on, counted over all epochs."""
        first_pass, place = divmod(first_use, self.sizes[number])
        for each in count(first_pass):
            yield from self.orders[number].pieces(each, place)
            place = 0


class _Reader:
    """Takes keys from arrays of any length."""

    def __init__(self, pieces: Iterable[np.ndarray]):
        self.pieces, self.held = iter(pieces), np.zeros((0, 2), np.int64)

    def take(self, number: int) -> np.ndarray:
        """The next keys."""
        while len(self.held) < number:
            self.held = np.concatenate([self.held, next(self.pieces)])
        taken, self.held = self.held[:number], self.held[number:]
        return taken


def shares_of(total: int, weights: Sequence[float]) -> list[int]:
    """A total divided by weights, each share exact to one; the shares that lose most by rounding are rounded up.

    Examples:
        >>> shares_of(10, [1, 1, 1])
        [4, 3, 3]
    """
    exact = np.asarray(weights, float) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    up = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
    shares[up] += 1
    return shares.tolist()


def owners(places: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset has each place of an epoch: evenly spread, and computed for any place alone.

    The first dataset gets every place at which its rounded part of the places so far grows; the others divide the
    remaining places in the same way.

    Args:
        places: places in the epoch.
        shares: number of places of each dataset.

    Returns:
        The number of the dataset of each place, and how many places before are its own.
    """
    owner, use = np.empty_like(places), np.empty_like(places)
    open_, left = np.arange(len(places)), sum(shares)
    for number, share in enumerate(shares):
        if not len(open_):
            break
        before, after = (_rounded(places + i, share, left) for i in (0, 1))
        mine = after > before
        owner[open_[mine]], use[open_[mine]] = number, before[mine]
        open_, places, left = open_[~mine], (places - before)[~mine], left - share
    return owner, use


def _rounded(places: np.ndarray, share: int, total: int) -> np.ndarray:
    """`places * share / total`, rounded."""
    return (2 * places * share + total) // (2 * total)
