"""The global batches of an epoch, and the share of each process: the same batches for any number of processes."""

from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import Sampler

from .dataset import FILLER
from .order import RowOrder


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of each global batch, as `(pass, index)` keys of [`CaptionRows`].

    A global batch depends only on the order; process r of n takes its keys r, r + n, r + 2n, ... A process
    whose share of a short last batch is empty gets the batch's first row again, with the negative image id
    `FILLER - row`, which the loss leaves out.

    Args:
        order: order of the rows of each epoch.
        batch_size: number of rows per global batch; the last one may be smaller.
        rank, world_size: index of this process, and number of processes.
    """

    def __init__(self, order: RowOrder, batch_size: int, rank: int = 0, world_size: int = 1):
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first_batch = 0  # set to resume within an epoch

    def __len__(self) -> int:
        return -(-self.order.num_rows // self.batch_size) - self.first_batch

    @property
    def largest_share(self) -> int:
        """Number of rows of this process in a whole global batch."""
        return -(-min(self.batch_size, self.order.num_rows) // self.world_size)

    def images_in(self, batch: int) -> int:
        """Number of rows of an epoch's global batch number `batch`, over all processes."""
        return min(self.batch_size, self.order.num_rows - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        pieces = self.order.pieces(self.epoch, self.first_batch * self.batch_size)
        for batch in in_batches(pieces, self.batch_size):
            share = [(number, row) for number, row in batch[self.rank :: self.world_size].tolist()]
            yield share or [(int(batch[0, 0]), FILLER - int(batch[0, 1]))]


def in_batches(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Arrays of any length as arrays of `size`; the last one may be shorter."""
    held: list[np.ndarray] = []
    count = 0  # values in `held`, fewer than `size`
    for piece in pieces:
        while count + len(piece) >= size:
            held.append(piece[: size - count])
            yield np.concatenate(held)
            piece = piece[size - count :]
            held, count = [], 0
        if len(piece):
            held.append(piece)
            count += len(piece)
    if held:
        yield np.concatenate(held)
