"""Image files of a dataset: which names are images, where they are, which cannot be read."""

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from ..errors import Problem
from .caption_files import CaptionedImage, OnProblem

IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    ".",
)


def image_folder(root: Path, images: Iterable[str]) -> Path:
    """The likely folder that holds most of the first images."""
    sample = list(islice(images, 100))
    return max(
        (root / name for name in IMAGE_FOLDERS),
        key=lambda folder: sum(os.path.isfile(folder / name) for name in sample),
    )


def _check_image_files(
    folder: Path, bounds: Path, images: Mapping[str, CaptionedImage], allow_outside: bool, found: OnProblem
) -> None:
    """Find out which image files are not there, are empty, or lie outside.

    Args:
        folder: that the names are relative to.
        bounds: folder that no name may leave; it may itself be a symbolic link.
        images: by name.
        allow_outside: let names leave it.
        found: told of each problem.
    """
    by_kind: dict[str, list[str]] = {}
    for name, kind in bad_files(folder, bounds, images, allow_outside):
        by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        how = f"{BAD_FILES[kind]} ({len(names)} of {len(images)} images are {kind})"
        for name in names:
            entry, where = images[name], bounds if kind == "outside" else folder
            told = f"image file {name!r} {how.format(folder=where)}"
            image = name if folder == bounds else Path(os.path.relpath(folder / name, bounds)).as_posix()
            found(Problem(kind, told, entry.file, entry.rows[0], entry.column, image))


BAD_FILES = {
    "outside": "lies outside {folder}; put it there, or allow that by --allow_outside_images",
    "missing": "is not in {folder}; name the right folder with image_dir, or delete its rows",
    "empty": "in {folder} is empty; replace it or delete its rows",
}


def bad_files(folder: Path, bounds: Path, images: Iterable[str], allow_outside: bool) -> Iterator[tuple[str, str]]:
    """Name and kind of each file that is none of the data set's, or nothing."""
    root = os.path.realpath(bounds)
    inside: dict[str, bool] = {}  # by folder, that each file costs a system call or two

    def is_inside(path: str) -> bool:
        real = os.path.realpath(path)
        return real == root or real.startswith(os.path.join(root, ""))

    for name in images:
        parent, path = posixpath.dirname(name), os.path.join(folder, name)
        try:
            if parent not in inside:
                inside[parent] = allow_outside or is_inside(os.path.join(folder, parent))
            if not inside[parent]:
                yield name, "outside"
                continue
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                if not allow_outside and not is_inside(path):
                    yield name, "outside"
                    continue
                info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                yield name, "missing"
            elif info.st_size == 0:
                yield name, "empty"
        except (OSError, ValueError):  # ValueError: a null byte
            yield name, "missing"


IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .avif .jp2 .ppm .pgm .pbm .pnm .mpo .tga".split()
)
