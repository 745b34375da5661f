"""Data to evaluate on: captioned images for retrieval, or a folder of class folders for classification."""

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets import Image as UndecodedImage
from PIL import Image
from torch import Tensor

from ..data.captions import load_captions
from ..data.listing import list_images, subfolders
from ..data.load_rows import SeededSplit
from ..data.picture_formats import read_encoded
from ..data.problems import HARMLESS
from ..data.source_kinds import kind_of, resolve
from ..data.splits import SPLIT_ALIASES, SPLITS
from ..data.tables.assign_splits import group_numbers
from ..data.tables.row_blocks import Captions, caption_counts
from ..errors import DataError, Problem, UsageError
from ..inference.encode import open_image
from ..utils.names import is_utf8, name_of, relative_name
from .metrics import DIRECTIONS, RECALL_AT
from .shared import SharedTexts, find_shared_texts

CLASSIFICATION = "image_to_class"
ALL = "all"  # the images of all splits together
AUTOMATIC_SPLITS = ("test", "validation", "train")  # the first of these that exists
TRAINING_SPLITS = ("validation", "test", "train")  # the same, to choose a model by
TOP_K = (1, 5)


@dataclass(frozen=True)
class EvalSet:
    """Images and texts. Those with the same group number belong together.

    Args:
        name: name of the dataset, as it was given.
        split: name of the split.
        images: paths, or rows with the undecoded `image`.
        image_ids: names of the images.
        texts: captions, or class names; `directions` is then `("image_to_class",)`.
        image_group: `[images]` int64, group of each image.
        text_group: `[texts]` int64, group of each text.
        directions: directions of retrieval, such as `"text_to_image"`.
        at: values of K in recall@K.
        skipped: names of images that could not be read, with the reason.
        unlisted: names of folders that could not be listed, with the reason.
        subjects: `[images]` int64, equal for images of the same `group`, which show the same thing; None if the
            dataset has no groups.
        shared: texts that belong to several images; None if there are none, or nobody has looked for them.
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
    skipped: dict[str, str] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    subjects: Tensor | None = None
    shared: SharedTexts | None = None

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

    def captions_by_image(self) -> list[list[str]]:
        """The captions of each image."""
        captions: list[list[str]] = [[] for _ in self.image_ids]
        for text, row in zip(self.texts, self.text_group.tolist(), strict=True):
            captions[row].append(text)
        return captions

    def kept_texts(self, unreadable: Collection[int]) -> Tensor:
        """`[texts]` booleans: which texts remain without some images; all classes do."""
        if self.is_classification:
            return torch.ones(len(self.texts), dtype=torch.bool)
        return ~torch.isin(self.text_group, torch.tensor(sorted(unreadable), dtype=torch.long))

    def without(self, unreadable: Mapping[int, str]) -> "EvalSet":
        """The set without some images.

        Args:
            unreadable: rows of these images, with the reason.
        """
        rows = [row for row in range(len(self.image_ids)) if row not in unreadable]
        images = self.images.select(rows) if isinstance(self.images, Dataset) else [self.images[row] for row in rows]
        text_rows = self.kept_texts(unreadable).nonzero().flatten().tolist()
        image_group, text_group = self.image_group[rows], self.text_group[text_rows]
        if not self.is_classification:  # the number of a group is the row of its image
            image_group, text_group = torch.arange(len(rows)), torch.searchsorted(torch.tensor(rows), text_group)
        return replace(
            self,
            images=images,
            image_ids=[self.image_ids[row] for row in rows],
            texts=[self.texts[row] for row in text_rows],
            image_group=image_group,
            text_group=text_group,
            subjects=None if self.subjects is None else self.subjects[rows],
            shared=None,
            skipped=self.skipped | {self.image_ids[row]: reason for row, reason in unreadable.items()},
        )

    def with_shared(self, marks: Mapping[int, str]) -> "EvalSet":
        """The set with the texts that belong to several images.

        Args:
            marks: what images with equal bytes have in common, by row.
        """
        if self.is_classification:
            return self
        groups = None if self.subjects is None else self.subjects.tolist()
        content = [marks.get(row) for row in range(len(self.image_ids))]
        shared = find_shared_texts(self.captions_by_image(), self.text_group, groups, content)
        return replace(self, shared=shared)

    def with_public_names(self) -> "EvalSet":
        """The set with its images named without the folders that they are in on this machine, see `public_name`."""
        return replace(self, image_ids=[relative_name(name, self.name) for name in self.image_ids])

    def part(self, name: str, rows: list[int]) -> "EvalSet":
        """Some images of a classification set as a split."""
        return replace(
            self,
            split=name,
            images=[self.images[row] for row in rows],
            image_ids=[self.image_ids[row] for row in rows],
            image_group=self.image_group[rows],
        )

    def open(self, row: int) -> Image.Image:
        """Open the image of a row, as RGB."""
        return open_image(self.images[row])


class ReadableImages:
    """Opens images one after the other, and leaves out those that cannot be read.

    Args:
        images: images of an [`EvalSet`].
    """

    def __init__(self, images: Sequence[Any]):
        self.images = images
        self.unreadable: dict[int, str] = {}  # rows found so far, with the reason
        self.marks: dict[int, str] = {}  # what images of a dataset with equal bytes have in common, by row

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        for row in range(len(self)):
            try:
                image = open_image(self._with_content(row))
            except DataError as error:
                self.unreadable[row] = str(error)
            else:
                yield image

    def _with_content(self, row: int) -> Any:
        """The image of a row, of a dataset with its bytes; as it is if they cannot be read, which opening reports."""
        image = self.images[row]
        if not isinstance(self.images, Dataset):
            return image
        try:
            content = read_encoded(image["image"])
        except Exception:  # as many classes as readers
            return image
        self.marks[row] = hashlib.blake2b(content, digest_size=16).hexdigest()
        return {"image": image["image"] | {"bytes": content}}


def load_eval_set(
    source: str, split: str | None = None, class_names: str | os.PathLike | None = None, **options: Any
) -> EvalSet:
    """Load one split of a dataset.

    Args:
        source: dataset as for `load_captions`; or a folder with one folder of images per class and no captions,
            optionally inside one folder per split.
        split: `train`, `validation` or `test`, or `all` for the images of all splits; by default the first of test,
            validation and train that exists.
        class_names: JSON file with a name for each class folder, such as `{"n02084071": "dog"}`. By default the class
            name is the folder's name, with spaces instead of underscores.
        options: other options of `load_captions`.

    Raises:
        DataError: the dataset or the file of class names is not as expected, or the split does not exist.
        UsageError: class names were given for captioned images, or the validation fraction is out of range.
    """
    fraction = options.get("validation_fraction", SeededSplit.validation_fraction)
    if split == ALL:
        options["validation_fraction"] = None
    elif not 0 < fraction < 1:
        raise UsageError(
            f"--validation_fraction must be between 0 and 1, not {fraction}; --split all measures all images"
        )
    folder = Path(source).expanduser()
    with _listable(folder):
        if _holds_class_folders(folder):
            return _class_folders(folder, split, class_names)
    if class_names is not None:
        raise UsageError(f"--class_names {class_names}: {source} is not a folder of class folders without captions")
    splits = load_captions(source, **options)
    if split == ALL:
        name, rows = ALL, concatenate_datasets(list(splits.values()))
    else:
        name = _chosen_split(split, list(splits), source)
        rows = splits[name]
    group = torch.arange(len(rows))
    return EvalSet(
        name=source,
        split=name,
        images=rows.select_columns(["image"]).cast_column("image", UndecodedImage(decode=False)),
        image_ids=list(rows["image_id"]),
        texts=[caption for several in Captions(rows) for caption in several],
        image_group=group,
        text_group=group.repeat_interleave(torch.from_numpy(caption_counts(rows))),
        directions=DIRECTIONS,
        at=RECALL_AT,
        subjects=torch.from_numpy(group_numbers(rows)) if "group" in rows.column_names else None,
    )


def load_class_folders(source: str, flag: str) -> EvalSet:
    """Load class folders to measure a model with while it is trained: `validation`, else `test`, else `train`.

    Args:
        source: folder with one folder of images per class and no captions, optionally inside one folder per split.
        flag: flag that named the folder, for error messages.

    Raises:
        DataError: the folder is none of class folders.
    """
    folder = Path(source).expanduser()
    with _listable(folder):
        if not _holds_class_folders(folder):
            raise DataError(
                f"{flag} {source}: expected a folder with at least two folders of images, one for each class, and "
                "without captions"
            )
        return _class_folders(folder, None, None, TRAINING_SPLITS)


def probe_sets(
    source: str, fraction: float = 0.1, seed: int = 0, class_names: str | os.PathLike | None = None
) -> dict[str, EvalSet]:
    """Load class folders as `train` and `test`, and `validation` if there is one in addition, for a linear probe.

    Args:
        source: folder with one folder of images per class and no captions, optionally inside one folder per split.
        fraction: fraction of the images of each class for `test`, if there are no splits.
        seed: random seed of these images.
        class_names: as for [`load_eval_set`].

    Raises:
        DataError: there are no class folders, no images to train or to test on, or a split has other classes.
    """
    folder = Path(source).expanduser()
    with _listable(folder):
        if not _holds_class_folders(folder):
            raise DataError(
                f"--linear_probe {source}: expected a folder with at least two folders of images, one for each class, "
                "and without captions"
            )
        by_split = _split_folders(folder)
        if by_split is None:
            return _split_classes(_class_folders(folder, None, class_names), fraction, seed)
        others = [name for name in ("test", "validation") if name in by_split]
        if "train" not in by_split or not others:
            raise DataError(f"--linear_probe {source}: expected folders train and test, found {', '.join(by_split)}")
        parts = {"train": _class_folders(folder, "train", class_names)}
        parts |= dict(zip(("test", "validation"), [_class_folders(folder, name, class_names) for name in others],
                          strict=False))  # fmt: skip
    for name, part in parts.items():
        if part.texts != parts["test"].texts:
            raise DataError(f"--linear_probe {source}: the class folders of {name} are not those of the others")
    return parts


def _split_classes(data: EvalSet, fraction: float, seed: int) -> dict[str, EvalSet]:
    """`train` and `test` with the same fraction of each class."""
    order, test = np.random.default_rng(seed).permutation(len(data.image_ids)), np.zeros(len(data.image_ids), bool)
    label = data.image_group.numpy()
    for number, name in enumerate(data.texts):
        rows = order[label[order] == number]
        if len(rows) < 2:
            raise DataError(f"--linear_probe {data.name}: class {name!r} has one image, which cannot be in two splits")
        test[rows[: min(len(rows) - 1, max(1, round(fraction * len(rows))))]] = True
    return {name: data.part(name, np.flatnonzero(rows).tolist()) for name, rows in (("train", ~test), ("test", test))}


@contextmanager
def _listable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = name_of(error.filename or folder)
        raise DataError(f"{place}: cannot be read: {error.strerror or error}; check its permissions") from error


def _chosen_split(
    split: str | None, names: Sequence[str], source: str, automatic: Sequence[str] = AUTOMATIC_SPLITS
) -> str:
    if split is None:
        return next(name for name in automatic if name in names)
    if split not in names:
        raise DataError(f"{source}: no split {split!r}; it has {', '.join(names)}: choose one, or all, with --split")
    return split


def _holds_class_folders(folder: Path) -> bool:
    if not folder.is_dir() or not subfolders(folder):
        return False
    kind = kind_of(resolve(folder))
    return kind is not None and kind.groups_are_classes


def _split_folders(root: Path) -> dict[str, Path] | None:
    """Folders of splits by the names of these; None if there are other folders."""
    found = {SPLIT_ALIASES.get(name.lower(), name.lower()): root / name for name in subfolders(root)}
    return found if set(found) <= set(SPLITS) else None


def _class_folders(
    root: Path,
    split: str | None,
    class_names: str | os.PathLike | None,
    automatic: Sequence[str] = AUTOMATIC_SPLITS,
) -> EvalSet:
    by_split = _split_folders(root)
    if by_split is None:
        if split not in (None, ALL):
            raise DataError(
                f"{root}: --split {split}, but its folders are {', '.join(subfolders(root)[:5])}: "
                "put the class folders into one folder per split, or leave --split out"
            )
        chosen, tops, top = ALL, [root], root
    elif split == ALL:
        chosen, tops, top = ALL, list(by_split.values()), root
    else:
        chosen = _chosen_split(split, list(by_split), str(root), automatic)
        tops, top = [by_split[chosen]], by_split[chosen]
    classes = sorted({name for each in tops for name in subfolders(each)})
    if len(classes) < 2:
        raise DataError(
            f"{top}: {len(classes)} class folder; expected captions (a CSV, metadata.csv), or at least two "
            "folders with the images of one class each"
        )
    images: list[str] = []
    labels: list[int] = []
    problems: list[Problem] = []
    for label, folder in enumerate(classes):
        there = [each / folder for each in tops if (each / folder).is_dir()]
        found = [path for each in there for path in list_images(each, problems.append, root)]
        if not found:
            inside = [problem for problem in problems if problem.file.startswith(name_of(there[0]))]
            reason = f" that can be read: {inside[0]}" if inside else ""
            raise DataError(f"{name_of(there[0])}: no images{reason}; fill this class folder or delete it")
        images += found
        labels += [label] * len(found)
    for problem in problems:
        if problem.kind in HARMLESS:
            warnings.warn(str(problem), stacklevel=2)
    texts = _words(classes, class_names)
    return EvalSet(
        name=name_of(root),
        split=chosen,
        images=images,
        image_ids=[name_of(Path(path).relative_to(top).as_posix()) for path in images],
        texts=texts,
        image_group=torch.tensor(labels),
        text_group=torch.arange(len(texts)),
        directions=(CLASSIFICATION,),
        at=tuple(k for k in TOP_K if k < len(texts)),
        skipped={each.file: each.text for each in problems if each.kind not in (*HARMLESS, "unlisted")},
        unlisted={each.file: each.text for each in problems if each.kind == "unlisted"},
    )


def _words(folders: list[str], class_names: str | os.PathLike | None) -> list[str]:
    """Class names, one per class folder."""
    odd = next((name for name in folders if not is_utf8(name)), None)
    folders = [name_of(name) for name in folders]
    if class_names is None:
        if odd is not None:
            raise DataError(
                f"the name of the class folder {name_of(odd)} is not UTF-8; rename it, or use --class_names"
            )
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
