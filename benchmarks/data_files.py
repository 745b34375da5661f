"""The data that `data.py` measures with: photographs in every format, and tiny drawn pictures in any number."""

import csv
import errno
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from modeling_miniclip import load_captions

SIZE = (500, 375)  # pixels of most photographs of Flickr8k as published
HELD_OUT = 32  # validation images
ROW_GROUP = 100  # rows, as `datasets` writes images
CAPTIONS = 5  # per tiny picture
PER_TAR = 10_000  # tiny pictures
PER_FOLDER = 10_000
WORDS, LENGTH = 5_000, 9  # different words, and words per caption
DRAWN = 1_000_000  # words drawn by their frequency, which captions are drawn from


class Sample(NamedTuple):
    """A captioned image: its number, its JPEG file, its captions."""

    number: int
    jpeg: bytes
    captions: list[str]


# --- photographs ----------------------------------------------------------------------------------------------------


def write_photos(flickr8k: str, count: int, shards: int, folder: Path) -> None:
    """Write the same photographs as loose files with `captions.csv`, as tars and as Parquet, unless they are there.

    Args:
        flickr8k: folder of Flickr8k; its photographs are resized, and repeated if there are too few.
        count: number of training images; 32 more are for validation.
        shards: number of shards of the training images.
        folder: folder to write to.
    """
    if (folder / "captions.csv").exists():
        return
    (folder / "Images").mkdir(parents=True)
    samples = photos(flickr8k, count + HELD_OUT)
    edges = np.linspace(0, count, shards + 1).astype(int)
    with open(folder / "captions.csv.new", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "split"))
        for split, names in (("train", range(shards)), ("validation", range(1))):
            for shard in names:
                size = int(edges[shard + 1] - edges[shard]) if split == "train" else HELD_OUT
                some = list(islice(samples, size))
                for sample in some:
                    name = f"{sample.number:06d}.jpg"
                    (folder / "Images" / name).write_bytes(sample.jpeg)
                    table.writerows((name, caption, split) for caption in sample.captions)
                write_tar(some, folder / f"{split}-{shard:05d}.tar")
                write_parquet(some, folder / f"{split}-{shard:05d}.parquet")
    (folder / "captions.csv.new").rename(folder / "captions.csv")


def photos(flickr8k: str, count: int) -> Iterator[Sample]:
    """The first photographs, as JPEG of [`SIZE`], one after the other."""
    rows = load_captions(flickr8k)["train"]
    for number in range(count):
        row = rows[number % len(rows)]
        jpeg = io.BytesIO()
        row["image"].convert("RGB").resize(SIZE).save(jpeg, "JPEG", quality=90)
        yield Sample(number, jpeg.getvalue(), row["captions"])


def write_tar(samples: Iterable[Sample], path: Path) -> None:
    """A tar as img2dataset and `webdataset` write it, with the captions of an image as lines of its text."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, jpeg, captions in samples:
            for suffix, content in (("jpg", jpeg), ("txt", "\n".join(captions).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(samples: list[Sample], path: Path) -> None:
    """A Parquet file as `datasets` writes it."""
    images = [{"bytes": jpeg, "path": f"{number:06d}.jpg"} for number, jpeg, _ in samples]
    table = pa.table({"image": images, "captions": [captions for _, _, captions in samples]})
    pq.write_table(table, path, row_group_size=ROW_GROUP)


# --- tiny pictures --------------------------------------------------------------------------------------------------


def write_tiny(images: int, folder: Path) -> None:
    """A caption file with loose files, and tars: five captions for each of `images` tiny pictures.

    The files are hard links to a few files, and the tars to one tar, so they take little space.
    """
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 9))) for _ in range(WORDS)])
    chances = 1 / np.arange(1, WORDS + 1)
    jpeg = tiny_jpeg(rng)
    source = str(folder / "picture.jpg")
    drawn_words = words[rng.choice(WORDS, DRAWN, p=chances / chances.sum())]
    with open(folder / "captions.csv", "w", encoding="utf-8") as table:
        table.write("image,caption\n")
        for first in range(0, images, PER_FOLDER):
            numbers = range(first, min(first + PER_FOLDER, images))
            place = folder / "images" / f"{first // PER_FOLDER:05d}"
            place.mkdir(parents=True)
            drawn = drawn_words[rng.integers(DRAWN, size=(len(numbers), CAPTIONS, LENGTH))]
            captions = [[" ".join(caption) for caption in of_image] for of_image in drawn.tolist()]
            for number, of_image in zip(numbers, captions, strict=True):
                name = f"{place.name}/{number:08d}.jpg"
                source = link_or_write(source, f"{folder}/images/{name}", jpeg)
                table.writelines(f"{name},{caption}\n" for caption in of_image)
            tar = folder / f"{place.name}.tar"
            if len(numbers) < PER_TAR or not first:
                write_tar(map(Sample, numbers, [jpeg] * len(numbers), captions), tar)
            else:
                os.link(folder / "00000.tar", tar)
    (folder / "done").touch()


def tiny_jpeg(rng: np.random.Generator) -> bytes:
    """A picture of coloured squares."""
    squares = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    jpeg = io.BytesIO()
    Image.fromarray(squares).save(jpeg, "JPEG")
    return jpeg.getvalue()


def link_or_write(source: str, target: str, content: bytes) -> str:
    """Link a file; write it where the file system allows no more links. Returns the file to link next."""
    try:
        os.link(source, target)
        return source
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.ENOENT):
            raise
    Path(target).write_bytes(content)
    return target
