"""Image files of a dataset: which files are images, which folder has them, which of them cannot be used."""

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from ..errors import Problem
from .caption_files import CaptionedImage
from .problems import OnProblem

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .avif .jp2 .ppm .pgm .pbm .pnm .mpo .tga".split()
)

# Where the images of a caption file may be, relative to its folder.
IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    ".",
)

# What is wrong with an image file, by the kind of problem.
BAD_FILES = {
    "outside": "lies outside {folder}; move it there, or allow this with --allow_outside_images",
    "missing": "is not in {folder}; name the right folder with image_dir, or delete its rows",
    "empty": "in {folder} is empty; replace it or delete its rows",
}


def is_image_file(name: str) -> bool:
    """Whether a file's suffix is that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_folder(root: Path, images: Iterable[str]) -> Path:
    """The folder that has most of the first images, among [`IMAGE_FOLDERS`] of `root`."""
    sample = list(islice(images, 100))
    return max(
        (root / name for name in IMAGE_FOLDERS),
        key=lambda folder: sum(os.path.isfile(folder / name) for name in sample),
    )


def check_image_files(
    folder: Path, bounds: Path, images: Mapping[str, CaptionedImage], allow_outside: bool, on_problem: OnProblem
) -> None:
    """Report image files that are missing, are empty or lie outside.

    Args:
        folder: folder that the names are relative to.
        bounds: folder that no name may leave; it may itself be a symbolic link.
        images: images of the caption file, by name.
        allow_outside: whether names may leave `bounds`.
        on_problem: function called with each problem.
    """
    by_kind: dict[str, list[str]] = {}
    for name, kind in bad_files(folder, bounds, images, allow_outside):
        by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        reason = BAD_FILES[kind].format(folder=bounds if kind == "outside" else folder)
        count = f"({len(names)} of {len(images)} images are {kind})"
        for name in names:
            entry = images[name]
            text = f"image file {name!r} {reason} {count}"
            image = name if folder == bounds else Path(os.path.relpath(folder / name, bounds)).as_posix()
            on_problem(Problem(kind, text, entry.file, entry.rows[0], entry.column, image))


def bad_files(folder: Path, bounds: Path, images: Iterable[str], allow_outside: bool) -> Iterator[tuple[str, str]]:
    """Find image files that cannot be used, without opening them.

    Args:
        folder, bounds, allow_outside: as in [`check_image_files`].
        images: names of the images.

    Returns:
        The name and the kind of problem, a key of [`BAD_FILES`], of each such file.
    """
    root = os.path.realpath(bounds)
    inside: dict[str, bool] = {}  # by folder, so that each file costs only one or two system calls

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
