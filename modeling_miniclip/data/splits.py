"""Which image belongs to which split: split files, folder names, or a seeded split."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import DataError, Problem
from .columns import image_name
from .problems import OnProblem
from .readers.image_files import SAMPLE, Spellings, image_folder
from .readers.text_files import Lines
from .rows import SplitName

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


WORD = re.compile(r"[^\W\d_]+")
NO_SPLIT = ("", "none", "nan", "null", "n/a", "<na>")  # how tables write that a row is in no split


def find_split_files(root: Path, caption_file: Path) -> dict[str, Path]:
    """The split files in a folder, by split; empty without such files.

    Args:
        root: folder of the split files.
        caption_file: path of the caption file, which is not taken for a split file.

    Raises:
        DataError: there is no file for train.
    """
    files: dict[str, Path] = {}
    for split, names in SPLIT_FILES.items():
        file = next((root / name for name in names if (root / name).is_file()), None)
        if file is not None and file != caption_file:
            files[split] = file
    if files and "train" not in files:
        text = "a split file without a train.txt next to it; add one or move this file"
        raise DataError(Problem("unusable", text, str(next(iter(files.values())))))
    return files


def read_split_files(
    files: Mapping[str, Path], on_problem: OnProblem, image_dir: str | os.PathLike | None = None
) -> Iterator[SplitName]:
    """The image names in split files, file by file. A name that is spelled otherwise becomes that of its file.

    Args:
        files: split files by split, from [`find_split_files`].
        on_problem: function called with each line that is not UTF-8.
        image_dir: folder of the images, if they are not next to the split files.

    Raises:
        DataError: there is a file without names.
    """
    for split, path in files.items():
        lines = _names(path, on_problem)
        head = list(islice(lines, SAMPLE))
        if not head:
            raise DataError(Problem("unusable", "no image names; expected one per line", str(path)))
        folder = Path(image_dir or image_folder(path.parent, (name for _, name in head))).expanduser()
        spellings = Spellings(folder)
        for number, name in chain(head, lines):
            found = name if os.path.lexists(os.path.join(folder, name)) else spellings.find(name)
            yield SplitName(split, found or name, str(path), number)


def _names(path: Path, on_problem: OnProblem) -> Iterator[tuple[int, str]]:
    lines = Lines(path, on_problem)
    for number, line in enumerate(lines, 1):
        if line.strip() and not lines.are_undecoded(number, number):
            name = image_name(line, str(path), number, None, on_problem)
            if name is not None:
                yield number, name


def split_words(name: str) -> list[str]:
    """The words in the name of a file or folder that name a split: `["train"]` for `coco_train2017.tar`."""
    return [word for word in WORD.findall(name.lower()) if SPLIT_ALIASES.get(word, word) in SPLITS]


def split_of_name(name: str) -> str | None:
    """The split that the name of a file or folder states; None if it states none, or several.

    Examples:
        >>> split_of_name("train-00001.tar"), split_of_name("captions_val2017.json"), split_of_name("training.csv")
        ('train', 'validation', 'train')
    """
    splits = {SPLIT_ALIASES.get(word, word) for word in split_words(name)}
    return splits.pop() if len(splits) == 1 else None


def split_of_value(value: Any) -> str | None:
    """The split in a cell: `train`, `validation` or `test` for any of their names, else the text; None if empty."""
    text = "" if value is None else str(value).strip()
    lower = SPLIT_ALIASES.get(text.lower(), text.lower())
    return None if lower in NO_SPLIT else lower if lower in SPLITS else text


def splits_of_folders(folders: Iterable[str]) -> Callable[[str], str | None]:
    """A function that returns the split of an image from the folders in its name.

    A folder called `train` is a split only if all folders next to it that hold images are called after splits: next to
    `boat`, it is a vehicle. The outermost split counts.

    Args:
        folders: all folders that hold images, as relative paths with `/`; "" for the folder itself.
    """
    inside: dict[str, set[str]] = {}  # the folders in each folder
    for folder in folders:
        parts = folder.split("/") if folder else []
        for i, part in enumerate(parts):
            inside.setdefault("/".join(parts[:i]), set()).add(part)
    with_splits = {parent for parent, names in inside.items() if all(map(_split_folder, names))}

    @lru_cache(maxsize=1024)
    def split_of(folder: str) -> str | None:
        parts = folder.split("/")
        found = (_split_folder(part) for i, part in enumerate(parts) if "/".join(parts[:i]) in with_splits)
        return next((split for split in found if split is not None), None)

    return lambda name: split_of(name.rpartition("/")[0])


def _split_folder(name: str) -> str | None:
    """The split that a folder is called after, as in `Val` or `train2017`."""
    word = name.lower().rstrip("0123456789")
    split = SPLIT_ALIASES.get(word, word)
    return split if split in SPLITS else None
