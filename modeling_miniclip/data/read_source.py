"""Read the text files of a local dataset: captions, and where its images are."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, Problem
from ..utils.names import is_utf8, name_of
from .caption_files import CaptionedImage, read_caption_file
from .columns import ColumnNames, find_columns
from .image_files import BAD_FILES, bad_files, image_folder
from .layouts import CAPTION_FILES, METADATA_FILES, find_caption_file, find_metadata_files
from .listing import walk_folders
from .picture_formats import unreadable_format
from .problems import OnProblem, raise_problem
from .recognise import SOURCE_KINDS, recognise_file
from .splits import SPLITS, read_splits, split_by_image, split_of_folder

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class Source:
    """What the text files of a dataset say, before any image is opened.

    Args:
        images: captions of each image, by its name.
        folder: folder that the names are relative to.
        splits: image names by split; empty if the source has no splits.
    """

    images: dict[str, CaptionedImage]
    folder: Path
    splits: dict[str, list[str]]


def read_source(
    path: Path,
    image_dir: str | os.PathLike | None,
    columns: ColumnNames,
    on_problem: OnProblem = raise_problem,
) -> Source:
    """Read a caption file or the caption files of a folder; look for the images without opening them.

    Args:
        path: file or folder.
        image_dir: folder of the images of a caption file, if they are not next to it.
        columns: columns to look for, and whether names may lead outside the folder of images.
        on_problem: function called with each problem; the default raises a `DataError` at the first.

    Raises:
        DataError: the source cannot be used: no captions, a missing column, no folder of images.
    """
    try:
        return _read_source(path, image_dir, columns, on_problem)
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
        raise DataError(Problem("unusable", text, name_of(error.filename or path))) from error


def _read_source(
    path: Path, image_dir: str | os.PathLike | None, columns: ColumnNames, on_problem: OnProblem
) -> Source:
    if not is_utf8(path.absolute()):
        raise DataError(Problem("unusable", "its path is not UTF-8; rename the file or folder", name_of(path)))
    if path.is_file() and (kind := recognise_file(path)) != "text":
        text = f"{SOURCE_KINDS[kind]}, not a caption file; `miniclip index` reads it, training and evaluation do not"
        raise DataError(Problem("unusable", text, str(path)))
    caption_file = path if path.is_file() else find_caption_file(path)
    if caption_file is None:
        return _read_image_folder(path, columns, on_problem)
    root = path.parent if path.is_file() else path
    images = read_caption_file(caption_file, partial(find_columns, wanted=columns), on_problem)
    folder = Path(image_dir).expanduser() if image_dir is not None else image_folder(root, images)
    if not is_utf8(folder.absolute()):
        raise DataError(Problem("unusable", "its path is not UTF-8; rename the folder", name_of(folder)))
    if not folder.is_dir():
        text = "no such folder of images; name the right one with image_dir"
        raise DataError(Problem("unusable", text, str(folder)))
    _check_image_files(folder, folder, images, columns.allow_outside_images, on_problem)
    return Source(images, folder, read_splits(root, images, caption_file, on_problem))


def _read_image_folder(path: Path, columns: ColumnNames, on_problem: OnProblem) -> Source:
    """Read the metadata files of an imagefolder."""
    metadata = find_metadata_files(walk_folders(path, on_problem))
    if not metadata:
        text = (
            f"no captions found; expected one of {', '.join(CAPTION_FILES[:3])}, or {METADATA_FILES[0]} or "
            f"{METADATA_FILES[1]} next to the images"
        )
        raise DataError(Problem("unusable", text, str(path)))
    images: dict[str, CaptionedImage] = {}
    splits: dict[str, list[str]] = {}
    for file in metadata:
        rows = read_caption_file(file, partial(find_columns, wanted=columns), on_problem)
        _check_image_files(file.parent, path, rows, columns.allow_outside_images, on_problem)
        for name, entry in rows.items():
            image_id = Path(os.path.relpath(file.parent / name, path)).as_posix()
            if image_id in images:
                text = f"{image_id!r} is already in {images[image_id].where}"
                on_problem(Problem("two-splits", text, entry.file, entry.rows[0], entry.column))
                continue
            images[image_id] = entry
            split = split_of_folder(image_id)
            if split is not None:
                splits.setdefault(split, []).append(image_id)
    if splits and "train" not in splits:
        text = f"images in {', '.join(splits)} but none in train; name a folder train"
        raise DataError(Problem("unusable", text, str(path)))
    return Source(images, path, splits)


def _check_image_files(
    folder: Path, bounds: Path, images: Mapping[str, CaptionedImage], allow_outside: bool, on_problem: OnProblem
) -> None:
    """Report image files that are missing, empty or outside `bounds`; arguments as in [`bad_files`]."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in bad_files(folder, bounds, images, allow_outside):
        by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        reason = BAD_FILES[kind].format(folder=bounds if kind == "outside" else folder)
        count = f"({len(names)} of {len(images)} images are {kind})"
        for name in names:
            entry = images[name]
            if kind == "format" and (found := unreadable_format(os.path.join(folder, name))) is not None:
                reason = f"is {found.reason}"
            text = f"image file {name!r} {reason} {count}"
            image = name if folder == bounds else Path(os.path.relpath(folder / name, bounds)).as_posix()
            on_problem(Problem(kind, text, entry.file, entry.rows[0], entry.column, image))


def _build_splits(source: Source, validation_fraction: float, seed: int) -> "DatasetDict":
    """One row per image, in the splits of the source, or in random ones where it has none."""
    from datasets import Dataset, DatasetDict, Features, Image, Value

    images, folder, splits = source.images, source.folder, source.splits
    if not splits:
        splits = {"train": sorted(images)}
    elif left_out := len(images) - sum(map(len, splits.values())):
        warnings.warn(f"{folder}: left out {left_out} images that are in no split", stacklevel=2)
    if "validation" not in splits:
        splits = splits | split_by_image(splits["train"], validation_fraction, seed)
    features = {"image": Image(), "image_id": Value("string"), "captions": [Value("string")]}
    if any(image.ids for image in images.values()):
        features["caption_ids"] = [Value("string")]
    data = DatasetDict()
    for split in (name for name in SPLITS if name in splits):
        names = splits[split]
        rows = {
            "image": [str(folder / name) for name in names],
            "image_id": names,
            "captions": [images[name].captions for name in names],
            "caption_ids": [images[name].ids for name in names],
        }
        data[split] = Dataset.from_dict({name: rows[name] for name in features}, features=Features(features))
    return data
