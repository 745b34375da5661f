"""Which rows of a split show one image under several names: those whose images are the same byte for byte."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ...errors import DataError
from ...utils.files import shared_file
from ..picture_formats import read_encoded
from .image_places import image_places, is_table, sizes_of, state_of_images
from .same_images import SameImages

if TYPE_CHECKING:
    from datasets import Dataset

MOST_READ = 2_000  # images of the same size that are read to compare them


def find_copies(rows: "Dataset", most_read: int = MOST_READ, cache_dir: Path | None = None) -> dict[int, int] | None:
    """The copies among the images of a split. Opens only images that have as many bytes as another one.

    Args:
        rows: rows with `image` and `image_id`.
        most_read: most images to open.
        cache_dir: folder in which the result is kept until one of these images changes.

    Returns:
        For each row whose image occurs more than once, the first row with that image; None if only reading more images
        would tell, as for images in a column of a Parquet file, in a shard elsewhere, or for very many.
    """
    parts = [np.zeros(0, np.int64)]
    for places in image_places(rows):
        if pc.any(is_table(places)).as_py() or pc.any(pc.match_substring(places.shards, "://")).as_py():
            return None
        parts.append(sizes_of(places, {}))
    sizes = np.concatenate(parts)
    _, number, count = np.unique(sizes, return_inverse=True, return_counts=True)
    alike = np.flatnonzero((count[number] > 1) & (sizes > 0))
    if len(alike) > most_read:
        return None
    if not len(alike):
        return {}
    first = first_of_each(rows.select(alike), sizes[alike], cache_dir)
    copies = {int(alike[i]): int(alike[k]) for i, k in enumerate(first) if k >= 0}
    counts = Counter(copies.values())
    return {row: one for row, one in copies.items() if counts[one] > 1}


def first_of_each(rows: "Dataset", sizes: np.ndarray, cache_dir: Path | None) -> np.ndarray:
    """`[rows]` int64, the first row with the same image; -1 for an image that cannot be read.

    Args:
        rows: rows of images.
        sizes: `[rows]` int64, bytes of each.
        cache_dir: folder in which the result is kept.
    """
    state, is_settled = ("", False) if cache_dir is None else state_of_images(rows)
    place = None if cache_dir is None else cache_dir / f"copies-{state}.npy"
    if place is not None:
        with suppress(OSError, ValueError):
            known: np.ndarray = np.load(place)
            if known.shape == sizes.shape and known.dtype == np.int64:
                return known
    from datasets import Image

    encoded = rows.select_columns(["image"]).cast_column("image", Image(decode=False))

    def content(row: int) -> bytes | None:
        try:
            return read_encoded(encoded[row]["image"])
        except (OSError, ValueError, DataError):  # reported where it is decoded; ValueError: a null byte in its name
            return None

    same = SameImages(sizes, np.ones(len(sizes), bool), np.zeros(len(sizes), np.int64), content)
    first, seen = np.full(len(sizes), -1, np.int64), dict[int, int]()
    for row, digest in zip(same.rows.tolist(), same.digests.tolist(), strict=True):
        first[row] = seen.setdefault(digest, row)
    if place is not None and is_settled and (first >= 0).all():
        with suppress(OSError), shared_file(place) as fresh, fresh.open("wb") as file:
            np.save(file, first)
    return first
