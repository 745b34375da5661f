"""Captioned images from a CSV, a folder, the Hub or the built-in set.

Every source ends as `datasets` splits with one row per image: `{image, image_id, captions}`, images decoded lazily.
"""

import csv
import difflib
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, Problem, one_line, refuse

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

CAPTION_FILES = ("captions.csv", "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    ".",
)
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
# Five rows of the original Flickr8k.token.txt name an image with a second suffix that was never published.
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"
# A missing local file with one of these suffixes is not looked for on the Hub.
FILE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".zip"})


@dataclass
class CaptionedImage:
    """One image of a caption file with everything that is said of it."""

    captions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each caption
    file: str = ""
    column: str = ""  # that names the image

    @property
    def where(self) -> str:
        """File, row and column that name it first."""
        return f"{self.file}, row {self.rows[0]}, column {self.column!r}"


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


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a source; `captions` are several where each caption has a column of its own."""

    image: str
    captions: list[str]
    id: str | None = None


# Number of a row as an editor shows it (that of its first line), its cells by column, and what is where.
Row = tuple[int, Mapping[str, Any], Columns]
# Tells from the names of the columns what is where; file and row are for its errors.
FindColumns = Callable[[Collection[str], str], Columns]
# Told of what is wrong; if it returns, the reader goes on without the row.
Found = Callable[[Problem], Any]


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
    stream_rows: int | None = None,
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
        stream_rows: of a Hub data set, take the first so many rows of each split as they arrive, into memory, instead
            of downloading all of it.
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
    columns = Columns(image_column, [caption_column], id_column)
    if os.path.exists(path):  # Path.exists() raises an error at an impossible name
        local = read_source(path, image_dir, columns, allow_outside_images)
        return _dataset_dict(local, validation_fraction, seed)
    if path.suffix.lower() in FILE_SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        raise DataError(f"{source}: no such file or folder; name a CSV, a folder or a data set on the Hub")
    return _from_hub(str(source), columns, validation_fraction, seed, revision, stream_rows)


def read_source(
    path: Path,
    image_dir: str | os.PathLike | None,
    columns: Columns,
    allow_outside: bool = False,
    found: Found = refuse,
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
    caption_file: Path, root: Path, image_dir: Any, columns: Columns, allow_outside: bool, found: Found
) -> Source:
    images = read_caption_file(caption_file, lambda names, where: _exact_columns(names, where, columns), found)
    folder = Path(image_dir).expanduser() if image_dir is not None else image_folder(root, images)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; name the right one with image_dir")
    _check_image_files(folder, folder, images, allow_outside, found)
    return Source(images, folder, read_splits(root, images, caption_file, found))


def read_caption_file(path: Path, find_columns: FindColumns, found: Found = refuse) -> dict[str, CaptionedImage]:
    """Captions by image name, in the order of the file.

    Args:
        path: CSV (also `.txt`), TSV or JSON lines with named columns, or Flickr8k's own `name#0<tab>caption`.
        find_columns: which columns to take.
        found: told of each problem: not UTF-8, a row that has too few fields, an empty caption or image name.

    Raises:
        DataError: a column is missing, there are no captions, or by `found`.
    """
    images: dict[str, CaptionedImage] = {}
    stray = 0
    for number, cells, columns in _read_rows(path, find_columns, found):
        name = _image_name(cells[columns.image], str(path), number, columns.image, found)
        if name == FLICKR8K_STRAY:
            stray += 1
        captions = _captions_of(cells, columns, str(path), number, found)
        if name in (None, FLICKR8K_STRAY) or (columns.captions and not captions):
            continue
        entry = images.setdefault(str(name), CaptionedImage(file=str(path), column=columns.image))
        entry.captions += captions
        entry.rows += [number] * (len(captions) or 1)
        if columns.id is not None:
            entry.ids.append(str(cells[columns.id]).strip())
    if stray:
        warnings.warn(
            f"{path}: dropped {stray} rows of {FLICKR8K_STRAY}, an image that was never published", stacklevel=2
        )
    if not images:
        raise DataError(f"{path}: no captions; expected a header and one row per caption")
    return images


def _read_rows(path: Path, find_columns: FindColumns, found: Found) -> Iterator[Row]:
    text = _read_utf8(path, found)
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text, find_columns, found)
    first_line = _lines(text, 1)[0]
    if re.match(r"[^\t,]+#\d+\t", first_line):
        return _token_rows(path, text, found)
    tabs = path.suffix.lower() == ".tsv" or ("\t" in first_line and "," not in first_line)
    other = next((sign for sign in ";|" if sign in first_line and not tabs and "," not in first_line), None)
    if other is not None:
        found(Problem("separator", f"fields are separated by {other!r}; save the file with commas", str(path), 1))
    return _csv_rows(path, text, "\t" if tabs else other or ",", find_columns, found)


def _csv_rows(path: Path, text: str, delimiter: str, find_columns: FindColumns, found: Found) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    start = 0  # line behind which the reader began

    def reader_behind(line: int) -> Any:
        # strict: a quotation mark that is never closed would silently swallow the rows behind it
        return csv.reader(islice(lines, line, None), delimiter=delimiter, skipinitialspace=True, strict=True)

    reader = reader_behind(0)
    header: list[str] = []
    while True:
        number = start + reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            told = (
                f"{error}; put a field that holds a comma or a quotation mark between quotation "
                'marks ("...") and write those within it twice ("")'
            )
            found(Problem("quotes", told, str(path), number))
            start, reader = number, reader_behind(number)
            continue
        if row is None:
            return
        if not header:
            header = [cell.strip() for cell in row]
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise DataError(f"{path}, row {number}: two columns are named {twice!r}; rename or delete one")
            columns = find_columns(header, f"{path}, row {number}")
        elif len(row) > 1 or "".join(row).strip():
            if len(row) != len(header):
                told = (
                    f"{len(row)} fields where the header has {len(header)} ({', '.join(header)}); put a caption that "
                    'holds a comma between quotation marks ("...")'
                )
                found(Problem("fields", told, str(path), number))
                continue
            yield number, dict(zip(header, row, strict=True)), columns


def _json_rows(path: Path, text: str, find_columns: FindColumns, found: Found) -> Iterator[Row]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
            json.dumps(cells, ensure_ascii=False).encode()  # fails at half a character, such as "\\ud800"
        except (ValueError, RecursionError) as error:
            found(Problem("json", f"not JSON that can be read: {one_line(error)}", str(path), number))
            continue
        if not isinstance(cells, dict):
            found(Problem("json", f"expected an object {{...}}, got {line[:80]!r}", str(path), number))
            continue
        yield number, cells, find_columns(cells, f"{path}, row {number}")


def _token_rows(path: Path, text: str, found: Found) -> Iterator[Row]:
    """Rows of the original `Flickr8k.token.txt`, which has no header."""
    columns = Columns("image", ["caption"])
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            told = f"expected name#number, a tab and a caption, got {line[:80]!r}"
            found(Problem("fields", told, str(path), number))
            continue
        yield number, {"image": name.rpartition("#")[0], "caption": caption}, columns


UNDECODED = re.compile("[\udc80-\udcff]")  # what stands for a byte that is not UTF-8


def _read_utf8(path: Path, found: Found) -> str:
    """The text of a file, in which a byte that is not UTF-8 is a lone surrogate; each row with one is a problem."""
    data = path.read_bytes()
    text = data.decode("utf-8-sig", "surrogateescape")
    position = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    row, done, told = 1, 0, 0
    for match in UNDECODED.finditer(text):
        before = text[done : match.start()]
        position += len(before.encode("utf-8", "surrogateescape"))
        row, done = row + len(_lines(before)) - 1, match.start()
        if row != told:
            what = f"byte {position} (0x{data[position]:02x}) is not UTF-8; save the file as UTF-8 (likely it is "
            what += "UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252: iconv -f CP1252 -t UTF-8)"
            found(Problem("encoding", what, str(path), row))
            told = row
    return text


def _lines(text: str, most: int = 0) -> list[str]:
    return re.split("\r\n|\r|\n", text, maxsplit=most)  # str.splitlines() also splits where no editor does


def _exact_columns(names: Collection[str], where: str, wanted: Columns) -> Columns:
    """The columns of a caption file: exactly those that were asked for, `id` if it is there."""
    for role, column in (("image", wanted.image), ("caption", wanted.captions[0])):
        if column not in names:
            raise DataError(
                f"{where}: no column {column!r}; the header has {', '.join(names) or 'nothing'}. Name the right one "
                f"with {role}_column{_header_hint(column, names)}"
            )
    return Columns(wanted.image, wanted.captions, wanted.id if wanted.id in names else None)


def _header_hint(column: str, names: Collection[str]) -> str:
    if any(re.search(r"\.(jpe?g|png|gif|bmp|webp|tiff?)(#\d+)?$", name.lower()) for name in names):
        return "; this row looks like data: write a header such as image,caption above it"
    near = difflib.get_close_matches(column, [name.lower() for name in names], n=1)
    return f"; did you mean {next(name for name in names if name.lower() == near[0])!r}?" if near else ""


def _metadata_columns(names: Collection[str], where: str, wanted: Columns) -> Columns:
    """The columns of an imagefolder's metadata, where the Hub's documentation names the image `file_name`."""
    image = next((column for column in (wanted.image, "file_name") if column in names), None)
    if image is None:
        raise DataError(f"{where}: no column 'file_name' among {', '.join(names)}; name it with image_column")
    found = Columns(image, caption_columns(names, where, wanted.captions[0]))
    return Columns(found.image, found.captions, wanted.id if wanted.id in names else None)


def caption_columns(names: Collection[str], where: str, wanted: str) -> list[str]:
    """Where captions are in a data set of someone else's: in `wanted`, in `wanted_0`, `wanted_1`, ... or as is usual.

    Raises:
        DataError: none of them is there.
    """
    numbered = [name for name in names if re.fullmatch(re.escape(wanted) + r"_?\d+", name)]
    numbered.sort(key=lambda name: int(name.removeprefix(wanted).lstrip("_")))
    for candidates in ([wanted], numbered, ["captions"], ["text"], ["sentences"]):
        if candidates and set(candidates) <= set(names):
            return candidates
    raise DataError(
        f"{where}: no captions: expected a column {wanted!r} (text or list) or columns {wanted}_0, {wanted}_1, ... "
        f"among {', '.join(names)}; name it with caption_column"
    )


def _image_name(cell: Any, file: str, row: int, column: str | None, found: Found) -> str | None:
    # One spelling for a file, that an image may not be two: "a.jpg" is also "./a.jpg", and "sub\\a.jpg" on Windows.
    name = cell.strip().replace("\\", "/") if isinstance(cell, str) else ""
    if not name:
        found(Problem("no-name", f"no image name, found {cell!r}; fill the cell or delete the row", file, row, column))
        return None
    return posixpath.normpath(name)


def _captions_of(cells: Mapping[str, Any], columns: Columns, file: str, row: int, found: Found = refuse) -> list[str]:
    """All captions of a row: of one column with text or a list of texts, or of several columns."""
    captions = []
    for column in columns.captions:
        value = cells[column]
        for caption in value if isinstance(value, list) and value else [value]:
            if isinstance(caption, str) and caption.strip():
                captions.append(caption.strip())
            else:
                told = f"the caption is empty or no text, found {caption!r}; fill it or delete the row"
                found(Problem("empty-caption", told, file, row, column))
    return captions


def image_folder(root: Path, images: Iterable[str]) -> Path:
    """The likely folder that holds most of the first images."""
    sample = list(islice(images, 100))
    return max(
        (root / name for name in IMAGE_FOLDERS),
        key=lambda folder: sum(os.path.isfile(folder / name) for name in sample),
    )


def _check_image_files(
    folder: Path, bounds: Path, images: Mapping[str, CaptionedImage], allow_outside: bool, found: Found
) -> None:
    """Find out which image files are not there, are empty, or lie outside.

    Args:
        folder: that the names are relative to.
        bounds: folder that no name may leave; it may itself be a symbolic link.
        images: by name.
        allow_outside: let names leave it.
        found: told of each problem.
    """
    by_kind: dict[str, list[str]] = {}
    for name, kind in bad_files(folder, bounds, images, allow_outside):
        by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        how = f"{BAD_FILES[kind]} ({len(names)} of {len(images)} images are {kind})"
        for name in names:
            entry, where = images[name], bounds if kind == "outside" else folder
            told = f"image file {name!r} {how.format(folder=where)}"
            image = name if folder == bounds else Path(os.path.relpath(folder / name, bounds)).as_posix()
            found(Problem(kind, told, entry.file, entry.rows[0], entry.column, image))


BAD_FILES = {
    "outside": "lies outside {folder}; put it there, or allow that by --allow_outside_images",
    "missing": "is not in {folder}; name the right folder with image_dir, or delete its rows",
    "empty": "in {folder} is empty; replace it or delete its rows",
}


def bad_files(folder: Path, bounds: Path, images: Iterable[str], allow_outside: bool) -> Iterator[tuple[str, str]]:
    """Name and kind of each file that is none of the data set's, or nothing."""
    root = os.path.realpath(bounds)
    inside: dict[str, bool] = {}  # by folder, that each file costs a system call or two

    def is_inside(path: str) -> bool:
        real = os.path.realpath(path)
        return real == root or real.startswith(os.path.join(root, ""))

    for name in images:
        parent, path = posixpath.dirname(name), os.path.join(folder, name)
        try:
            if parent not in inside:
                inside[parent] = allow_outside or is_inside(os.path.join(folder, parent))
            if not inside[parent]:
                yield name, "outside"
                continue
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                if not allow_outside and not is_inside(path):
                    yield name, "outside"
                    continue
                info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                yield name, "missing"
            elif info.st_size == 0:
                yield name, "empty"
        except (OSError, ValueError):  # ValueError: a null byte
            yield name, "missing"


def read_splits(
    root: Path, images: Mapping[str, CaptionedImage], caption_file: Path, found: Found = refuse
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


def _read_image_folder(path: Path, columns: Columns, allow_outside: bool, found: Found) -> Source:
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


def split_of(image_id: str) -> str | None:
    """The split that a folder of the image's path is named after."""
    folders = [part.lower() for part in image_id.split("/")[:-1]]
    return next((split for folder in folders if (split := SPLIT_ALIASES.get(folder, folder)) in SPLITS), None)


# --- the Hub --------------------------------------------------------------------------------------------------------


def _from_hub(
    name: str,
    columns: Columns,
    validation_fraction: float,
    seed: int,
    revision: str | None,
    stream_rows: int | None,
) -> "DatasetDict":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        raw = load_dataset(name, revision=revision, streaming=stream_rows is not None)
        if stream_rows is not None:
            raw = _first_rows(raw, stream_rows)
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
    raw: "DatasetDict", name: str, columns: Columns, validation_fraction: float, seed: int
) -> "DatasetDict":
    from datasets import DatasetDict, concatenate_datasets

    parts: dict[str, list[Dataset]] = {}
    first_use: dict[str, tuple[str, str]] = {}
    for raw_split, rows in raw.items():
        where = f"{name}, split {raw_split}"
        found = Columns(
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
    rows: "Dataset", columns: Columns, where: str, split: str, first_use: dict[str, tuple[str, str]]
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
