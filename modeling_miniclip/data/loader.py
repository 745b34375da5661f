"""Global batches of a split: choose their rows, collate them, and do both in loader processes.

All randomness depends only on the seed, the epoch and the row, never on the process, the worker or the batch, so that
any number of processes trains on the same global batches.
"""

import os
import re
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ..errors import MiniClipError
from ..processing_miniclip import MiniClipProcessor
from .dataset import FILLER, CaptionRows

BY_VALUE = 2**18  # size in bytes up to which a tensor is copied to the trainer instead of shared with it
SECONDS_BETWEEN_CHECKS = 2  # after which a worker checks again whether the trainer is still running

# Likely causes of a worker's death, by what the DataLoader's message says.
CAUSES_OF_DEATH = (
    (r"Bus error|shared memory|shm|/torch_", "the shared memory (/dev/shm) is full: give the container more (docker "
     "run --shm-size=8g), or use --num_workers 0"),
    (r"Killed|SIGKILL", "the system killed it for lack of memory: lower --num_workers or --batch_size, or close other "
     "programs"),
    (r"", "it ran out of memory, or an image crashed a decoder: `--num_workers 0` shows which"),
)  # fmt: skip


# --- which rows are in a batch --------------------------------------------------------------------------------------


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of each global batch, as `(epoch, index)` keys of [`CaptionRows`].

    A global batch depends only on seed and epoch; process r of n takes its rows r, r + n, r + 2n, ... A process whose
    share of a short last batch is empty gets the batch's first row again, with the negative image id `FILLER - row`,
    which the loss leaves out.

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


# --- collation ------------------------------------------------------------------------------------------------------


class Batch(dict[str, Any]):
    """A batch whose small tensors are copied from a loader process to the trainer.

    PyTorch shares each tensor through shared memory and its own connection, which takes longer than copying some
    kilobytes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        small = {
            name: value.numpy()
            for name, value in self.items()
            if isinstance(value, Tensor) and value.nbytes <= BY_VALUE
        }
        return _restore_batch, (small, {name: value for name, value in self.items() if name not in small})


def _restore_batch(small: dict[str, np.ndarray], others: dict[str, Any]) -> Batch:
    return Batch({name: torch.from_numpy(value) for name, value in small.items()} | others)


class Collator:
    """Turns rows of [`CaptionRows`] into the tensors of a step.

    Args:
        tokenizer: tokenizer of the processor.

    Returns from a call:
        `pixel_values` `[B, 3, H, W]` uint8 (normalised on the device by `MiniClipProcessor.normalize`) or
        `vision_pooler_output` `[B, width]`; `input_ids`, `attention_mask` `[N, L]`, padded to the longest text of the
        batch, or `text_pooler_output` `[N, width]`; `image_id` `[B]`, the indices of the rows; `text_image_id` `[N]`.
        If images cannot be decoded, also `undecodable`: a list of their indices and the reasons; they are in none of
        the tensors.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        undecodable = [(row["image_id"], row["undecodable"]) for row in rows if "undecodable" in row]
        rows = [row for row in rows if "undecodable" not in row]
        batch: dict[str, Any] = {"image_id": torch.tensor([row["image_id"] for row in rows])}
        counts = torch.tensor([len(row["captions"]) for row in rows])
        batch["text_image_id"] = batch["image_id"].repeat_interleave(counts)
        if "vision_features" in rows[0]:
            batch["vision_pooler_output"] = torch.stack([row["vision_features"] for row in rows])
        else:
            batch["pixel_values"] = stack_pixels([row["pixels"] for row in rows])
        if "text_features" in rows[0]:
            batch["text_pooler_output"] = torch.cat([row["text_features"] for row in rows])
        else:
            captions = [caption for row in rows for caption in row["captions"]]
            batch |= self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        # An undecodable filler is reported by the process that has its row.
        real = [(image_id, reason) for image_id, reason in undecodable if image_id >= 0]
        return Batch(batch | ({"undecodable": real} if real else {}))


def stack_pixels(images: list[np.ndarray]) -> Tensor:
    """Stack images `[3, H, W]` to `[B, 3, H, W]` with the memory layout `[B, H, W, 3]`, that of Pillow and cuDNN.

    In a loader process the pixels go straight into memory that is shared with the trainer.
    """
    return default_collate([image.transpose(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def model_inputs(batch: dict[str, Tensor], processor: MiniClipProcessor, device: torch.device) -> dict[str, Tensor]:
    """Keyword arguments of the model for a collated batch: on the device, pixels normalised, ids left out."""
    names = ("pixel_values", "input_ids", "attention_mask", "vision_pooler_output", "text_pooler_output")
    inputs = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
    if "pixel_values" in inputs:
        pixels = processor.normalize(inputs["pixel_values"])
        inputs["pixel_values"] = pixels.contiguous(memory_format=torch.channels_last)
    return inputs


# --- loader processes -----------------------------------------------------------------------------------------------


class BatchLoader(DataLoader[Any]):
    """Iterates over the collated batches of a split, prepared by loader processes.

    An error of this package in a loader process is raised in the trainer as it is. A plain `DataLoader` would raise a
    new error of the same class, with a traceback as its message and without its attributes.

    Args:
        rows: rows of the split.
        batches: keys `(epoch, index)` of the rows of each batch, such as [`GlobalBatches`].
        num_workers: number of loader processes, which live as long as the loader; 0 loads in this process.
        pin_memory: whether to put batches into pinned memory, for fast copies to a GPU.
        prefetch_factor: number of batches that each loader process prepares ahead.
    """

    def __init__(
        self,
        rows: CaptionRows,
        batches: Iterable[list[tuple[int, int]]],
        num_workers: int,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ):
        self.rows = rows
        super().__init__(
            _CollatedBatches(rows),
            batch_sampler=batches,
            collate_fn=_already_collated,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise each pass draws from dropout's state, and resuming would differ
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch declares its own iterator class
        return map(_raise_if_error, super().__iter__())


class _CollatedBatches(Dataset[Any]):
    """Whole batches as a dataset. In a loader process, errors of the package are returned instead of raised."""

    def __init__(self, rows: CaptionRows):
        self.rows = rows
        self.collate = Collator(rows.processor.tokenizer)

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
    Thread(target=_exit_with_trainer, args=(os.getppid(),), daemon=True).start()
    # Ctrl-C, and a scheduler that ends a job, signal the whole process group. If workers died, the trainer could not
    # finish its last step. A second SIGTERM does end a worker: that one comes from the DataLoader.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _exit_with_trainer(trainer: int) -> None:
    # The DataLoader ends its workers too, but only after their batches are in a pipe. Without the trainer nobody
    # empties the pipe, and the workers keep it open for each other: they would wait, and hold their memory, forever.
    while os.getppid() == trainer:
        time.sleep(SECONDS_BETWEEN_CHECKS)
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
        if "DataLoader worker" not in message:  # torch has no separate error class for this
            raise
        cause = next(cause for pattern, cause in CAUSES_OF_DEATH if re.search(pattern, message))
        last_line = str(error).strip().splitlines()[-1]
        raise MiniClipError(f"a loader process died ({last_line}): probably {cause}") from error
