"""Which image belongs to which split."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import DataError, Problem
from .caption_files import CaptionedImage, OnProblem, _image_name, _lines, _read_utf8
from .problems import raise_problem

SPLITS = ("train", "validation", "test")


SPLIT_FILES = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt", "Flickr8k_text/Flickr_8k.trainImages.txt"),
    "validation": ("validation.txt", "val.txt", "Flickr_8k.devImages.txt", "Flickr8k_text/Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt", "Flickr8k_text/Flickr_8k.testImages.txt"),
}


# Data sets name their validation split in several ways; "restval" is Karpathy's extra training part.
SPLIT_ALIASES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "restval": "train",
    "training": "train",
    "testing": "test",
}


def read_splits(
    root: Path, images: Mapping[str, CaptionedImage], caption_file: Path, found: OnProblem = raise_problem
) -> dict[str, list[str]]:
    """Image names by split from the split files beside a caption file; empty where there are none."""
    there = {split: [root / name for name in names if (root / name).is_file()] for split, names in SPLIT_FILES.items()}
    files = {split: paths[0] for split, paths in there.items() if paths and paths[0] != caption_file}
    if files and "train" not in files:
        raise DataError(
            f"{next(iter(files.values()))}: a split file without a train.txt beside it; add one or move it"
        )
    splits: dict[str, list[str]] = {}
    named: dict[str, str] = {}
    for split, path in files.items():
        splits[split] = []
        for number, line in enumerate(_lines(_read_utf8(path, found)), 1):
            name = _image_name(line, str(path), number, None, found) if line.strip() else None
            if name is None:
                continue
            if name not in images:
                found(Problem("no-captions", f"{name!r} has no caption in {caption_file}", str(path), number))
            elif name in named:
                told = f"{name!r} is in {named[name]} already; an image is in one split"
                found(Problem("two-splits", told, str(path), number))
            else:
                named[name] = f"{path}, row {number}"
                splits[split].append(name)
        if not splits[split]:
            raise DataError(f"{path}: no image names; expected one a line")
    return splits


def split_by_image(names: list[str], validation_fraction: float, seed: int) -> dict[str, list[str]]:
    """A seeded split into `train` and `validation`; each has at least one image.

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


def split_of(image_id: str) -> str | None:
    """The split that a folder of the image's path is named after."""
    folders = [part.lower() for part in image_id.split("/")[:-1]]
    return next((split for folder in folders if (split := SPLIT_ALIASES.get(folder, folder)) in SPLITS), None)
