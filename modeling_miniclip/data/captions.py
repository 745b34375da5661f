"""Captioned images from a CSV, a folder, the Hub or the built-in set.

Every source ends as `datasets` splits with one row per image: `{image, image_id, captions}`, images decoded lazily.
"""

import os
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, Problem
from .caption_files import (
    CAPTION_FILES,
    METADATA_FILES,
    CaptionedImage,
    OnProblem,
    ResolvedColumns,
    _header_hint,
    caption_columns,
    read_caption_file,
)
from .hub_datasets import _from_hub
from .image_files import _check_image_files, image_folder
from .problems import raise_problem
from .splits import SPLITS, read_splits, split_by_image, split_of

if TYPE_CHECKING:
    from datasets import DatasetDict

# A missing local file with one of these suffixes is not looked for on the Hub.
FILE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".zip"})


@dataclass(frozen=True)
class Source:
    """What the text files of a data set say, before any image is opened.

    Args:
        images: by name, the captions.
        folder: that the names are relative to.
        splits: names by split; empty where the source does not split.
    """

    images: dict[str, CaptionedImage]
    folder: Path
    splits: dict[str, list[str]]


def load_captions(
    source: str | os.PathLike,
    *,
    image_dir: str | os.PathLike | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    id_column: str = "id",
    validation_fraction: float = 0.1,
    seed: int = 0,
    revision: str | None = None,
    stream_first_rows: int | None = None,
    allow_outside_images: bool = False,
) -> "DatasetDict":
    """Captioned images as `datasets` splits with one row per image.

    Args:
        source: one of
            - `"scenes"`, the built-in set of small drawn scenes;
            - a CSV or TSV file with a header (`id,image,caption`; `id` may be missing, an image with several captions
              has several rows) beside or above its images;
            - a Flickr8k folder (`Images/` with `captions.csv`, Kaggle's `captions.txt` or the original
              `Flickr8k.token.txt`, and the split files if there are any);
            - an imagefolder: images with `metadata.csv` or `metadata.jsonl`, in one folder or in one per split;
            - a data set on the Hub with an image column and captions as a list or as columns `caption_0`, ...
        image_dir: folder of the images of a caption file, if not found beside it.
        image_column: name of the column that identifies the image.
        caption_column: name of the column with the text.
        id_column: name of the caption's own id; kept as `caption_ids`, never used to group or to split.
        validation_fraction: share of the images that a seeded split sets aside where the source has no splits.
        seed: of that split.
        revision: commit, branch or tag of a Hub data set.
        stream_first_rows: number of rows to stream from the start of each split of a Hub dataset, into memory,
            instead of downloading all of it.
        allow_outside_images: let a caption file name images outside the folder of images (by `..`, an absolute path or
            a symbolic link): whoever wrote it then chooses which files of yours are read.

    Returns:
        `DatasetDict` with `train`, `validation` and, if the source has it, `test`; columns `image` (decoded when
        read), `image_id` (str, unique over the splits), `captions` (list of str) and perhaps `caption_ids`.

    Raises:
        DataError: a path, column, image file or caption is missing, named with its file and row.
    """
    if source == "scenes":
        from .scenes import build_scenes

        return build_scenes()
    path = Path(source).expanduser()
    columns = ResolvedColumns(image_column, [caption_column], id_column)
    if os.path.exists(path):  # Path.exists() raises an error at an impossible name
        local = read_source(path, image_dir, columns, allow_outside_images)
        return _dataset_dict(local, validation_fraction, seed)
    if path.suffix.lower() in FILE_SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        raise DataError(f"{source}: no such file or folder; name a CSV, a folder or a data set on the Hub")
    return _from_hub(str(source), columns, validation_fraction, seed, revision, stream_first_rows)


def read_source(
    path: Path,
    image_dir: str | os.PathLike | None,
    columns: ResolvedColumns,
    allow_outside: bool = False,
    found: OnProblem = raise_problem,
) -> Source:
    """What a caption file or a folder says of its images, which are looked for but not opened.

    Args:
        path: file or folder.
        image_dir: as in [`load_captions`].
        columns: that are wanted.
        allow_outside: `allow_outside_images` of [`load_captions`].
        found: told of each problem; the default raises a `DataError` at the first.

    Raises:
        DataError: there is nothing to go on with: no captions, no such column, no folder of images.
    """
    if path.is_file():
        return _read_caption_folder(path, path.parent, image_dir, columns, allow_outside, found)
    caption_file = next((path / name for name in CAPTION_FILES if (path / name).is_file()), None)
    if caption_file is not None:
        return _read_caption_folder(caption_file, path, image_dir, columns, allow_outside, found)
    return _read_image_folder(path, columns, allow_outside, found)


# --- a caption file with a folder of images -------------------------------------------------------------------------


def _read_caption_folder(
    caption_file: Path, root: Path, image_dir: Any, columns: ResolvedColumns, allow_outside: bool, found: OnProblem
) -> Source:
    images = read_caption_file(caption_file, lambda names, where: _exact_columns(names, where, columns), found)
    folder = Path(image_dir).expanduser() if image_dir is not None else image_folder(root, images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; name the right one with image_dir")
    _check_image_files(folder, folder, images, allow_outside, found)
    return Source(images, folder, read_splits(root, images, caption_file, found))


def _exact_columns(names: Collection[str], where: str, wanted: ResolvedColumns) -> ResolvedColumns:
    """The columns of a caption file: exactly those that were asked for, `id` if it is there."""
    for role, column in (("image", wanted.image), ("caption", wanted.captions[0])):
        if column not in names:
            raise DataError(
                f"{where}: no column {column!r}; the header has {', '.join(names) or 'nothing'}. Name the right one "
                f"with {role}_column{_header_hint(column, names)}"
            )
    return ResolvedColumns(wanted.image, wanted.captions, wanted.id if wanted.id in names else None)


def _metadata_columns(names: Collection[str], where: str, wanted: ResolvedColumns) -> ResolvedColumns:
    """The columns of an imagefolder's metadata, where the Hub's documentation names the image `file_name`."""
    image = next((column for column in (wanted.image, "file_name") if column in names), None)
    if image is None:
        raise DataError(f"{where}: no column 'file_name' among {', '.join(names)}; name it with image_column")
    found = ResolvedColumns(image, caption_columns(names, where, wanted.captions[0]))
    return ResolvedColumns(found.image, found.captions, wanted.id if wanted.id in names else None)


def _dataset_dict(source: Source, validation_fraction: float, seed: int) -> "DatasetDict":
    """Rows of image files; images are split by the seed as far as the source does not do it."""
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


# --- imagefolder ----------------------------------------------------------------------------------------------------


def _read_image_folder(path: Path, columns: ResolvedColumns, allow_outside: bool, found: OnProblem) -> Source:
    metadata = sorted(file for name in METADATA_FILES for file in path.rglob(name))
    if not metadata:
        raise DataError(
            f"{path}: no captions found; expected one of {', '.join(CAPTION_FILES[:3])}, or {METADATA_FILES[0]} or "
            f"{METADATA_FILES[1]} beside the images"
        )
    images: dict[str, CaptionedImage] = {}
    splits: dict[str, list[str]] = {}
    for file in metadata:
        rows = read_caption_file(file, lambda names, where: _metadata_columns(names, where, columns), found)
        _check_image_files(file.parent, path, rows, allow_outside, found)
        for name, entry in rows.items():
            image_id = Path(os.path.relpath(file.parent / name, path)).as_posix()
            if image_id in images:
                told = f"{image_id!r} is in {images[image_id].where} already"
                found(Problem("two-splits", told, entry.file, entry.rows[0], entry.column))
                continue
            images[image_id] = entry
            split = split_of(image_id)
            if split is not None:
                splits.setdefault(split, []).append(image_id)
    if splits and "train" not in splits:
        raise DataError(f"{path}: images in {', '.join(splits)} but none in train; name a folder train")
    return Source(images, path, splits)


# --- the Hub --------------------------------------------------------------------------------------------------------
