"""Keys that an image and a text share if they belong together: an equal caption, the same group, the same bytes."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..tables.assign_splits import group_numbers
from ..tables.image_copies import MOST_READ, find_copies
from ..tables.row_blocks import Captions

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

NO_KEY = -1  # fills rows that have fewer keys than others; it equals no key
LOOKED_AT = 50_000  # images of a large split in which equal captions, groups and copies of images are counted


def same_text(caption: str) -> str:
    """A caption without what makes no difference: case, white space, and a full stop at the end."""
    return " ".join(caption.casefold().split()).rstrip(" .")


def pair_key(kind: str, value: str | bytes) -> int:
    """A number that only equal values of one kind have, from 2^62 to 2^63 - 1, which no id of an image is."""
    data = value.encode() if isinstance(value, str) else value
    digest = hashlib.blake2b(data, digest_size=8, person=kind.encode()).digest()
    return int.from_bytes(digest, "little") >> 2 | 1 << 62


def mark_of(content: bytes) -> str:
    """What equal images of a batch have in common: their length and CRC-32, in a quarter of the time of a hash."""
    return f"{len(content)} {zlib.crc32(content)}"


class RowKeys(NamedTuple):
    """The keys of an image, and those of each of its texts.

    Args:
        image: keys of the image.
        texts: keys of each text, the captions first, then the wrong captions.
    """

    image: list[int]
    texts: list[list[int]]


def keys_of_row(
    captions: Sequence[str],
    chosen: Iterable[int],
    negatives: Sequence[str] = (),
    group: str | None = None,
    content: str | bytes | None = None,
) -> RowKeys:
    """The keys of a row.

    Args:
        captions: all captions of the image.
        chosen: which of them are texts of this batch.
        negatives: wrong captions: they only have the key of their text, by which they may be right for other images.
        group: group of the image, if it has one.
        content: what only equal images have in common, such as [`mark_of`] the encoded image; None if that is unknown.
    """
    shared = [pair_key("group", group)] if group else []
    if content is not None:
        shared.append(pair_key("image", content))
    own = [pair_key("caption", same_text(caption)) for caption in captions]
    wrong = [[pair_key("caption", same_text(caption))] for caption in negatives]
    return RowKeys([*shared, *dict.fromkeys(own)], [[*shared, own[i]] for i in chosen] + wrong)


def keys_tensor(rows: Sequence[Sequence[int]]) -> "Tensor":
    """`[rows, K]` int64, shorter rows filled with [`NO_KEY`]."""
    import torch  # which `miniclip check` does without

    keys = np.full((len(rows), max(map(len, rows), default=0)), NO_KEY, np.int64)
    for row, values in zip(keys, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(keys)


# --- how many there are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedCaptions:
    """Captions that also belong to other images than their own.

    Args:
        images, captions: number of images and captions that were looked at.
        shared: number of these captions that belong to another image too.
        by_caption, by_group, by_copy: pairs of a caption with another image, because that has an equal caption, is of
            the same group, or is the same image under another name.
        is_sample: whether there are more images.
        copies: for each row whose image occurs more than once, the first row with that image; None if that is unknown.
    """

    images: int
    captions: int
    shared: int
    by_caption: int
    by_group: int
    by_copy: int
    is_sample: bool
    copies: Mapping[int, int] | None

    @property
    def may_occur(self) -> bool:
        """Whether captions belong to several images, or may do so, as not all has been looked at."""
        return self.shared > 0 or self.is_sample or self.copies is None

    def describe(self, batch_size: int, captions_per_image: int | None) -> str | None:
        """One line for the log and the model card; None if there is nothing to say.

        Args:
            batch_size: images of a step.
            captions_per_image: captions of each that are drawn; None for all.
        """
        if not self.shared:
            return None
        images = min(batch_size, self.images)
        drawn = min(1.0, (captions_per_image or self.captions) * self.images / self.captions)
        share = images * (images - 1) / (self.images * max(1, self.images - 1)) * drawn
        reasons = [f"{number} by {what}" for number, what in (
            (self.by_caption, "equal captions"), (self.by_group, "groups"), (self.by_copy, "equal images"),
        ) if number]  # fmt: skip
        looked_at = f" of {self.images} images that were looked at" if self.is_sample else ""
        return (
            f"{self.shared} of {self.captions} training captions{looked_at} belong to other images, too "
            f"({', '.join(reasons)}): these are pairs, not negatives, about "
            f"{(self.by_caption + self.by_group + self.by_copy) * share:.3g} in a batch of {images}"
        )


def count_shared(
    rows: "Dataset", most: int = LOOKED_AT, most_read: int = MOST_READ, cache_dir: Path | None = None
) -> SharedCaptions:
    """Count the captions of a split that also belong to other images.

    Args:
        rows: rows with `image`, `image_id`, `captions`, and `group` if there are groups.
        most: most images to look at.
        most_read, cache_dir: as for [`find_copies`], which opens images.
    """
    looked_at = rows if len(rows) <= most else rows.select(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    texts: list[int] = []
    counts: list[int] = []
    for captions in Captions(looked_at):
        texts += (hash(same_text(caption)) for caption in captions)
        counts.append(len(captions))
    copies = find_copies(rows, most_read, cache_dir) if len(looked_at) == len(rows) else None
    image = np.repeat(np.arange(len(counts)), counts)
    text = np.unique(np.array(texts, np.int64), return_inverse=True)[1]
    group = of_copy = np.arange(len(counts))
    if "group" in rows.column_names:
        group = np.unique(group_numbers(looked_at), return_inverse=True)[1]
    if copies:
        of_copy = np.array([copies.get(i, i) for i in range(len(counts))], np.int64)
    by_caption, by_group, by_copy = (_other_images(key, image) for key in (text, group[image], of_copy[image]))
    shared = int((by_caption + by_group + by_copy > 0).sum())
    pairs = int(by_caption.sum()), int(by_group.sum()), int(by_copy.sum())
    return SharedCaptions(len(counts), len(text), shared, *pairs, len(looked_at) < len(rows), copies)


def _other_images(key: np.ndarray, image: np.ndarray) -> np.ndarray:
    """For each text, the number of images other than its own with a text of the same key; keys count from 0."""
    keys_of_images = np.unique(np.stack([key, image]), axis=1)[0]
    return np.bincount(keys_of_images, minlength=int(key.max(initial=-1)) + 1)[key] - 1
