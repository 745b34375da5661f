"""Image files of a caption file: which folder holds them, which of them cannot be used."""

import errno
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from .picture_formats import unreadable_format

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
    "outside": "is outside {folder}; move it there, or allow this with --allow_outside_images",
    "missing": "is not in {folder}; name the right folder with image_dir, or delete its rows",
    "empty": "in {folder} is empty; replace it or delete its rows",
    "unreadable": "in {folder} cannot be read; check its permissions and its disk",
    "format": "in {folder} is in a format that is not read here",
}


def image_folder(root: Path, images: Iterable[str]) -> Path:
    """The one of [`IMAGE_FOLDERS`] in `root` that holds most of the first 100 images."""
    sample = list(islice(images, 100))
    return max(
        (root / name for name in IMAGE_FOLDERS),
        key=lambda folder: sum(os.path.isfile(folder / name) for name in sample),
    )


def bad_files(folder: Path, bounds: Path, images: Iterable[str], allow_outside: bool) -> Iterator[tuple[str, str]]:
    """Find image files that cannot be used, without opening them.

    Args:
        folder: folder that the names are relative to.
        bounds: folder that no name may leave; it may itself be a symbolic link.
        images: names of the images.
        allow_outside: whether names may leave `bounds`.

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
            elif unreadable_format(path) is not None:
                yield name, "format"
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
            yield name, "missing"
        except OSError as error:
            yield name, "missing" if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else "unreadable"
