"""JPEGs decoded at reduced size: images per second of several decoders, and how the training images differ.

    python benchmarks/jpeg.py FLICKR8K --model EXPORT > benchmarks/jpeg.md

The photographs of 12 megapixels are mosaics of 192 photographs of Flickr8k at about their own size, so that their
finest details are those of cameras. Each row of the first tables is one thread that decodes, converts to RGB and
augments an image for a side of 224 pixels, by the default augmentation; for each image, the decoders take turns in
random order. "Reduced" is the scale that `reduction_before` allows: the smallest of 1, 1/2, 1/4 and 1/8 at which no
crop is smaller than 224 pixels; with a margin, no crop is smaller than that many times 224 pixels.

Differences are between images after the augmentation, with the same random draws, on a scale of 255: from full
decoding as it is, where OpenCV samples the crop at the pixels of the result and leaves out most others, and from full
decoding whose crop is averaged.

The last table is the whole loader with two processes, with images decoded in full and reduced, in turns. It needs an
export, whose processor it uses. simplejpeg is compared if it is installed.
"""

import argparse
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from modeling_miniclip import load_captions
from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION, build_augmentation, pixels_of
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.loader import BatchLoader
from modeling_miniclip.data.loading.reduced_size import reduction_before
from modeling_miniclip.data.picture_formats import decode_row
from modeling_miniclip.inference.loading import load_tower

SIDE = 224
COLUMNS, ROWS, TILE = 16, 12, 250  # photographs of a mosaic, and the side of each in pixels
FACTORS = (8, 4, 2, 1)
OPENCV = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
          8: cv2.IMREAD_REDUCED_COLOR_8}  # fmt: skip
HEAD = """# JPEGs decoded at reduced size

Written by `benchmarks/jpeg.py`, whose first lines explain the tables, with {cores} cores.
"""
TABLE = """| decoder | size | scale | decoded/s | augmented/s | from full: mean (99 %) | from average: mean (99 %) |
|---|---|---|---|---|---|---|"""

Decode = Callable[[bytes, int], np.ndarray]  # from a file and a factor to pixels [H, W, 3]


# --- photographs ----------------------------------------------------------------------------------------------------


def write_mosaics(photographs: Sequence[Path], folder: Path, count: int) -> list[bytes]:
    """Files of mosaics of 4,000 x 3,000 pixels; also written to `folder` with a caption file."""
    rng, contents = random.Random(0), []
    lines = ["image,caption"]
    for number in range(count):
        whole = Image.new("RGB", (COLUMNS * TILE, ROWS * TILE))
        for place in range(COLUMNS * ROWS):
            with Image.open(rng.choice(photographs)) as opened:
                tile = ImageOps.fit(opened.convert("RGB"), (TILE, TILE))
            whole.paste(tile, (place % COLUMNS * TILE, place // COLUMNS * TILE))
        content = io.BytesIO()
        whole.save(content, "JPEG", quality=90)
        contents.append(content.getvalue())
        (folder / f"{number}.jpg").write_bytes(contents[-1])
        lines.append(f"{number}.jpg,a mosaic with the number {number}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return contents


# --- decoders -------------------------------------------------------------------------------------------------------


def pillow(content: bytes, factor: int) -> np.ndarray:
    """As the loader does it."""
    return pixels_of(decode_row({"bytes": content, "path": None}, reduction=lambda width, height: float(factor)))


def opencv(content: bytes, factor: int) -> np.ndarray:
    """OpenCV's own libjpeg-turbo; without EXIF, which would have to be read separately."""
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), OPENCV[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def torchvision_full(content: bytes, factor: int) -> np.ndarray:
    """torchvision cannot reduce."""
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()


def simplejpeg_reduced(content: bytes, factor: int) -> np.ndarray:
    """libjpeg-turbo through simplejpeg."""
    simplejpeg: Any = import_module("simplejpeg")

    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    least = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
    return simplejpeg.decode_jpeg(content, "RGB", **least)


def decoders() -> dict[str, tuple[Decode, bool]]:
    """The decoders that are installed, and whether each can reduce."""
    found: dict[str, tuple[Decode, bool]] = {
        f"Pillow {PIL.__version__}": (pillow, True),
        f"OpenCV {cv2.__version__}": (opencv, True),
        "torchvision": (torchvision_full, False),
    }
    if find_spec("simplejpeg") is not None:
        found["simplejpeg"] = simplejpeg_reduced, True
    return found


# --- measurements ---------------------------------------------------------------------------------------------------


def factor_of(content: bytes, margin: float) -> int:
    """The factor by which the loader may reduce a file, with a margin."""
    reduction = reduction_before(AUGMENTATION)
    assert reduction is not None
    with Image.open(io.BytesIO(content)) as opened:
        times = reduction(*opened.size) / margin
    return next(factor for factor in FACTORS if factor <= max(1.0, times))


def augmented(pixels: np.ndarray, seed: int, augmentation: Any) -> np.ndarray:
    """An image as the loader augments it; equal seeds draw the same."""
    rng, python = np.random.default_rng(seed), random.Random(seed)
    for transform in augmentation.transforms:
        transform.set_random_state(rng, python)
    return augmentation(image=pixels)["image"]


def build(more: dict[str, Any]) -> Any:
    """The default augmentation, with further arguments of the random crop."""
    crop, *others = DEFAULT_AUGMENTATION
    return build_augmentation([crop | more, *others], (SIDE, SIDE))


AUGMENTATION, AVERAGED = build({}), build({"area_for_downscale": "image"})


def compare(contents: Sequence[bytes], rounds: int) -> list[str]:
    """Lines of the table of decoders."""
    sides: dict[tuple[str, str], tuple[Decode, float | None]] = {}
    for name, (decode, can_reduce) in decoders().items():
        sides[name, "full"] = decode, None
        for least in (1.0, 1.5, 2.0) if can_reduce else ():
            sides[name, "reduced" if least == 1 else f"reduced, margin {least:g}"] = decode, least
    seconds: dict[tuple[str, str], list[list[float]]] = {side: [[], []] for side in sides}
    order, rng = list(sides.items()), random.Random(2)
    for _ in range(rounds):
        for number, content in enumerate(contents):
            rng.shuffle(order)  # the first decoder finds neither the file nor its own code in the processor's cache
            for side, (decode, margin) in order:
                factor = 1 if margin is None else factor_of(content, margin)
                start = time.perf_counter()
                pixels = decode(content, factor)
                middle = time.perf_counter()
                augmented(pixels, number, AUGMENTATION)
                seconds[side][0].append(middle - start)
                seconds[side][1].append(time.perf_counter() - start)
    lines, references = [], [as_in_full(content, number) for number, content in enumerate(contents)]
    for (name, kind), (decode, margin) in sides.items():
        decoding, whole = (1 / statistics.median(values) for values in seconds[name, kind])
        plain, averaged = differences(contents, references, decode, margin)
        factors = sorted({1 if margin is None else factor_of(content, margin) for content in contents})
        lines.append(f"| {name} | {kind} | {', '.join(f'1/{factor}' for factor in factors)} | {decoding:.1f} | "
                     f"{whole:.1f} | {plain} | {averaged} |")  # fmt: skip
    return lines


def as_in_full(content: bytes, seed: int) -> list[np.ndarray]:
    """The augmented image after full decoding, as it is and averaged."""
    whole = pillow(content, 1)
    return [augmented(whole, seed, augmentation) for augmentation in (AUGMENTATION, AVERAGED)]


def differences(
    contents: Sequence[bytes], references: Sequence[list[np.ndarray]], decode: Decode, margin: float | None
) -> list[str]:
    """Mean and 99th percentile of the differences from full decoding, as it is and averaged."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for number, (content, both) in enumerate(zip(contents, references, strict=True)):
        mine = augmented(decode(content, 1 if margin is None else factor_of(content, margin)), number, AUGMENTATION)
        for values, reference in zip(found, both, strict=True):
            values.append(np.abs(mine.astype(int) - reference))
    return [f"{np.mean(values):.1f} ({np.percentile(values, 99):.0f})" for values in found]


def size_of(contents: Sequence[bytes]) -> str:
    """Median sizes of images, for a title."""
    sides = []
    for content in contents:
        with Image.open(io.BytesIO(content)) as opened:
            sides.append(opened.size)
    width, height = (int(statistics.median(side)) for side in zip(*sides, strict=True))
    size = statistics.median(map(len, contents))
    return f"{width:,} x {height:,} pixels, {size / 1e6:.2g} MB"


def load(folder: Path, model: Path, rounds: int) -> dict[str, list[float]]:
    """Images per second of the loader in each round, after one that is not counted."""
    split = load_captions(folder / "captions.csv", validation_fraction=0.1)["train"]
    processor = load_tower(model, "image")[1]
    rates: dict[str, list[float]] = {"full": [], "reduced": []}
    for number in range(rounds + 1):
        for name, found in rates.items():
            rows = CaptionRows(split, processor, AUGMENTATION, 1, full_size=name == "full")
            keys = [(number, i) for i in range(len(split))]
            loader = BatchLoader(rows, [keys[i : i + 4] for i in range(0, len(keys), 4)], num_workers=2)
            start = time.perf_counter()
            for _ in loader:
                pass
            if number:
                found.append(len(keys) / (time.perf_counter() - start))
            del loader
    return rates


def main() -> None:
    """Print the Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flickr8k", type=Path, help="folder with photographs in Images/")
    parser.add_argument("--model", type=Path, help="folder of an export, whose processor the loader uses")
    parser.add_argument("--count", type=int, default=12, help="photographs of each kind (12)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    photographs = sorted((args.flickr8k / "Images").glob("*.jpg"))
    print(HEAD.format(cores=os.cpu_count()))
    with tempfile.TemporaryDirectory() as place:
        mosaics = write_mosaics(photographs, Path(place), args.count)
        small = [path.read_bytes() for path in random.Random(1).sample(photographs, args.count)]
        for title, contents in (("Large photographs", mosaics), ("Flickr8k", small)):
            print(f"## {title}, {size_of(contents)}\n\n{TABLE}")
            print("\n".join(compare(contents, args.rounds)), end="\n\n", flush=True)
        if args.model is not None:
            print("## The loader, large photographs\n\n| size | images / s, median | range |\n|---|---|---|")
            for name, rates in load(Path(place), args.model, args.rounds).items():
                print(f"| {name} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} |")


if __name__ == "__main__":
    main()
