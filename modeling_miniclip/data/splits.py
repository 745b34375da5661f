"""Which image belongs to which split: split files, folder names, or a seeded split."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import DataError, Problem
from .caption_files import CaptionedImage, image_name, read_utf8, split_lines
from .problems import OnProblem, raise_problem

SPLITS = ("train", "validation", "test")

SPLIT_FILES = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt", "Flickr8k_text/Flickr_8k.trainImages.txt"),
    "validation": ("validation.txt", "val.txt", "Flickr_8k.devImages.txt", "Flickr8k_text/Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt", "Flickr8k_text/Flickr_8k.testImages.txt"),
}

# Datasets name their validation split in several ways; "restval" is Karpathy's extra training part.
SPLIT_ALIASES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "restval": "train",
    "training": "train",
    "testing": "test",
}


def read_splits(
    root: Path, images: Mapping[str, CaptionedImage], caption_file: Path, on_problem: OnProblem = raise_problem
) -> dict[str, list[str]]:
    """Image names by split from the split files next to a caption file; empty without such files.

    Args:
        root: folder of the split files.
        images: images of the caption file, by name.
        caption_file: path of the caption file, which is not taken for a split file.
        on_problem: function called with each name that has no captions or is in a split already.

    Raises:
        DataError: there is no file for train, or a file without names.
    """
    files: dict[str, Path] = {}
    for split, names in SPLIT_FILES.items():
        file = next((root / name for name in names if (root / name).is_file()), None)
        if file is not None and file != caption_file:
            files[split] = file
    if files and "train" not in files:
        text = "a split file without a train.txt next to it; add one or move this file"
        raise DataError(Problem("unusable", text, str(next(iter(files.values())))))
    splits: dict[str, list[str]] = {}
    place: dict[str, str] = {}  # of each name in the split files
    for split, path in files.items():
        splits[split] = []
        for number, line in enumerate(split_lines(read_utf8(path, on_problem)), 1):
            name = image_name(line, str(path), number, None, on_problem) if line.strip() else None
            if name is None:
                continue
            if name not in images:
                on_problem(Problem("no-captions", f"{name!r} has no caption in {caption_file}", str(path), number))
            elif name in place:
                text = f"{name!r} is already in {place[name]}; an image can be in only one split"
                on_problem(Problem("two-splits", text, str(path), number))
            else:
                place[name] = f"{path}, row {number}"
                splits[split].append(name)
        if not splits[split]:
            raise DataError(Problem("unusable", "no image names; expected one per line", str(path)))
    return splits


def split_of_folder(image_id: str) -> str | None:
    """The split that a folder in the image's path is named after; None if there is no such folder."""
    folders = [part.lower() for part in image_id.split("/")[:-1]]
    return next((split for folder in folders if (split := SPLIT_ALIASES.get(folder, folder)) in SPLITS), None)


def split_by_image(names: list[str], validation_fraction: float, seed: int) -> dict[str, list[str]]:
    """A random split into `train` and `validation`, each with at least one image.

    Args:
        names: names of all images.
        validation_fraction: fraction of the images for validation, between 0 and 1.
        seed: random seed of the split.

    Raises:
        DataError: fewer than two images, or a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    if len(names) < 2:
        raise DataError(f"{len(names)} image cannot be split into train and validation: at least two are needed")
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = min(max(1, round(validation_fraction * len(names))), len(names) - 1)
    return {
        "train": [names[i] for i in sorted(order[held_out:])],
        "validation": [names[i] for i in sorted(order[:held_out])],
    }
