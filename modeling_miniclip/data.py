"""Captioned images from a CSV, a folder, the Hub or the built-in set.

Every source ends as `datasets` splits with one row per image: `{image, image_id, captions}`, images decoded lazily.
"""

import csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CAPTION_FILES = ("captions.csv", "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    ".",
)
SPLIT_FILES = {
    "train": ("train.txt", "Flickr_8k.trainImages.txt", "Flickr8k_text/Flickr_8k.trainImages.txt"),
    "validation": ("validation.txt", "val.txt", "Flickr_8k.devImages.txt", "Flickr8k_text/Flickr_8k.devImages.txt"),
    "test": ("test.txt", "Flickr_8k.testImages.txt", "Flickr8k_text/Flickr_8k.testImages.txt"),
}
# Hub data sets name their validation split in several ways; "restval" is Karpathy's extra training part.
SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "restval": "train"}
# Five rows of the original Flickr8k.token.txt name an image with a second suffix that was never published.
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"


@dataclass
class CaptionedImage:
    """One image of a caption file with everything that is said of it."""

    captions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    first_row: int = 0


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
) -> "DatasetDict":
    """Captioned images as `datasets` splits with one row per image.

    Args:
        source: one of
            - `"scenes"`, the built-in set of small drawn scenes;
            - a CSV file with a header (`id,image,caption`; `id` may be missing, an image with several captions has
              several rows) beside or above its images;
            - a Flickr8k folder (`Images/` with `captions.csv`, Kaggle's `captions.txt` or the original
              `Flickr8k.token.txt`, and the split files if there are any);
            - an imagefolder: images with `metadata.csv` or `metadata.jsonl`;
            - a data set on the Hub with an image column and captions as a list or as columns `caption_0`, ...
        image_dir: folder of the images of a caption file, if not found beside it.
        image_column: name of the column that identifies the image.
        caption_column: name of the column with the text.
        id_column: name of the caption's own id; kept as `caption_ids`, never used to group or to split.
        validation_fraction: share of the images that a seeded split sets aside where the source has no splits.
        seed: of that split.
        revision: commit, branch or tag of a Hub data set.

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
    columns = {"image": image_column, "caption": caption_column, "id": id_column}
    if path.is_file():
        return _from_caption_file(path, path.parent, image_dir, columns, validation_fraction, seed)
    if path.is_dir():
        caption_file = next((path / name for name in CAPTION_FILES if (path / name).is_file()), None)
        if caption_file is not None:
            return _from_caption_file(caption_file, path, image_dir, columns, validation_fraction, seed)
        return _from_image_folder(path, columns, validation_fraction, seed)
    if path.suffix or path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise DataError(f"{source}: no such file or folder")
    return _from_hub(str(source), columns, validation_fraction, seed, revision)


# --- a caption file with a folder of images -------------------------------------------------------------------------


def _from_caption_file(
    caption_file: Path, root: Path, image_dir: Any, columns: dict[str, str], validation_fraction: float, seed: int
) -> "DatasetDict":
    images = read_caption_file(caption_file, columns)
    folder = Path(image_dir).expanduser() if image_dir is not None else _image_folder(root, images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    _check_image_files(caption_file, folder, images)
    splits = _read_splits(root, images, caption_file)
    if splits is None:
        splits = split_by_image(sorted(images), validation_fraction, seed)
    return _dataset_dict({split: _rows_of(names, images, folder) for split, names in splits.items()})


def read_caption_file(path: Path, columns: dict[str, str]) -> dict[str, CaptionedImage]:
    """Captions by image name, in the order of the file.

    Args:
        path: CSV (also `.txt`) or TSV with a header, or Flickr8k's own `name#0<tab>caption` without one.
        columns: names of the columns: `image`, `caption` and the optional `id`.

    Raises:
        DataError: not UTF-8, a column is missing, a row has too few fields, a caption or image name is empty.
    """
    images: dict[str, CaptionedImage] = {}
    stray = 0
    for row_number, caption_id, name, caption in _caption_rows(path, columns):
        if name == FLICKR8K_STRAY:
            stray += 1
            continue
        if not name:
            raise DataError(f"{path}, row {row_number}: no image name; fill the cell or delete the row")
        if not caption.strip():
            raise DataError(f"{path}, row {row_number}: the caption of {name} is empty; fill it or delete the row")
        entry = images.setdefault(name, CaptionedImage(first_row=row_number))
        entry.captions.append(caption.strip())
        if caption_id is not None:
            entry.ids.append(caption_id)
    if stray:
        warnings.warn(
            f"{path}: dropped {stray} rows of {FLICKR8K_STRAY}, an image that was never published", stacklevel=2
        )
    if not images:
        raise DataError(f"{path}: no captions; expected a header and one row per caption")
    return images


def _caption_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, str | None, str, str]]:
    """(row number in the file, id or None, image name, caption) of each row."""
    text = _read_utf8(path)
    first_line = text[: text.find("\n")] if "\n" in text else text
    if re.match(r"[^\t,]+#\d+\t", first_line):  # Flickr8k.token.txt
        for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
            name, tab, caption = line.partition("\t")
            if not tab or "#" not in name:
                raise DataError(f"{path}, row {number}: expected name#number, a tab and a caption, got {line[:80]!r}")
            yield number, None, name.rpartition("#")[0], caption.rstrip("\r")
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    header = [cell.strip() for cell in next(reader, [])]
    for role in ("image", "caption"):
        if columns[role] not in header:
            raise DataError(
                f"{path}, row 1: no column {columns[role]!r}; the header has {', '.join(header) or 'nothing'}. Name "
                f"the right one with {role}_column"
            )
    image_at, caption_at = header.index(columns["image"]), header.index(columns["caption"])
    id_at = header.index(columns["id"]) if columns["id"] in header else None
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {reader.line_num}: {len(row)} fields where the header has {len(header)}; put a caption "
                'that holds a comma between quotation marks ("...")'
            )
        yield reader.line_num, None if id_at is None else row[id_at], row[image_at].strip(), row[caption_at]


def _read_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _image_folder(root: Path, images: Iterable[str]) -> Path:
    first = next(iter(images))
    return next((root / name for name in IMAGE_FOLDERS if (root / name / first).is_file()), root / "Images")


def _check_image_files(caption_file: Path, folder: Path, images: dict[str, CaptionedImage]) -> None:
    missing = [name for name in images if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{caption_file}, row {images[missing[0]].first_row}: image file {missing[0]!r} is not in {folder} "
            f"({len(missing)} of {len(images)} images are missing); name the right folder with image_dir, or delete "
            "their rows"
        )


def _read_splits(root: Path, images: dict[str, CaptionedImage], caption_file: Path) -> dict[str, list[str]] | None:
    """Image names by split from the split files beside a caption file; None where there are none."""
    found = {
        split: next((root / n for n in names if (root / n).is_file()), None) for split, names in SPLIT_FILES.items()
    }
    if found["train"] is None:
        return None
    splits: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    for split, path in found.items():
        if path is None or path == caption_file:
            continue
        splits[split] = []
        for number, line in enumerate(_read_utf8(path).splitlines(), 1):
            name = line.strip()
            if not name:
                continue
            if name not in images:
                raise DataError(f"{path}, row {number}: {name!r} has no caption in {caption_file}")
            if name in split_of:
                raise DataError(f"{path}, row {number}: {name!r} is in the {split_of[name]} split already")
            split_of[name] = split
            splits[split].append(name)
    left_out = len(images) - len(split_of)
    if left_out:
        warnings.warn(f"{root}: left out {left_out} images that are in no split file", stacklevel=2)
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


def _rows_of(names: list[str], images: dict[str, CaptionedImage], folder: Path) -> dict[str, list]:
    rows: dict[str, list] = {
        "image": [str(folder / name) for name in names],
        "image_id": list(names),
        "captions": [images[name].captions for name in names],
    }
    if any(image.ids for image in images.values()):
        rows["caption_ids"] = [images[name].ids for name in names]
    return rows


def _dataset_dict(rows_of_split: dict[str, dict[str, list]]) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, Image

    return DatasetDict(
        {split: Dataset.from_dict(rows).cast_column("image", Image()) for split, rows in rows_of_split.items()}
    )


# --- imagefolder and Hub --------------------------------------------------------------------------------------------


def _from_image_folder(path: Path, columns: dict[str, str], validation_fraction: float, seed: int) -> "DatasetDict":
    if not any(path.rglob("metadata.csv")) and not any(path.rglob("metadata.jsonl")):
        raise DataError(
            f"{path}: no captions found; expected one of {', '.join(CAPTION_FILES[:3])} or a metadata.csv or "
            "metadata.jsonl beside the images"
        )
    from datasets import load_dataset

    raw = load_dataset("imagefolder", data_dir=str(path))
    return _one_row_per_image(raw, str(path), columns, validation_fraction, seed, root=path)


def _from_hub(
    name: str, columns: dict[str, str], validation_fraction: float, seed: int, revision: str | None
) -> "DatasetDict":
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        raw = load_dataset(name, revision=revision)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that the Hub gives: {error}"
        ) from error
    return _one_row_per_image(raw, name, columns, validation_fraction, seed)


def _one_row_per_image(
    raw: "DatasetDict",
    name: str,
    columns: dict[str, str],
    validation_fraction: float,
    seed: int,
    root: Path | None = None,
) -> "DatasetDict":
    from datasets import DatasetDict, concatenate_datasets

    splits: dict[str, Dataset] = {}
    for split, rows in raw.items():
        for part, part_rows in _split_by_column(rows, split):
            part_name = SPLIT_ALIASES.get(part, part)
            grouped = _group_captions(part_rows, f"{name}, split {part}", part, columns, root)
            earlier = [splits[part_name]] if part_name in splits else []
            splits[part_name] = concatenate_datasets([*earlier, grouped])
    if "train" not in splits:
        if len(splits) != 1:
            raise DataError(f"{name}: no train split among {', '.join(splits)}")
        splits = {"train": next(iter(splits.values()))}
    if "validation" not in splits:
        train = splits["train"]
        parts = split_by_image([str(i) for i in range(len(train))], validation_fraction, seed)
        splits |= {part: train.select([int(i) for i in indices]) for part, indices in parts.items()}
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})


def _split_by_column(rows: "Dataset", split: str) -> Iterator[tuple[str, "Dataset"]]:
    """Parts named by a `split` column (as nlphuji/flickr30k has), else the whole."""
    if "split" not in rows.column_names:
        yield split, rows
        return
    names = np.array(rows["split"])
    for part in dict.fromkeys(names):
        yield str(part), rows.select(np.flatnonzero(names == part))


def _group_captions(rows: "Dataset", where: str, split: str, columns: dict[str, str], root: Path | None) -> "Dataset":
    """One row per image: rows that name the same image are merged, in the order of their first appearance."""
    from datasets import Dataset, Image, concatenate_datasets

    image_column = _image_column(rows, where, columns["image"])
    captions = _caption_lists(rows, where, columns["caption"])
    group_by = next((c for c in ("image_id", "img_id", "filename", "file_name") if c in rows.column_names), None)
    if group_by is not None:
        keys = [str(key) for key in rows[group_by]]
    elif root is not None:
        undecoded = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        keys = [os.path.relpath(entry["path"], root) for entry in undecoded[image_column]]
    else:
        keys = [f"{split}-{i:06d}" for i in range(len(rows))]
    first: dict[str, int] = {}
    merged: dict[str, list[str]] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
        merged.setdefault(key, []).extend(captions[i])
    text = Dataset.from_dict({"image_id": list(first), "captions": list(merged.values())})
    images = rows.select(list(first.values())).select_columns([image_column])
    if image_column != "image":
        images = images.rename_column(image_column, "image")
    return concatenate_datasets([images, text], axis=1)


def _image_column(rows: "Dataset", where: str, wanted: str) -> str:
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


def _caption_lists(rows: "Dataset", where: str, wanted: str) -> list[list[str]]:
    numbered = sorted(c for c in rows.column_names if re.fullmatch(re.escape(wanted) + r"_?\d+", c))
    single = next((c for c in (wanted, "captions", "text", "sentences") if c in rows.column_names), None)
    if single is not None:
        lists = [[value] if isinstance(value, str) else list(value or []) for value in rows[single]]
    elif numbered:
        lists = [list(row) for row in zip(*(rows[c] for c in numbered), strict=True)]
    else:
        raise DataError(
            f"{where}: no captions: expected a column {wanted!r} (text or list) or columns {wanted}_0, {wanted}_1, "
            f"... among {', '.join(rows.column_names)}; name it with caption_column"
        )
    for i, captions in enumerate(lists):
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise DataError(f"{where}, row {i}: empty caption in {captions!r}")
    return lists
