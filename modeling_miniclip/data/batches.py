"""The global batches of an epoch, and the share of each process: the same batches for any number of processes."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .dataset import FILLER


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of each global batch, as `(epoch, index)` keys of [`CaptionRows`].

    A global batch depends only on seed and epoch; process r of n takes its rows r, r + n, r + 2n, ... A process
    whose share of a short last batch is empty gets the batch's first row again, with the negative image id
    `FILLER - row`, which the loss leaves out.

    Args:
        num_rows: number of rows of the split.
        batch_size: number of rows per global batch; the last one may be smaller.
        shuffle: whether to draw a new order in each epoch, instead of keeping the order of the split.
        seed: random seed of the order.
        rank, world_size: index of this process, and number of processes.
    """

    def __init__(
        self, num_rows: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.num_rows, self.batch_size, self.shuffle, self.seed = num_rows, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first_batch = 0  # set to resume within an epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size) - self.first_batch

    def images_in(self, batch: int) -> int:
        """Number of rows of an epoch's global batch number `batch`, over all processes."""
        return min(self.batch_size, self.num_rows - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        for start in range(self.first_batch * self.batch_size, self.num_rows, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = [(self.epoch, int(i)) for i in batch[self.rank :: self.world_size]]
            yield share or [(self.epoch, FILLER - int(batch[0]))]
