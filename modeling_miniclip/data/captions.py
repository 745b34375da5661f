"""Load captioned images from any source as splits with one row per image: `{image, image_id, captions}`."""

import errno
import os
import re
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
from .hub_datasets import load_from_hub
from .image_files import BAD_FILES, bad_files, image_folder
from .layouts import CAPTION_FILES, METADATA_FILES, find_caption_file, find_metadata_files
from .listing import walk_folders
from .picture_formats import unreadable_format
from .problems import OnProblem, raise_problem
from .recognise import SOURCE_KINDS, TAR_ENDINGS, recognise_file
from .splits import SPLITS, read_splits, split_by_image, split_of_folder

if TYPE_CHECKING:
    from datasets import DatasetDict

# A missing local file with one of these endings is not looked for on the Hub.
FILE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".zip")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
    """Load captioned images as `datasets` splits with one row per image.

    Args:
        source: one of
            - `"scenes"`, the built-in dataset of small drawn scenes;
            - a CSV or TSV file with a header (`id,image,caption`; `id` is optional, an image with several captions
              has several rows) next to its images or in the folder above them;
            - a Flickr8k folder (`Images/` with `captions.csv`, Kaggle's `captions.txt` or the original
              `Flickr8k.token.txt`, and optional split files);
            - an imagefolder: images with `metadata.csv` or `metadata.jsonl`, in one folder or in one per split;
            - a dataset on the Hub with an image column and captions as a list or as columns `caption_0`, ...
        image_dir: folder of the images of a caption file, if they are not next to it.
        image_column: name of the column that identifies the image.
        caption_column: name of the column with the text.
        id_column: name of the column with the caption's id; kept as `caption_ids`, never used to group or to split.
        validation_fraction: fraction of the images in the validation split, if the source has none.
        seed: random seed of the split into training and validation.
        revision: commit, branch or tag of a dataset on the Hub.
        stream_first_rows: number of rows to stream from the start of each split of a Hub dataset into memory, instead
            of downloading all of it.
        allow_outside_images: whether a caption file may name images outside the folder of images (with `..`, an
            absolute path or a symbolic link). Whoever wrote the file then chooses which of your files are read.

    Returns:
        `DatasetDict` with `train`, `validation` and, if the source has it, `test`; columns `image` (decoded when
        read), `image_id` (str, unique over the splits), `captions` (list of str) and, if there are ids, `caption_ids`.

    Raises:
        DataError: a path, column, image file or caption is missing; the message names its file and row.
    """
    if source == "scenes":
        from .scenes import build_scenes

        return build_scenes()
    columns = ColumnNames(image_column, caption_column, allow_outside_images, id_column)
    path = local_path(source)
    if path is None:
        return load_from_hub(str(source), columns, validation_fraction, seed, revision, stream_first_rows)
    return _build_splits(read_source(path, image_dir, columns), validation_fraction, seed)


def local_path(source: str | os.PathLike) -> Path | None:
    """The file or folder that a source names; None if it is the name of a dataset on the Hub.

    Raises:
        DataError: no such file or folder exists, and it cannot be the name of a dataset; or it cannot be reached.
    """
    path = Path(source).expanduser()
    try:
        os.stat(path)
        return path
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions and its disk") from error
    if path.name.lower().endswith(FILE_ENDINGS + TAR_ENDINGS) or not HUB_NAME.fullmatch(os.fspath(source)):
        raise DataError(f"{source}: no such file or folder; name a file, a folder or a dataset on the Hub")
    return None


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
