"""From rows to batches: which rows make a step, which caption is drawn, how an image is augmented, how it is collated.

Everything random depends on the seed, the epoch and the row alone, never on the process, the worker or the batch, so
that any number of processes trains on the same global batches.
"""

import inspect
import math
import os
import random
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataError, MiniClipError, UsageError, did_you_mean
from ..processing_miniclip import MiniClipProcessor, to_rgb

if TYPE_CHECKING:
    from datasets import Dataset

# What a run that names no augmentation gets: mild, for captions name colours and what is at the edge. Flips are usual,
# though they make captions wrong that say left or right.
DEFAULT_AUGMENTATION: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "scale": [0.6, 1.0], "ratio": [0.8, 1.25]},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5},
]


def build_augmentation(transforms: list[dict[str, Any]], image_size: tuple[int, int]) -> Any:
    """An albumentations pipeline for training images.

    Args:
        transforms: one dictionary a transform: `name` of an albumentations class and its arguments. A transform that
            takes a `size` and names none gets `image_size`.
        image_size: `(height, width)` in pixels that every image has afterwards.

    Returns:
        `albumentations.Compose` from `[H, W, 3]` uint8 to `image_size`; None for an empty list.

    Raises:
        UsageError: no such transform, arguments that it does not take, or a result that is no 8-bit RGB image.
    """
    if not transforms:
        return None
    import albumentations

    steps = [_build_transform(transform, image_size) for transform in transforms]
    steps.append(albumentations.Resize(*image_size))  # does nothing to an image of that size
    try:
        # None is left to chance, so that what is wrong is seen now.
        certain = albumentations.Compose(
            [_build_transform({**t, "p": 1.0}, image_size) for t in transforms] + steps[-1:]
        )
        trial = certain(image=np.zeros((1024, 1024, 3), dtype=np.uint8))["image"]
        if trial.dtype != np.uint8 or trial.shape != (*image_size, 3):
            raise ValueError(f"it gives {trial.dtype} of shape {tuple(trial.shape)}")
    except Exception as error:  # whatever a transform raises that needs more than an image
        raise UsageError(
            f"augmentation ({', '.join(transform['name'] for transform in transforms)}) must turn an image alone into "
            "an 8-bit RGB image; the processor normalises and makes the tensor, so leave out Normalize, ToFloat and "
            f"ToTensorV2: {error}"
        ) from error
    return albumentations.Compose(steps)


def _build_transform(transform: dict[str, Any], image_size: tuple[int, int]) -> Any:
    import albumentations

    arguments = dict(transform)
    name = str(arguments.pop("name", None))
    known = {
        key: value
        for key, value in vars(albumentations).items()
        if isinstance(value, type) and issubclass(value, albumentations.BasicTransform)
    }
    if name not in known:
        raise UsageError(f"augmentation: albumentations has no transform {name!r}{did_you_mean(name, known)}")
    accepted = inspect.signature(known[name]).parameters
    for argument in arguments:
        if argument not in accepted:
            raise UsageError(
                f"augmentation: {name} takes no {argument}{did_you_mean(argument, accepted)}; it takes "
                f"{', '.join(accepted)}"
            )
    if "size" in accepted:
        arguments.setdefault("size", image_size)
    try:
        return known[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except Exception as error:  # a wrong value, a missing argument, an abstract class
        raise UsageError(f"augmentation: {name}: {error}") from error


# A row i that only keeps a process busy has the image id FILLER - i, which is negative.
FILLER = -1
BY_VALUE = 2**18  # bytes of a tensor
SECONDS_BETWEEN_LOOKS = 2  # of a loader's process at whether the trainer lives
READ_TOGETHER = 32  # image files that a loader's process holds undecoded


def _index_of(image_id: int) -> int:
    return image_id if image_id >= 0 else FILLER - image_id


class CaptionRows(TorchDataset):
    """Rows of a split, ready to be collated; an item is asked for by `(epoch, index)`.

    A list of items may hold images that cannot be decoded: see `__getitems__`.

    Args:
        split: rows `{image, image_id, captions}`.
        processor: gives an image that is not augmented its resize and crop.
        augmentation: of [`build_augmentation`], or None.
        captions_per_image: how many captions are drawn per image and epoch; None takes all of them.
        seed: of the draws and of the augmentation.
        vision_features: pooled features `[n, width]` of the frozen image tower, instead of the images: one tensor a
            view, taken in turn by the epochs. NaN stands for an image that could not be decoded.
        text_features: one `[captions, width]` tensor an image, of the frozen text tower, instead of the texts.
    """

    def __init__(
        self,
        split: "Dataset",
        processor: MiniClipProcessor,
        augmentation: Any = None,
        captions_per_image: int | None = None,
        seed: int = 0,
        vision_features: list[Tensor] | None = None,
        text_features: list[Tensor] | None = None,
    ):
        from datasets import Image

        self.decode = split.features["image"].decode_example
        self.undecoded = split.select_columns(["image"]).cast_column("image", Image(decode=False))
        self.image_ids: list[str] = list(split["image_id"])
        self.captions: list[list[str]] = list(split["captions"])
        self.processor = processor
        self.augmentation = augmentation
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.vision_features = vision_features
        self.text_features = text_features

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row = self._row(key, self._draw(key), None)
        if "undecodable" in row:
            raise DataError(row["undecodable"])
        return row

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The rows of a batch, which the DataLoader asks for at once.

        A row whose image cannot be decoded is `{"image_id", "undecodable": why}`. Where none is left, one more row
        that can be decoded follows as a filler.

        Raises:
            DataError: no image of the split can be decoded, or a file cannot be read.
        """
        draws = [self._draw(key) for key in keys]  # first, for between images it takes several times as long
        rows = [self._row(*row) for row in zip(keys, draws, self._files(keys), strict=True)]
        if all("undecodable" in row for row in rows):
            rows.append(self._filler(*keys[0]))
        return rows

    def _files(self, keys: list[tuple[int, int]]) -> Iterator[dict[str, Any] | None]:
        # `datasets` takes as long for one row as for many.
        for start in range(0, len(keys), READ_TOGETHER):
            indices = [_index_of(image_id) for _, image_id in keys[start : start + READ_TOGETHER]]
            yield from [None] * len(indices) if self.vision_features is not None else self.undecoded[indices]["image"]

    def _draw(self, key: tuple[int, int]) -> tuple[np.ndarray, np.random.Generator, random.Random]:
        """What chance gives to a row: the captions chosen, and two sources for the augmentation."""
        epoch, index = key[0], _index_of(key[1])
        rng = np.random.default_rng([self.seed, epoch, index])
        available = len(self.captions[index])
        if self.captions_per_image is None or self.captions_per_image >= available:
            chosen = np.arange(available)
        else:
            chosen = rng.choice(available, size=self.captions_per_image, replace=False)
        return chosen, rng, random.Random(int(rng.integers(2**63)))

    def _row(
        self,
        key: tuple[int, int],
        draw: tuple[np.ndarray, np.random.Generator, random.Random],
        file: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """A row, its undecoded image given if it was read already."""
        epoch, image_id = key
        index = _index_of(image_id)
        chosen, rng, draws = draw
        row: dict[str, Any] = {"image_id": image_id, "captions": [self.captions[index][i] for i in chosen]}
        if self.vision_features is not None:
            features = self.vision_features[epoch % len(self.vision_features)][index]  # [width]
            image: Any = self._image(index, file) if math.isnan(features[0]) else None
            row["vision_features"] = features
        else:
            image = self._image(index, file)
            if not isinstance(image, str):
                row["pixels"] = self._pixels(image, index, rng, draws)  # [3, H, W] uint8
        if isinstance(image, str):
            return {"image_id": image_id, "undecodable": image}
        if self.text_features is not None:
            row["text_features"] = self.text_features[index][torch.from_numpy(chosen)]  # [K, width]
        return row

    def _filler(self, epoch: int, image_id: int) -> dict[str, Any]:
        start = _index_of(image_id)
        keys = ((epoch, FILLER - (start + i) % len(self)) for i in range(1, len(self)))
        rows = (self._row(key, self._draw(key), None) for key in keys)
        found = next((row for row in rows if "undecodable" not in row), None)
        if found is None:
            raise DataError(
                f"none of {len(self)} images can be decoded, among them {self.image_ids[start]!r}; replace the files"
            )
        return found

    def undecoded_images(self) -> Iterator[dict[str, Any]]:
        """`{"bytes", "path"}` of each row's image file."""
        yield from (row["image"] for row in self.undecoded)

    def _image(self, index: int, file: dict[str, Any] | None) -> Any:
        """The image of a row as RGB, or why it cannot be decoded."""
        name = f"image {self.image_ids[index]!r}"
        try:
            return to_rgb(self.decode(self.undecoded[index]["image"] if file is None else file))
        except MemoryError:  # says nothing of the image
            raise
        except Exception as error:  # Pillow's decoders raise all sorts
            if getattr(error, "errno", None) is not None:  # nor does a disk that is gone
                raise DataError(f"{name} cannot be read: {error}; mend that, then resume the run") from error
            return f"{name} cannot be decoded: {error}; replace the file or delete its rows"

    def _pixels(self, image: Any, index: int, rng: np.random.Generator, draws: random.Random) -> np.ndarray:
        if self.augmentation is None:
            return self.processor.crop(image)
        for transform in self.augmentation.transforms:  # one after the other from the same source, so none alike
            transform.set_random_state(rng, draws)
        try:
            return self.augmentation(image=np.array(image))["image"].transpose(2, 0, 1)
        except Exception as error:  # a crop larger than the image, for instance
            raise DataError(
                f"image {self.image_ids[index]!r} of {image.width}x{image.height} pixels: the augmentation failed: "
                f"{error}; change --augmentation"
            ) from error


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
def explained_workers() -> Iterator[None]:
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
