"""The rows of a split as a torch dataset: drawn captions with augmented pixels or cached features.

All draws depend only on the seed, the epoch and the row, never on the process, the worker or the batch.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ...errors import DataError, MiniClipError
from ...processing_miniclip import MiniClipProcessor
from ..columns import NEGATIVES
from ..picture_formats import decode_row, read_encoded
from .augmentation import pixels_of
from .hard_negatives import HardNegatives
from .pair_keys import keys_of_row, mark_of
from .reduced_size import reduction_before

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

# A filler, which only keeps a process busy, is row i under the image id FILLER - i, which is negative.
FILLER = -1

READ_TOGETHER = 32  # encoded images that a loader process reads at a time, if they are in the table itself

# The random draws for a row: the captions chosen, and two generators for its augmentation.
Draw = tuple[np.ndarray, np.random.Generator, random.Random]


class Rows(Protocol):
    """A tensor for each row."""

    def __getitem__(self, row: int, /) -> Tensor: ...

    def __len__(self) -> int: ...


class TaughtRows(NamedTuple):
    """What a teacher's towers return for the rows of a split.

    Args:
        images: `[width]` of each image; NaN for one that could not be decoded.
        texts: `[captions, width]` of the captions of each image.
    """

    images: Rows
    texts: Rows


def _index_of(image_id: int) -> int:
    return image_id if image_id >= 0 else FILLER - image_id


class CaptionRows(TorchDataset):
    """Rows of a split, ready to be collated; each item has a key `(epoch, index)`.

    A list of items may contain images that cannot be decoded: see `__getitems__`. Nothing of the split is held in
    memory: images, names and captions are read when they are needed, so loader processes share a memory-mapped table.

    Args:
        split: rows `{image, image_id, captions}`.
        processor: processor that resizes and crops an image without augmentation.
        augmentation: transforms of [`build_augmentation`], or None.
        captions_per_image: number of captions to draw per image and epoch; None takes all of them.
        seed: random seed of the draws and of the augmentation.
        vision_features: pooled features `[n, width]` of the frozen image tower, used instead of the images: those of
            each view; the epochs take the views in turn. NaN marks an image that could not be decoded.
        text_features: features `[captions, width]` of the frozen text tower for each image, used instead of the texts.
        hard_negatives: wrong captions to add to each row, as `negatives`; only without `text_features`.
        finds_pairs: whether to add to each row the `keys` that it shares with captions and images of other rows.
        copies: the first row of each image that occurs more than once, by row; None compares the images as they are
            read, but not those of `vision_features`.
        full_size: whether to decode images at full size, even if the augmentation would shrink them.
        taught: features of a teacher, to add to each row as `taught_image` and `taught_texts`.
    """

    def __init__(
        self,
        split: "Dataset",
        processor: MiniClipProcessor,
        augmentation: Any = None,
        captions_per_image: int | None = None,
        seed: int = 0,
        vision_features: Sequence[Rows] | None = None,
        text_features: Rows | None = None,
        hard_negatives: HardNegatives | None = None,
        finds_pairs: bool = False,
        copies: Mapping[int, int] | None = None,
        full_size: bool = False,
        taught: TaughtRows | None = None,
    ):
        from datasets import Image

        self.undecoded = split.select_columns(["image", "image_id"]).cast_column("image", Image(decode=False))
        self.texts = split.select_columns(["captions"])
        self.processor = processor
        self.augmentation = augmentation
        self.reduction = None if full_size else reduction_before(augmentation)
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.vision_features = vision_features
        self.text_features = text_features
        self.hard_negatives = hard_negatives
        self.finds_pairs, self.copies = finds_pairs, copies
        self.taught = taught
        self.groups = split.select_columns(["group"]) if finds_pairs and "group" in split.column_names else None
        has_negatives = hard_negatives is not None and hard_negatives.from_column
        self.negatives = split.select_columns([NEGATIVES]) if has_negatives else None

    def __len__(self) -> int:
        return len(self.undecoded)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row = self._row_alone(key)
        if "undecodable" in row:
            raise DataError(row["undecodable"])
        return row

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """The rows of a batch, which the DataLoader requests together.

        A row whose image cannot be decoded is `{"image_id", "undecodable": reason}`. If no image of the batch can be
        decoded, another row of the split is added as a filler.

        Raises:
            DataError: no image of the split can be decoded, or a file cannot be read.
        """
        captions = self._captions(keys)
        # Drawing between images would take several times as long.
        draws = [self._draw(key, len(texts)) for key, texts in zip(keys, captions, strict=True)]
        rows = [self._row(*row) for row in zip(keys, captions, draws, self._files(keys), strict=True)]
        if self.finds_pairs:
            self._add_keys(rows, keys, captions, draws)
        if all("undecodable" in row for row in rows):
            rows.append(self._filler(*keys[0]))
        return rows

    @property
    def bytes_per_image(self) -> int:
        """Bytes of the pixels of an image as they are loaded; 0 if its features are loaded instead."""
        if self.vision_features is not None:
            return 0
        if self.augmentation is None:
            crop = self.processor.image_processor.crop_size
            return 3 * int(crop["height"]) * int(crop["width"])
        resize = self.augmentation.transforms[-1]  # see `build_augmentation`
        return 3 * int(resize.height) * int(resize.width)

    def captions_of(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of some rows."""
        return self.texts[list(indices)]["captions"]

    def name(self, index: int) -> str:
        """The `image_id` of a row."""
        return self.undecoded[index]["image_id"]

    def _captions(self, keys: list[tuple[int, int]]) -> Sequence[Sized]:
        """The captions of some rows; with features of texts these instead, as nobody needs the words then."""
        indices = [_index_of(image_id) for _, image_id in keys]
        if self.text_features is not None:
            return [self.text_features[index] for index in indices]
        return self.captions_of(indices)

    def _draw(self, key: tuple[int, int], available: int) -> Draw:
        """The random draws for a row with a number of captions."""
        rng = np.random.default_rng([self.seed, key[0], _index_of(key[1])])
        if self.captions_per_image is None or self.captions_per_image >= available:
            chosen = np.arange(available)
        else:
            chosen = rng.choice(available, size=self.captions_per_image, replace=False)
        return chosen, rng, random.Random(int(rng.integers(2**63)))

    def _files(self, keys: list[tuple[int, int]]) -> Iterator[dict[str, Any] | None]:
        # `datasets` reads many rows in the time that it needs for one.
        for start in range(0, len(keys), READ_TOGETHER):
            indices = [_index_of(image_id) for _, image_id in keys[start : start + READ_TOGETHER]]
            if self.vision_features is not None:
                yield from [None] * len(indices)
            else:
                files = self.undecoded[indices]
                for image, name in zip(files["image"], files["image_id"], strict=True):
                    yield {"image": image, "image_id": name}

    def _row_alone(self, key: tuple[int, int]) -> dict[str, Any]:
        (captions,) = self._captions([key])
        draw = self._draw(key, len(captions))
        row = self._row(key, captions, draw, None)
        if self.finds_pairs:
            self._add_keys([row], [key], [captions], [draw])
        return row

    def _add_keys(
        self, rows: list[dict[str, Any]], keys: list[tuple[int, int]], captions: Sequence[Any], draws: list[Draw]
    ) -> None:
        """Add what decides to which texts each image belongs, from the mark of its content where it was read."""
        indices = [_index_of(image_id) for _, image_id in keys]
        words = captions if self.text_features is None else self.captions_of(indices)
        groups = [None] * len(indices) if self.groups is None else self.groups[indices]["group"]
        for index, row, several, draw, group in zip(indices, rows, words, draws, groups, strict=True):
            content = row.pop("content", None)
            if self.copies is not None and index in self.copies:
                content = str(self.copies[index])
            row["keys"] = keys_of_row(several, draw[0], row.get("negatives", ()), group, content)

    def _row(self, key: tuple[int, int], captions: Any, draw: Draw, file: dict[str, Any] | None) -> dict[str, Any]:
        """One row.

        Args:
            key: epoch and image id.
            captions: all captions of the row, or their features.
            draw: random draws for the row.
            file: `{image, image_id}`, if that has been read already.
        """
        epoch, image_id = key
        index = _index_of(image_id)
        chosen, rng, augmentation_rng = draw
        row: dict[str, Any] = {"image_id": image_id}
        if self.vision_features is not None:
            row["vision_features"] = self.vision_features[epoch % len(self.vision_features)][index]  # [width]
            undecodable = self._why_missing(row["vision_features"], index, file)
        else:
            if self.finds_pairs and self.copies is None:
                file = self._with_content(index, file)
                content = file["image"]["bytes"]
                row["content"] = None if content is None else mark_of(content)
            image = self._image(index, file)
            undecodable = image if isinstance(image, str) else None
            if not isinstance(image, str):
                row["pixels"] = self._pixels(image, index, rng, augmentation_rng)  # [3, H, W] uint8
        if self.taught is not None and undecodable is None:
            row["taught_image"] = self.taught.images[index]  # [width]
            row["taught_texts"] = self.taught.texts[index][torch.from_numpy(chosen)]  # [K, width]
            undecodable = self._why_missing(row["taught_image"], index, file)
        if undecodable is not None:
            return {"image_id": image_id, "undecodable": undecodable}
        if self.text_features is not None:
            row["text_features"] = captions[torch.from_numpy(chosen)]  # [K, width]
        else:
            row["captions"] = [captions[i] for i in chosen]
            if self.hard_negatives is not None:
                # None: of several datasets, that of this image has no such column.
                negatives = self.negatives[index][NEGATIVES] or [] if self.negatives is not None else []
                row["negatives"] = self.hard_negatives.draw(captions, negatives, chosen.tolist(), epoch, index)
        return row

    def _why_missing(self, features: Tensor, index: int, file: dict[str, Any] | None) -> str | None:
        """Why stored features `[width]` of an image are missing; None if they are there."""
        if not math.isnan(features[0]):
            return None
        image = self._image(index, file)
        if isinstance(image, str):
            return image
        return (
            f"image {self.name(index)!r} has no features, as it could not be decoded when they were computed; it can "
            "be now: name another --feature_cache_dir"
        )

    def _with_content(self, index: int, file: dict[str, Any] | None) -> dict[str, Any]:
        """The file of a row with its bytes; as it is if they cannot be read, which [`_image`] reports."""
        file = file or self.undecoded[index]
        try:
            return file | {"image": file["image"] | {"bytes": read_encoded(file["image"])}}
        except (OSError, MiniClipError):
            return file

    def _image(self, index: int, file: dict[str, Any] | None) -> "Image.Image | str":
        """The image of a row as RGB, or the reason why it cannot be decoded."""
        file = file or self.undecoded[index]
        try:
            return decode_row(file["image"], file["image_id"], self.reduction)
        except MemoryError:  # not the image's fault
            raise
        except Exception as error:  # Pillow's decoders raise errors of many classes
            if isinstance(error, MiniClipError) and not (isinstance(error, DataError) and error.problem is None):
                raise  # a shard cannot be fetched or stored
            name = f"image {file['image_id']!r}"
            if getattr(error, "errno", None) is not None:  # a disk failed, which is not the image's fault either
                raise DataError(f"{name} cannot be read: {error}; fix that, then resume the run") from error
            return f"{name} cannot be decoded: {error}; replace the file or delete its rows"

    def _pixels(
        self, image: "Image.Image", index: int, rng: np.random.Generator, augmentation_rng: random.Random
    ) -> np.ndarray:
        if self.augmentation is None:
            return self.processor.crop(image)
        for transform in self.augmentation.transforms:  # one shared generator, so that no two draw the same numbers
            transform.set_random_state(rng, augmentation_rng)
        try:
            return self.augmentation(image=pixels_of(image))["image"].transpose(2, 0, 1)
        except Exception as error:  # for instance a crop that is larger than the image
            raise DataError(
                f"image {self.name(index)!r} of {image.width}x{image.height} pixels: the augmentation failed: "
                f"{error}; change --augmentation"
            ) from error

    def _filler(self, epoch: int, image_id: int) -> dict[str, Any]:
        """The next row that can be decoded, under the image id of a filler."""
        start = _index_of(image_id)
        keys = ((epoch, FILLER - (start + i) % len(self)) for i in range(1, len(self)))
        reason = f"image {self.name(start)!r}"
        for row in map(self._row_alone, keys):
            if "undecodable" not in row:
                return row
            reason = row["undecodable"]
        raise DataError(
            f"none of {len(self)} images can be decoded, the last one: {reason}; `miniclip check` lists them all"
        )
