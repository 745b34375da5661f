"""From rows to batches: which rows make a step, which caption is drawn, how an image is augmented, how it is collated.

Everything random depends on the seed, the epoch and the row alone, never on the process, the worker or the batch, so
that any number of processes trains on the same global batches.
"""

import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from ..errors import MiniClipError
from ..processing_miniclip import MiniClipProcessor
from .dataset import FILLER, CaptionRows

BY_VALUE = 2**18  # bytes of a tensor
SECONDS_BETWEEN_LOOKS = 2  # of a loader's process at whether the trainer lives


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of each global batch, as `(epoch, index)` keys of [`CaptionRows`].

    A global batch depends on seed and epoch only; process r of n takes its rows r, r + n, r + 2n, ... A process whose
    share of a short last batch is empty gets the batch's first row again, under the negative image id `FILLER - row`,
    which the loss leaves out.

    Args:
        num_rows: rows of the split.
        batch_size: rows a global batch; the last one may be smaller.
        shuffle: draw a new order each epoch; otherwise the order of the split.
        seed: of the order.
        rank, world_size: this process among all.
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
        """Rows of an epoch's global batch number `batch`, over all processes."""
        return min(self.batch_size, self.num_rows - batch * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        for start in range(self.first_batch * self.batch_size, self.num_rows, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = [(self.epoch, int(i)) for i in batch[self.rank :: self.world_size]]
            yield share or [(self.epoch, FILLER - int(batch[0]))]


def stack_pixels(images: list[np.ndarray]) -> Tensor:
    """Images `[3, H, W]` as `[B, 3, H, W]`, laid out as `[B, H, W, 3]`: as Pillow gives them and convolutions like it.

    In a loader's process they go straight into the memory that it shares with training.
    """
    return default_collate([image.transpose(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


class Batch(dict):
    """A batch whose small tensors go from a loader's process to the trainer by value.

    PyTorch hands over a tensor in shared memory, by a connection of its own for each, which takes longer than to copy
    some kilobytes.
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
    """Rows of [`CaptionRows`] to the tensors of a step.

    Returns from a call:
        `pixel_values` `[B, 3, H, W]` uint8 (normalised on the device by `MiniClipProcessor.normalize`) or
        `vision_pooler_output` `[B, width]`; `input_ids`, `attention_mask` `[N, L]` padded to the longest of the batch
        or `text_pooler_output` `[N, width]`; `image_id` `[B]`, the rows' indices; `text_image_id` `[N]`. Where images
        cannot be decoded, `undecodable`: a list of their indices and why; they are in none of the tensors.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        lost = [(row["image_id"], row["undecodable"]) for row in rows if "undecodable" in row]
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
        own = [(image_id, why) for image_id, why in lost if image_id >= 0]  # a filler's is told where it belongs
        return Batch(batch | ({"undecodable": own} if own else {}))


def make_loader(
    rows: CaptionRows,
    batches: Iterable[list[tuple[int, int]]],
    num_workers: int,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> "DataLoader[dict[str, Any]]":
    """A loader of collated batches. Its workers live as long as it does, each `prefetch_factor` batches ahead."""
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=Collator(rows.processor.tokenizer),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else each pass draws from the state of dropout, and resuming would differ
    )


def _begin_worker(_: int) -> None:
    Thread(target=_end_with_the_trainer, args=(os.getppid(),), daemon=True).start()
    # Ctrl-C, and a scheduler that ends a job, signal the whole process group. A dead worker would be an error within
    # the trainer's last step. At a second SIGTERM it dies: that one is the DataLoader's own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end_with_the_trainer(trainer: int) -> None:
    # The DataLoader lets its workers end too, but not before what they have prepared is in a pipe. Nobody empties
    # that, and each keeps it open for the others: they would wait, and hold their memory, forever.
    while os.getppid() == trainer:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


# What a worker's end says, and what it means to the user.
DEATHS = (
    (r"Bus error|shared memory|shm|/torch_", "the shared memory (/dev/shm) is full: give the container more (docker "
     "run --shm-size=8g), or --num_workers 0"),
    (r"Killed|SIGKILL", "the system ended it for lack of memory: lower --num_workers or --batch_size, or close other "
     "programs"),
    (r"", "it ran out of memory, or an image crashed a decoder: `--num_workers 0` tells which"),
)  # fmt: skip


@contextmanager
def readable_worker_errors() -> Iterator[None]:
    """Within the block, what happens in a loader's process is told as if it had happened here.

    Raises:
        MiniClipError: a worker died; with the likely cause. An error of a worker's own keeps its class and loses the
            traceback that the DataLoader has put into its message.
    """
    try:
        yield
    except MiniClipError as error:
        told, kind = str(error), type(error)
        if not told.startswith("Caught "):
            raise
        raise kind(told.rpartition(f"{kind.__name__}: ")[2].strip()) from error
    except MemoryError as error:
        raise MiniClipError(
            "an image could not be loaded for lack of memory: lower --batch_size or --num_workers, or look for images "
            "that are much larger than the others"
        ) from error
    except RuntimeError as error:
        told = f"{error} {error.__cause__ or ''}"  # which knows the signal
        if "DataLoader worker" not in told:
            raise
        cause = next(cause for pattern, cause in DEATHS if re.search(pattern, told))
        raise MiniClipError(
            f"a loader process died ({str(error).strip().splitlines()[-1]}): likely {cause}"
        ) from error


def model_inputs(batch: dict[str, Tensor], processor: MiniClipProcessor, device: torch.device) -> dict[str, Tensor]:
    """A collated batch on the device, as keyword arguments of the model: pixels normalised, ids left out."""
    names = ("pixel_values", "input_ids", "attention_mask", "vision_pooler_output", "text_pooler_output")
    inputs = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
    if "pixel_values" in inputs:
        pixels = processor.normalize(inputs["pixel_values"])
        inputs["pixel_values"] = pixels.contiguous(memory_format=torch.channels_last)
    return inputs
