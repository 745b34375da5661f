"""Loader processes: they read and collate batches, report errors like the trainer itself, and end with it."""

import os
import re
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ...errors import MiniClipError
from ...utils.processes import end_daemons_at_exit, follow_parent, forks_processes
from .batches import GlobalBatches
from .collation import Batch, Collator, join_pieces
from .dataset import CaptionRows
from .pixel_memory import PixelMemory

# Likely causes of a worker's death, by what the DataLoader's message says.
CAUSES_OF_DEATH = (
    (r"Bus error|shared memory|shm|/torch_", "the shared memory (/dev/shm) is full: give the container more (docker "
     "run --shm-size=8g), or use --num_workers 0"),
    (r"Killed|SIGKILL", "the system killed it for lack of memory: lower --num_workers or --batch_size, or close other "
     "programs"),
    (r"", "it ran out of memory, or an image crashed a decoder: `--num_workers 0` shows which"),
)  # fmt: skip


class BatchLoader(DataLoader[Any]):
    """Iterates over the collated batches of a split, prepared by loader processes.

    An error of this package in a loader process is raised in the trainer as it is. A plain `DataLoader` would raise a
    new error of the same class, with a traceback as its message and without its attributes.

    Args:
        rows: rows of the split.
        batches: keys `(epoch, index)` of the rows of each batch, such as [`GlobalBatches`].
        num_workers: number of loader processes, which live as long as the loader; 0 loads in this process.
        pin_memory: whether to put batches into pinned memory, for fast copies to a GPU.
        prefetch_factor: number of batches, or of pieces, that each loader process prepares ahead.
        piece_size: most rows that a loader process reads at a time; the trainer joins these pieces. None reads whole
            batches, of which several are then in memory.
    """

    def __init__(
        self,
        rows: CaptionRows,
        batches: Iterable[list[tuple[int, int]]],
        num_workers: int,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        piece_size: int | None = None,
    ):
        self.rows, self.batches, self.memory = rows, batches, None
        self.pieces = _Pieces(batches, piece_size) if piece_size else None
        if num_workers:
            end_daemons_at_exit()
            most = min(piece_size or sys.maxsize, _largest(batches))
            if (size := rows.bytes_per_image * most) and forks_processes():
                self.memory = PixelMemory(num_workers, prefetch_factor + 1, size)  # one is in use
        super().__init__(
            _CollatedBatches(rows, self.memory),
            batch_sampler=self.pieces or batches,
            collate_fn=_already_collated,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise each pass draws from dropout's state, and resuming would differ
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch declares its own iterator class
        loaded = map(_raise_if_error, super().__iter__())
        return loaded if self.pieces is None else self._joined(loaded)

    def _joined(self, pieces: Iterator[Batch]) -> Iterator[Batch]:
        assert self.pieces is not None
        for piece in pieces:
            number, images = self.pieces.expected.popleft()
            yield join_pieces(chain([piece], islice(pieces, number - 1)), images, self.rows.processor.tokenizer)


class _Pieces(Sampler[list[tuple[int, int]]]):
    """The keys of each batch in about equal pieces.

    Attributes:
        expected: pieces and rows of the batches that have been started, and not been joined yet.
    """

    def __init__(self, batches: Iterable[list[tuple[int, int]]], size: int):
        self.batches, self.size = batches, size
        self.expected: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # the number of batches, as the loader yields these

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.expected.clear()
        for keys in self.batches:
            number = -(-len(keys) // self.size)
            self.expected.append((number, len(keys)))
            for i in range(number):
                yield keys[len(keys) * i // number : len(keys) * (i + 1) // number]


class _CollatedBatches(Dataset[Any]):
    """Whole batches as a dataset. In a loader process, errors of the package are returned instead of raised."""

    def __init__(self, rows: CaptionRows, memory: PixelMemory | None = None):
        self.rows = rows
        self.collate = Collator(rows.processor.tokenizer, memory)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | MiniClipError:
        try:
            return self.collate(self.rows.__getitems__(keys))
        except MiniClipError as error:
            if get_worker_info() is None:
                raise
            error.add_note(f"In a loader process:\n{traceback.format_exc()}")
            return error
        except MemoryError as error:
            out_of_memory = MiniClipError(
                "not enough memory to load an image: lower --batch_size or --num_workers, or look for images that are "
                "much larger than the others"
            )
            if get_worker_info() is None:
                raise out_of_memory from error
            return out_of_memory
        except Exception as error:
            if _reaches_the_trainer(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _largest(batches: Iterable[list[tuple[int, int]]]) -> int:
    """Number of rows of the largest batch, as far as it is known without reading them."""
    if isinstance(batches, GlobalBatches):
        return batches.largest_share
    return max(map(len, batches), default=0) if isinstance(batches, list) else 0


def _reaches_the_trainer(error: Exception) -> bool:
    """Whether an error can be raised as it is: some would end the data or, sent from a process, never arrive."""
    if isinstance(error, StopIteration) or get_worker_info() is None:
        return not isinstance(error, StopIteration)
    try:
        ForkingPickler.dumps(type(error))  # the DataLoader sends the class, with the traceback as its message
    except Exception:
        return False
    return True


def _already_collated(batch: Any) -> Any:
    return batch


def _raise_if_error(batch: Batch | MiniClipError) -> Batch:
    if isinstance(batch, MiniClipError):
        try:
            raise batch
        finally:
            del batch  # else the error's traceback refers to itself, and the loader ends only by garbage collection
    return batch


def _start_worker(_: int) -> None:
    # The DataLoader ends its workers too, but only after their batches are in a pipe. Without the trainer nobody
    # empties the pipe, and the workers keep it open for each other: they would wait, and hold their memory, forever.
    follow_parent()
    # Ctrl-C, and a scheduler that ends a job, signal the whole process group. If workers died, the trainer could not
    # finish its last step. A second SIGTERM does end a worker: that one comes from the DataLoader.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]  # a hook for subclasses


def _end_worker(error: Exception, _: Any) -> None:
    # A batch cannot be sent: the shared memory is full, for example. Without it the trainer would wait forever.
    traceback.print_exception(error)
    os._exit(1)


@contextmanager
def readable_worker_errors() -> Iterator[None]:
    """Within the block, report the likely cause when a loader process dies.

    Raises:
        MiniClipError: a loader process died.
    """
    try:
        yield
    except RuntimeError as error:
        message = f"{error} {error.__cause__ or ''}"  # the cause names the signal
        if "DataLoader worker (pid" not in message:  # torch has no separate error class for this
            raise
        cause = next(cause for pattern, cause in CAUSES_OF_DEATH if re.search(pattern, message))
        last_line = str(error).strip().splitlines()[-1]
        raise MiniClipError(f"a loader process died ({last_line}): probably {cause}") from error
