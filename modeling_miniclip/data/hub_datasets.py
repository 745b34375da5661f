"""Read a dataset of the Hugging Face Hub into one row per image."""

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, one_line
from .caption_files import ResolvedColumns, _captions_of, caption_columns
from .splits import SPLIT_ALIASES, SPLITS, split_by_image

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict


def _from_hub(
    name: str,
    columns: ResolvedColumns,
    validation_fraction: float,
    seed: int,
    revision: str | None,
    stream_first_rows: int | None,
) -> "DatasetDict":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        raw = load_dataset(name, revision=revision, streaming=stream_first_rows is not None)
        if stream_first_rows is not None:
            raw = _first_rows(raw, stream_first_rows)
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        hint = ""
        if "script" in str(error):
            hint = '; the Hub keeps most such sets as files too: revision="refs/convert/parquet"'
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that the Hub gives: {one_line(error)}{hint}"
        ) from error
    return _one_row_per_image(raw, name, columns, validation_fraction, seed)


def _first_rows(streamed: "IterableDatasetDict", count: int) -> "DatasetDict":
    """The first rows of each split, their images as they are encoded."""
    from datasets import Dataset, DatasetDict, Image

    taken = DatasetDict()
    for split, rows in streamed.items():
        features = rows.features
        for name, feature in features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
        taken[split] = Dataset.from_list(list(rows.take(count)), features=rows.features).cast(features)
    return taken


def _one_row_per_image(
    raw: "DatasetDict", name: str, columns: ResolvedColumns, validation_fraction: float, seed: int
) -> "DatasetDict":
    from datasets import DatasetDict, concatenate_datasets

    parts: dict[str, list[Dataset]] = {}
    first_use: dict[str, tuple[str, str]] = {}
    for raw_split, rows in raw.items():
        where = f"{name}, split {raw_split}"
        found = ResolvedColumns(
            find_image_column(rows, where, columns.image),
            caption_columns(rows.column_names, where, columns.captions[0]),
        )
        grouped, first_rows, part_of = _group_captions(rows, found, where, raw_split, first_use)
        for part in dict.fromkeys(part_of):
            parts.setdefault(part, []).append(grouped.select([i for i in first_rows if part_of[i] == part]))
    splits = {split: concatenate_datasets(several) for split, several in parts.items()}
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    if "train" not in splits:
        raise DataError(f"{name}: no train split among {', '.join(splits)}; name one of them train")
    left_out = sum(len(rows) for split, rows in splits.items() if split not in SPLITS)
    if left_out:
        warnings.warn(f"{name}: left out {left_out} images that are in none of {', '.join(SPLITS)}", stacklevel=2)
    if "validation" not in splits:
        train = splits["train"]
        indices = split_by_image([str(i) for i in range(len(train))], validation_fraction, seed)
        splits |= {split: train.select([int(i) for i in chosen]) for split, chosen in indices.items()}
    return DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def _group_captions(
    rows: "Dataset", columns: ResolvedColumns, where: str, split: str, first_use: dict[str, tuple[str, str]]
) -> tuple["Dataset", list[int], list[str]]:
    """Rows that show the same image become one, the first of them.

    Args:
        rows: of one split of the Hub.
        columns: what is where.
        where: data set and split, for errors.
        split: the Hub's name of it.
        first_use: where each image was met so far, to find one in two splits; added to.

    Returns:
        `rows` with `image`, `image_id` and `captions` (all the captions of an image in its first row), the numbers of
        these first rows, and the split of each row.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets

    # A `split` column (as nlphuji/flickr30k has) tells more than the split of the Hub.
    part_of = [str(part) for part in rows["split"]] if "split" in rows.column_names else [split] * len(rows)
    part_of = [SPLIT_ALIASES.get(part, part) for part in part_of]
    keys, image_ids = _image_keys(rows, columns.image, where, split)
    captions: list[list[str]] = [[] for _ in keys]
    first: dict[str, int] = {}
    for i, (key, cells) in enumerate(zip(keys, rows.select_columns(columns.captions), strict=True)):
        captions[first.setdefault(key, i)] += _captions_of(cells, columns, where, i)
        here = (where, part_of[i])
        if first_use.setdefault(key, here) != here:
            raise DataError(
                f"{where}, row {i}: image {image_ids[i]!r} is in the split {part_of[i]} here and in the split "
                f"{first_use[key][1]} of {first_use[key][0]}; an image is in one split"
            )
    text = Dataset.from_dict(
        {"image_id": image_ids, "captions": captions},
        features=Features({"image_id": Value("string"), "captions": [Value("string")]}),
    )
    images = rows.select_columns([columns.image]).rename_columns({columns.image: "image"})
    # Joined before any row is selected: datasets would copy all images to join a selection.
    return concatenate_datasets([images, text], axis=1), list(first.values()), part_of


def _image_keys(rows: "Dataset", image_column: str, where: str, split: str) -> tuple[list[str], list[str]]:
    """What identifies each row's image, and its `image_id`: a column that names it, else the image's content."""
    from datasets import Image

    empty = np.flatnonzero(rows.data.column(image_column).is_null().to_numpy())
    if len(empty):
        raise DataError(f"{where}, row {empty[0]}, column {image_column!r}: no image; fill it or leave the row out")
    named_by = next((c for c in ("filename", "file_name", "image_id", "img_id") if c in rows.column_names), None)
    if named_by is not None:
        names = [str(name) for name in rows[named_by]]
        return names, names
    undecoded = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    keys = []
    for row in undecoded:
        content = row[image_column]["bytes"] or Path(row[image_column]["path"]).read_bytes()
        keys.append(hashlib.sha256(content).hexdigest())
    return keys, [f"{split}-{i:06d}" for i in range(len(rows))]


def find_image_column(rows: "Dataset", where: str, wanted: str) -> str:
    """The column of images: `wanted`, or else the only one that holds any.

    Raises:
        DataError: there is none, or several; the columns of `where` are named.
    """
    from datasets import Image

    candidates = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if wanted in candidates:
        return wanted
    if len(candidates) != 1:
        raise DataError(
            f"{where}: expected an image column {wanted!r}, found image columns {candidates or 'none'} among "
            f"{', '.join(rows.column_names)}; name it with image_column"
        )
    return candidates[0]
