"""Decode images once and find copies of the same picture."""

import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import MiniClipError

FULL_PART = 100  # images with an equal part of their hash, as flat pictures have: the search stays linear


class ImageInspection(NamedTuple):
    """What decoding an image gives: a kind of problem and what it is, or hashes of its bytes and of its pixels."""

    kind: str | None = None
    told: str = ""
    of_bytes: bytes = b""
    of_gradients: bytes = b""  # 64 bits, the same for a copy of another size or compression
    thumbnail: bytes = b""  # 8x8 RGB


def inspect_images(contents: list[str | bytes], num_workers: int) -> Iterator[ImageInspection]:
    """Decode images, in their order, by so many processes.

    Raises:
        MiniClipError: a process died.
    """
    if num_workers < 1 or len(contents) < 2:
        yield from map(inspect_image, contents)
        return
    try:
        with ProcessPoolExecutor(num_workers) as pool:
            yield from pool.map(inspect_image, contents, chunksize=32)
    except BrokenProcessPool as error:
        raise MiniClipError(
            "a process that decodes images died, likely for lack of memory or because an image crashed a decoder: "
            "--num_workers 0 tells which, --quick does without decoding"
        ) from error


def inspect_image(content: str | bytes) -> ImageInspection:
    """Decode one image."""
    from PIL import Image

    from ..processing_miniclip import to_rgb

    try:
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is told below, before it is decoded
            with Image.open(io.BytesIO(data)) as opened:
                width, height = opened.size
                if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
                    return ImageInspection(
                        "huge", f"has {width}x{height} pixels; scale it down, it may be a decompression bomb"
                    )
                image = to_rgb(opened)
    except Image.DecompressionBombError:
        return ImageInspection("huge", "has more pixels than can be decoded safely; scale it down")
    except Exception as error:  # Pillow's decoders raise all sorts
        return ImageInspection("undecodable", f"cannot be decoded: {error}; replace the file or delete its rows")
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    gradients = np.packbits(small[:, 1:] > small[:, :-1]).tobytes()
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return ImageInspection(None, "", hashlib.blake2b(data, digest_size=16).digest(), gradients, thumbnail)


def same_images(inspections: Mapping[str, ImageInspection]) -> list[tuple[str, str, bool]]:
    """Images that look like an earlier one: the name of both, and whether the files are equal byte for byte.

    Found by equal bytes, or by a "difference hash" (8x8 signs of brightness gradients) of which one of four parts is
    equal, and 8x8 colours that hardly differ. For photographs compressed anew at quality 50, halved or doubled, 95 %
    differ in 3 of the 64 signs at most, and colours by 5 of 255 at most; two different ones by 14 and 66 at least.
    """
    by_bytes: dict[bytes, str] = {}
    by_part: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    found = []
    for name, one in inspections.items():
        if one.kind is not None:
            continue
        first = by_bytes.setdefault(one.of_bytes, name)
        if first != name:
            found.append((name, first, True))
            continue
        parts = [by_part[i, one.of_gradients[i : i + 2]] for i in range(0, 8, 2)]
        near = next((other for part in parts for other in part if _alike(one, inspections[other])), None)
        if near is not None:
            found.append((name, near, False))
            continue
        for part in parts:
            if len(part) < FULL_PART:
                part.append(name)
    return found


def _alike(one: ImageInspection, other: ImageInspection) -> bool:
    colours, others = (np.frombuffer(inspection.thumbnail, np.uint8).astype(int) for inspection in (one, other))
    signs = int.from_bytes(one.of_gradients, "big") ^ int.from_bytes(other.of_gradients, "big")
    return signs.bit_count() <= 8 and int(np.abs(colours - others).max()) <= 12
