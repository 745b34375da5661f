"""Data to evaluate on: captioned images for retrieval, or a folder of class folders for classification."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.caption_files import METADATA_FILES, find_caption_file
from ..data.captions import load_captions
from ..data.splits import SPLIT_ALIASES, SPLITS
from ..errors import DataError, UsageError
from ..inference.encode import open_image
from .metrics import DIRECTIONS, RECALL_AT

CLASSIFICATION = "image_to_class"
AUTOMATIC_SPLITS = ("test", "validation", "train")  # the first of these that exists
TOP_K = (1, 5)


@dataclass(frozen=True)
class EvalSet:
    """Images and texts. Those with the same group number belong together.

    Args:
        name: name of the dataset, as it was given.
        split: name of the split.
        images: paths, or rows with the key `image`.
        image_ids: names of the images.
        texts: captions, or class names; `directions` is then `("image_to_class",)`.
        image_group: `[images]` int64, group of each image.
        text_group: `[texts]` int64, group of each text.
        directions: directions of retrieval, such as `"text_to_image"`.
        at: values of K in recall@K.
    """

    name: str
    split: str
    images: Sequence[Any]
    image_ids: list[str]
    texts: list[str]
    image_group: Tensor
    text_group: Tensor
    directions: tuple[str, ...]
    at: tuple[int, ...]

    @property
    def is_classification(self) -> bool:
        """Whether the texts are classes."""
        return self.directions == (CLASSIFICATION,)

    def image_of_query(self, direction: str) -> Tensor:
        """`[Q]`, for each query of a direction the row of its image."""
        return self.text_group if direction == "text_to_image" else torch.arange(len(self.image_ids))

    def metric(self, direction: str, k: int) -> str:
        """Name of recall@K in a direction."""
        return f"top-{k}" if self.is_classification else f"{direction}_R@{k}"

    def sides(self, direction: str) -> tuple[tuple[list[str], Tensor], tuple[list[str], Tensor]]:
        """Names (texts, or image ids) and groups, of the queries and then of the answers of a direction."""
        images, texts = (self.image_ids, self.image_group), (self.texts, self.text_group)
        return (texts, images) if direction == "text_to_image" else (images, texts)

    def open(self, row: int) -> Image.Image:
        """Open the image of a row, as RGB."""
        return open_image(self.images[row])


def load_eval_set(
    source: str, split: str | None = None, class_names: str | os.PathLike | None = None, **options: Any
) -> EvalSet:
    """Load one split of a dataset.

    Args:
        source: dataset as for `load_captions`; or a folder with one folder of images per class and no captions,
            optionally inside one folder per split.
        split: `train`, `validation` or `test`; by default the first of test, validation and train that exists.
        class_names: JSON file with a name for each class folder, such as `{"n02084071": "dog"}`. By default the class
            name is the folder's name, with spaces instead of underscores.
        options: other options of `load_captions`.

    Raises:
        DataError: the dataset or the file of class names is not as expected, or the split does not exist.
        UsageError: class names were given for captioned images.
    """
    folder = Path(source).expanduser()
    if _holds_class_folders(folder):
        return _class_folders(folder, split, class_names)
    if class_names is not None:
        raise UsageError(f"--class_names {class_names}: {source} is not a folder of class folders without captions")
    splits = load_captions(source, **options)
    name = _chosen_split(split, list(splits), source)
    rows = splits[name]
    captions = rows["captions"]
    owner = [i for i, several in enumerate(captions) for _ in several]
    texts = [caption for several in captions for caption in several]
    group = torch.arange(len(rows))
    return EvalSet(
        source, name, rows, list(rows["image_id"]), texts, group, torch.tensor(owner), DIRECTIONS, RECALL_AT
    )


def _chosen_split(split: str | None, names: Sequence[str], source: str) -> str:
    if split is None:
        return next(name for name in AUTOMATIC_SPLITS if name in names)
    if split not in names:
        raise DataError(f"{source}: no split {split!r}; it has {', '.join(names)}: choose one with --split")
    return split


def _holds_class_folders(folder: Path) -> bool:
    if not folder.is_dir() or find_caption_file(folder):
        return False
    return not any(next(folder.rglob(name), None) for name in METADATA_FILES) and bool(_folders(folder))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(root: Path, split: str | None, class_names: str | os.PathLike | None) -> EvalSet:
    by_split = {SPLIT_ALIASES.get(path.name.lower(), path.name.lower()): path for path in _folders(root)}
    if set(by_split) <= set(SPLITS):
        chosen = _chosen_split(split, list(by_split), str(root))
        top = by_split[chosen]
    elif split is not None:
        raise DataError(
            f"{root}: --split {split}, but its folders are {', '.join(path.name for path in _folders(root)[:5])}: "
            "put the class folders into one folder per split, or leave --split out"
        )
    else:
        chosen, top = "all", root
    classes = _folders(top)
    if len(classes) < 2:
        raise DataError(
            f"{top}: {len(classes)} class folder; expected captions (a CSV, metadata.csv), or at least two "
            "folders with the images of one class each"
        )
    suffixes = set(Image.registered_extensions())
    images: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        if not found:
            raise DataError(f"{folder}: no images; fill this class folder or delete it")
        images += found
        labels += [label] * len(found)
    texts = _words([path.name for path in classes], class_names)
    return EvalSet(
        name=str(root),
        split=chosen,
        images=images,
        image_ids=[path.relative_to(top).as_posix() for path in images],
        texts=texts,
        image_group=torch.tensor(labels),
        text_group=torch.arange(len(texts)),
        directions=(CLASSIFICATION,),
        at=tuple(k for k in TOP_K if k < len(texts)),
    )


def _words(folders: list[str], class_names: str | os.PathLike | None) -> list[str]:
    """Class names, one per class folder."""
    if class_names is None:
        return [name.replace("_", " ").strip() for name in folders]
    try:
        named = json.loads(Path(class_names).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--class_names {class_names}: cannot be read as JSON: {error}") from error
    if not isinstance(named, dict) or not all(isinstance(words, str) for words in named.values()):
        raise DataError(f'--class_names {class_names}: expected {{"folder": "name", ...}}')
    missing = [name for name in folders if name not in named]
    if missing:
        raise DataError(
            f"--class_names {class_names}: {len(missing)} folders have no name in it, the first is {missing[0]!r}"
        )
    return [named[name] for name in folders]
