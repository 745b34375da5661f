"""Memory in which loader processes leave pixels for the trainer, used again and again.

PyTorch passes each batch in new shared memory, over a connection opened for it. The kernel clears such memory page by
page, which takes a tenth of the time of decoding photographs; and a container may have little of it in /dev/shm.
"""

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

NUMBERS = itertools.count()


class Place(NamedTuple):
    """Where the pixels of a batch are; sent to the trainer, it becomes the pixels, see [`receive_pixels`].

    Args:
        memory: number of a [`PixelMemory`].
        worker, slot: loader process, and which of its slots.
        shape: shape of the pixels in memory, `(B, H, W, 3)`.
    """

    memory: int
    worker: int
    slot: int
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return receive_pixels, tuple(self)


class PixelMemory:
    """Slots for the pixels of batches, some for each loader process. Pages that are never used take no memory.

    A slot is taken from when a loader process writes to it until the trainer has dropped the batch.

    Args:
        num_workers: number of loader processes.
        slots: number of batches of each that can exist at the same time.
        size: bytes of a slot.
    """

    known: ClassVar[weakref.WeakValueDictionary[int, "PixelMemory"]] = weakref.WeakValueDictionary()  # by number

    def __init__(self, num_workers: int, slots: int, size: int):
        count = num_workers * slots
        memory = np.frombuffer(mmap.mmap(-1, count * (size + 1)), np.uint8)  # forked processes share it
        self.slots, self.is_taken = memory[:-count].reshape(-1, slots, size), memory[-count:].reshape(-1, slots)
        self.number = next(NUMBERS)
        self.known[self.number] = self

    def write(self, images: Sequence[np.ndarray]) -> Place | None:
        """Write images `[3, H, W]` uint8 of one size to a free slot.

        Returns:
            The place; None if all slots are taken or too small, and in the trainer itself.
        """
        worker, (channels, height, width) = get_worker_info(), images[0].shape
        shape = (len(images), height, width, channels)
        if worker is None or math.prod(shape) > self.slots.shape[2]:
            return None
        is_taken = self.is_taken[worker.id].tolist()
        if all(is_taken):
            return None
        place = Place(self.number, worker.id, is_taken.index(0), shape)
        self.is_taken[place.worker, place.slot] = 1
        np.stack([image.transpose(1, 2, 0) for image in images], out=self.at(place))
        return place

    def at(self, place: Place) -> np.ndarray:
        """The memory `[B, H, W, 3]` of a place."""
        return self.slots[place.worker, place.slot, : math.prod(place.shape)].reshape(place.shape)


def receive_pixels(memory: int, worker: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    """The pixels `[B, 3, H, W]` at a place, stored as `[B, H, W, 3]`; once they are dropped, the slot is free."""
    owner = PixelMemory.known[memory]
    pixels = owner.at(Place(memory, worker, slot, shape))
    weakref.finalize(pixels, _release, owner.is_taken[worker, slot : slot + 1], os.getpid()).atexit = False
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _release(is_taken: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # not one that was forked while the batch was in use
        is_taken[:] = 0
