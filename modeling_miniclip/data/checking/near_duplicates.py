"""Decode every image once, to see whether it can be used and which images are copies of each other."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...errors import MiniClipError
from ...pictures_miniclip import exif_orientation, to_rgb
from ...utils.processes import follow_parent
from ..picture_formats import UnreadableFormat, decode_picture, read_encoded

LARGEST_BUCKET = 100  # images that share a part of their hash and are compared; flat images share one with many others
MOST_SIGNS = 8  # of 64: gradient signs that may differ between copies
MOST_COLOUR = 12  # of 255: difference allowed between the colours of two copies' thumbnails


class ImageInspection(NamedTuple):
    """What decoding an image shows: a problem, or hashes of its bytes and of its pixels.

    Args:
        kind: kind of the problem, None for an image that can be used.
        message: what is wrong with the image, as the end of a sentence.
        hash_of_bytes: hash of the file's content, 16 bytes.
        gradients: signs of the brightness gradients, 64 bits, hardly changed by resizing and compression.
        thumbnail: the image as 8x8 RGB pixels, 192 bytes.
        metadata_is_readable: whether its EXIF data can be read.
    """

    kind: str | None = None
    message: str = ""
    hash_of_bytes: bytes = b""
    gradients: bytes = b""
    thumbnail: bytes = b""
    metadata_is_readable: bool = True


def inspect_images(contents: list[str | bytes], num_workers: int) -> Iterator[ImageInspection]:
    """Decode images, in their order.

    Args:
        contents: paths of image files, names of images in shards, or encoded images.
        num_workers: number of processes; 0 decodes in this one.

    Raises:
        MiniClipError: a process died.
    """
    if num_workers < 1 or len(contents) < 2:
        yield from map(inspect_image, contents)
        return
    try:
        with ProcessPoolExecutor(num_workers, initializer=follow_parent) as pool:
            yield from pool.map(inspect_image, contents, chunksize=32)
    except BrokenProcessPool as error:
        raise MiniClipError(
            "a process that decodes images died, probably because it ran out of memory or an image crashed a decoder: "
            "--num_workers 0 shows which, --quick checks without decoding"
        ) from error


def inspect_image(content: str | bytes) -> ImageInspection:
    """Decode one image, given as the path of its file, its name in a shard, or its encoded bytes."""

    def check_size(opened: Image.Image) -> None:
        if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or opened.width * opened.height):
            raise Image.DecompressionBombError(f"has {opened.width}x{opened.height} pixels")

    try:
        data = content if isinstance(content, bytes) else read_encoded({"path": content})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decompression bombs are reported below, before they are decoded
            opened = decode_picture(data, check_size)
            readable = exif_orientation(opened) is not None
            image = to_rgb(opened)
    except Image.DecompressionBombError as error:
        size = str(error) if str(error).startswith("has ") else "has more pixels than can be decoded safely"
        return ImageInspection("huge", f"{size}; scale it down, it may be a decompression bomb")
    except UnreadableFormat as error:
        return ImageInspection("format", f"is {error}")
    except Exception as error:  # Pillow's decoders raise errors of many classes
        if getattr(error, "errno", None) is not None:
            return ImageInspection("unreadable", f"cannot be read: {error}; check its permissions and its disk")
        return ImageInspection("undecodable", f"cannot be decoded: {error}; replace the file or delete its rows")
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)  # [8, 9]
    gradients = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    hash_of_bytes = hashlib.blake2b(data, digest_size=16).digest()
    return ImageInspection(None, "", hash_of_bytes, gradients, thumbnail, readable)


def find_image_copies(inspections: Mapping[str, ImageInspection]) -> list[tuple[str, str, bool]]:
    """Images that look like an earlier one.

    Copies have equal bytes, or a "difference hash" (8x8 signs of brightness gradients) with at least one of its four
    parts equal and 8x8 colours that hardly differ. Among photographs compressed again at quality 50, halved or
    doubled, 95 % differ in at most 3 of the 64 signs, and their colours by at most 5 of 255; two different photographs
    differ by at least 14 and 66.

    Args:
        inspections: results of [`inspect_image`] by image name; images that cannot be used are skipped.

    Returns:
        For each copy its name, the name of the first such image, and whether their files are identical.
    """
    by_bytes: dict[bytes, str] = {}
    by_part: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    copies = []
    for name, inspection in inspections.items():
        if inspection.kind is not None:
            continue
        first = by_bytes.setdefault(inspection.hash_of_bytes, name)
        if first != name:
            copies.append((name, first, True))
            continue
        buckets = [by_part[i, inspection.gradients[i : i + 2]] for i in range(0, 8, 2)]
        candidates = (other for bucket in buckets for other in bucket)
        similar = next((other for other in candidates if _look_alike(inspection, inspections[other])), None)
        if similar is not None:
            copies.append((name, similar, False))
            continue
        for bucket in buckets:
            if len(bucket) < LARGEST_BUCKET:
                bucket.append(name)
    return copies


def _look_alike(one: ImageInspection, other: ImageInspection) -> bool:
    signs = int.from_bytes(one.gradients, "big") ^ int.from_bytes(other.gradients, "big")
    colours, others = (np.frombuffer(image.thumbnail, np.uint8).astype(int) for image in (one, other))  # [192]
    return signs.bit_count() <= MOST_SIGNS and int(np.abs(colours - others).max()) <= MOST_COLOUR
