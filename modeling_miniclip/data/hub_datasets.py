"""Load a dataset from the Hugging Face Hub as splits with one row per image."""

import hashlib
import warnings
from typing import TYPE_CHECKING

import fsspec
import numpy as np

from ..errors import DataError, Problem, one_line
from .columns import ColumnNames, ResolvedColumns, caption_columns, captions_of_row
from .splits import SPLIT_ALIASES, SPLITS, split_by_image

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

# Columns that identify the image of a row, for datasets that repeat an image once for each caption.
NAME_COLUMNS = ("filename", "file_name", "image_id", "img_id")


def load_from_hub(
    name: str,
    columns: ColumnNames,
    validation_fraction: float,
    seed: int,
    revision: str | None,
    stream_first_rows: int | None,
) -> "DatasetDict":
    """Load a dataset by its name on the Hub.

    Args:
        name: name of the dataset.
        columns: columns to look for.
        validation_fraction, seed, revision, stream_first_rows: as in `load_captions`.

    Raises:
        DataError: the dataset cannot be loaded, or has no usable images and captions.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        raw = load_dataset(name, revision=revision, streaming=stream_first_rows is not None)
        if stream_first_rows is not None:
            raw = _first_rows(raw, stream_first_rows)
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        if "script" in reason:  # datasets has no separate error class for this
            reason += '; the Hub keeps most such datasets as files too: revision="refs/convert/parquet"'
        raise DataError(f"{name!r} is neither a local file or folder nor a dataset on the Hub: {reason}") from error
    return one_row_per_image(raw, name, columns, validation_fraction, seed)


def _first_rows(streamed: "IterableDatasetDict", count: int) -> "DatasetDict":
    """The first rows of each split, without decoding their images."""
    from datasets import Dataset, DatasetDict, Image

    taken = DatasetDict()
    for split, rows in streamed.items():
        features = rows.features
        for name, feature in features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
        taken[split] = Dataset.from_list(list(rows.take(count)), features=rows.features).cast(features)
    return taken


def one_row_per_image(
    raw: "DatasetDict", name: str, columns: ColumnNames, validation_fraction: float, seed: int
) -> "DatasetDict":
    """Group the captions of each image, and assign the rows to the usual splits.

    Args:
        raw: splits of the dataset as they are on the Hub.
        name: name of the dataset, for errors.
        columns, validation_fraction, seed: as in [`load_from_hub`].

    Raises:
        DataError: a column, an image or a caption is missing, an image is in two splits, or there is no train split.
    """
    from datasets import DatasetDict, concatenate_datasets

    parts: dict[str, list[Dataset]] = {}
    first_use: dict[str, tuple[str, str]] = {}
    for hub_split, rows in raw.items():
        where = f"{name}, split {hub_split}"
        resolved = ResolvedColumns(
            find_image_column(rows, where, columns.image),
            caption_columns(rows.column_names, where, None, columns.caption),
        )
        grouped, first_rows, part_of = _group_captions(rows, resolved, where, hub_split, first_use)
        for part in dict.fromkeys(part_of):
            parts.setdefault(part, []).append(grouped.select([i for i in first_rows if part_of[i] == part]))
    splits = {split: concatenate_datasets(several) for split, several in parts.items()}
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        text = f"no train split among {', '.join(splits)}; name one of them train"
        raise DataError(Problem("unusable", text, name))
    left_out = sum(len(rows) for split, rows in splits.items() if split not in SPLITS)
    if left_out:
        warnings.warn(f"{name}: left out {left_out} images that are in none of {', '.join(SPLITS)}", stacklevel=2)
    if "validation" not in splits:
        train = splits["train"]
        indices = split_by_image([str(i) for i in range(len(train))], validation_fraction, seed)
        splits |= {split: train.select([int(i) for i in chosen]) for split, chosen in indices.items()}
    return DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def find_image_column(rows: "Dataset", where: str, wanted: str) -> str:
    """The image column: `wanted`, or else the only column of images.

    Args:
        rows: one split of the dataset.
        where: dataset and split, for the error.
        wanted: name of the column that was asked for.

    Raises:
        DataError: there is no image column, or there are several.
    """
    from datasets import Image

    candidates = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if wanted in candidates:
        return wanted
    if len(candidates) != 1:
        text = (
            f"expected an image column {wanted!r}, found image columns {candidates or 'none'} among "
            f"{', '.join(rows.column_names)}; name it with image_column"
        )
        raise DataError(Problem("unusable", text, where))
    return candidates[0]


def _group_captions(
    rows: "Dataset", columns: ResolvedColumns, where: str, split: str, first_use: dict[str, tuple[str, str]]
) -> tuple["Dataset", list[int], list[str]]:
    """Collect the captions of rows that show the same image in the first of these rows.

    Args:
        rows: one split of the dataset.
        columns: image column and caption columns.
        where: dataset and split, for errors.
        split: name of the split on the Hub.
        first_use: dataset and split where each image was found first, to detect images in two splits; updated here.

    Returns:
        `rows` with the columns `image`, `image_id` and `captions` (all captions of an image in its first row), the
        numbers of these first rows, and the split of each row.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets

    # A `split` column (as in nlphuji/flickr30k) is more precise than the split on the Hub.
    part_of = [str(part) for part in rows["split"]] if "split" in rows.column_names else [split] * len(rows)
    part_of = [SPLIT_ALIASES.get(part, part) for part in part_of]
    keys, image_ids = _image_keys(rows, columns.image, where, split)
    captions: list[list[str]] = [[] for _ in keys]
    first: dict[str, int] = {}
    for i, (key, cells) in enumerate(zip(keys, rows.select_columns(columns.captions), strict=True)):
        captions[first.setdefault(key, i)] += captions_of_row(cells, columns, where, i)
        here = (where, part_of[i])
        if first_use.setdefault(key, here) != here:
            text = (
                f"image {image_ids[i]!r} is in the split {part_of[i]} here and in the split {first_use[key][1]} of "
                f"{first_use[key][0]}; an image can be in only one split"
            )
            raise DataError(Problem("two-splits", text, where, i))
    text_columns = Dataset.from_dict(
        {"image_id": image_ids, "captions": captions},
        features=Features({"image_id": Value("string"), "captions": [Value("string")]}),
    )
    images = rows.select_columns([columns.image]).rename_columns({columns.image: "image"})
    # Joined before any rows are selected: datasets would copy all images to join a selection.
    return concatenate_datasets([images, text_columns], axis=1), list(first.values()), part_of


def _image_keys(rows: "Dataset", image_column: str, where: str, split: str) -> tuple[list[str], list[str]]:
    """What identifies each row's image (a column that names it, else a hash of its content), and its `image_id`."""
    from datasets import Image

    empty = np.flatnonzero(rows.data.column(image_column).is_null().to_numpy())
    if len(empty):
        raise DataError(
            Problem("missing", "no image; fill it or leave the row out", where, int(empty[0]), image_column)
        )
    named_by = next((column for column in NAME_COLUMNS if column in rows.column_names), None)
    if named_by is not None:
        names = [str(name) for name in rows[named_by]]
        return names, names
    undecoded = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    keys = []
    for row in undecoded:
        content = row[image_column]["bytes"]
        if not content:
            with fsspec.open(row[image_column]["path"], "rb") as file:  # a file here, or on the Hub (hf://)
                content = file.read()
        keys.append(hashlib.sha256(content).hexdigest())
    return keys, [f"{split}-{i:06d}" for i in range(len(rows))]
