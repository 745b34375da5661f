"""Images to be indexed, from wherever they are: folders, caption files, data sets here or on the Hub, tar archives."""

import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, UsageError, one_line
from .caption_files import (
    CAPTION_FILES,
    METADATA_FILES,
    CaptionedImage,
    ResolvedColumns,
    caption_columns,
    read_caption_file,
)
from .captions import FILE_SUFFIXES
from .hub_datasets import find_image_column
from .image_files import IMAGE_SUFFIXES, bad_files, image_folder
from .splits import read_splits, split_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".jsonl"})
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")  # of Dataset.save_to_disk and DatasetDict.save_to_disk
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "file", "filepath")
UNKNOWN = -1  # size or time of what is not a file


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet.

    Args:
        id: absolute path of an image file; for others the path or name of what holds them, `/`, and their name there.
        read: gives the encoded image.
        path: of the image file, None for an image that is not a file of its own.
        size: bytes, or `UNKNOWN`.
        mtime: time of last change in nanoseconds, or `UNKNOWN`: such an image is read again to see whether it changed.
        captions: what is said of it.
        split: `train`, `validation`, ..., or "".
    """

    id: str
    read: Callable[[], bytes]
    path: str | None = None
    size: int = UNKNOWN
    mtime: int = UNKNOWN
    captions: list[str] = field(default_factory=list)
    split: str = ""


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of caption files and data sets are called, and whether names may leave the folder of images."""

    image: str = "image"
    caption: str = "caption"
    allow_outside_images: bool = False


DEFAULT_COLUMNS = ColumnNames()


def resolve_source(source: str | os.PathLike) -> str:
    """A source by a name that does not depend on the working folder: an absolute path, or the name of a data set.

    Raises:
        DataError: neither a file or folder here, nor anything that could be a data set's name.
    """
    path = Path(source).expanduser()
    if path.exists():
        return os.path.abspath(path)
    name = os.fspath(source)
    if path.suffix.lower() in FILE_SUFFIXES | set(TAR_SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(f"{source}: no such file or folder; name one, or a data set on the Hub")
    return name


def walk_source(source: str, columns: ColumnNames = DEFAULT_COLUMNS) -> Iterator[Item]:
    """The images of one source, in an order that does not change.

    Args:
        source: as [`resolve_source`] gives it:
            - a folder: all image files in it and below it (hidden ones left out), with the captions and splits of a
              caption file or of `metadata.csv` in it;
            - a CSV, TSV or JSON lines file that names images beside it, with or without captions;
            - a tar archive; `name.txt`, or the `caption` in `name.json`, is the caption of `name.jpg`;
            - a folder of `Dataset.save_to_disk`, a Parquet file, a data set on the Hub (streamed), or `scenes`.
        columns: names in caption files and data sets.

    Raises:
        DataError: the source cannot be read, or has no image.
    """
    items = _walker(source)(source, columns)
    first = next(items, None)
    if first is None:
        raise DataError(f"{source}: no images found; nothing that was indexed from it has been dropped")
    yield first
    yield from items


def _walker(source: str) -> Callable[[str, ColumnNames], Iterator[Item]]:
    path = Path(source)
    if path.is_dir():
        saved = any((path / name).is_file() for name in SAVED_DATASETS)
        return _walk_saved if saved else _walk_folder
    if path.is_file():
        name, suffix = path.name.lower(), path.suffix.lower()
        if name.endswith(TAR_SUFFIXES):
            return _walk_tar
        if suffix in TABLE_SUFFIXES:
            return _walk_table
        if suffix == ".parquet":
            return _walk_parquet
        if suffix in IMAGE_SUFFIXES:
            return lambda source, columns: iter([_file_item(source)])
        raise DataError(
            f"{source}: expected a folder, an image, a caption file ({', '.join(sorted(TABLE_SUFFIXES))}), Parquet or "
            f"a tar archive ({', '.join(TAR_SUFFIXES)})"
        )
    return _walk_scenes if source == "scenes" else _walk_hub


def _file_item(path: str, captions: list[str] | None = None, split: str = "") -> Item:
    """A file as it is now; one that is not there has neither size nor time, and cannot be read."""
    try:
        stat = os.stat(path)
        size, mtime = stat.st_size, stat.st_mtime_ns
    except OSError:
        size = mtime = UNKNOWN
    return Item(path, Path(path).read_bytes, path, size, mtime, captions or [], split)


# --- folders and caption files --------------------------------------------------------------------------------------


def _walk_folder(source: str, columns: ColumnNames) -> Iterator[Item]:
    captions, splits = _captions_of_folder(Path(source), columns)
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                path = os.path.join(folder, name)
                split = splits.get(path) or split_of(os.path.relpath(path, source).replace(os.sep, "/")) or ""
                yield _file_item(path, captions.get(path), split)


def _captions_of_folder(root: Path, columns: ColumnNames) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions, and splits of split files, by the absolute path of the image."""
    caption_file = next((root / name for name in CAPTION_FILES if (root / name).is_file()), None)
    files = [caption_file] if caption_file else sorted(f for name in METADATA_FILES for f in root.rglob(name))
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for file in files:
        images = _read_table(file, columns)
        folder = image_folder(root, images) if caption_file else file.parent
        paths = {name: os.path.normpath(folder / name) for name in images}
        captions |= {paths[name]: image.captions for name, image in images.items()}
        if caption_file:
            found = read_splits(root, images, caption_file)
            splits = {paths[name]: split for split, names in found.items() for name in names}
    return captions, splits


def _walk_table(source: str, columns: ColumnNames) -> Iterator[Item]:
    file = Path(source)
    images = _read_table(file, columns)
    folder = image_folder(file.parent, images)
    splits = {name: split for split, names in read_splits(file.parent, images, file).items() for name in names}
    bad = dict(bad_files(folder, file.parent, images, columns.allow_outside_images))
    for name, image in images.items():
        path = os.path.normpath(folder / name)
        if bad.get(name) == "outside":
            yield Item(path, partial(_refuse, folder), path)
        else:
            yield _file_item(path, image.captions, splits.get(name) or split_of(name) or "")


def _refuse(folder: Path) -> bytes:
    raise DataError(f"lies outside {folder}; put it there, or allow that by --allow_outside_images")


def _read_table(file: Path, columns: ColumnNames) -> dict[str, CaptionedImage]:
    return read_caption_file(file, lambda names, where: _find_columns(names, where, columns))


def _find_columns(names: Collection[str], where: str, columns: ColumnNames) -> ResolvedColumns:
    """An image column by its given or any usual name, and captions where there are some: an index needs none."""
    image = next((name for name in (columns.image, *IMAGE_COLUMNS) if name in names), None)
    if image is None:
        raise DataError(f"{where}: no column {columns.image!r} among {', '.join(names)}; name it with --image_column")
    return ResolvedColumns(image, _find_captions(names, where, columns.caption))


def _find_captions(names: Collection[str], where: str, wanted: str) -> list[str]:
    try:
        return caption_columns(names, where, wanted)
    except DataError:
        return []


# --- tar archives ---------------------------------------------------------------------------------------------------


def _walk_tar(source: str, columns: ColumnNames) -> Iterator[Item]:
    """Members in their order. As in WebDataset, neighbours that differ in their suffix only belong together."""
    images: list[Item] = []
    captions: list[str] = []
    current = ""
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, suffix = os.path.splitext(member.name)
                if stem != current:
                    yield from _captioned(source, images, captions)
                    images, captions, current = [], [], stem
                if suffix.lower() in IMAGE_SUFFIXES:
                    content = _member(archive, member)
                    name = f"{source}/{PurePosixPath(member.name)}"
                    images.append(Item(name, partial(bytes, content), None, member.size, int(member.mtime * 1e9)))
                elif suffix.lower() in (".txt", ".json"):
                    captions += _caption_of_member(_member(archive, member), suffix.lower(), columns.caption)
            yield from _captioned(source, images, captions)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source}: not a tar archive that can be read: {one_line(error)}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _captioned(source: str, images: list[Item], captions: list[str]) -> Iterator[Item]:
    for image in images:
        split = split_of(image.id.removeprefix(f"{source}/")) or ""
        yield Item(image.id, image.read, None, image.size, image.mtime, captions, split)


def _caption_of_member(content: bytes, suffix: str, wanted: str) -> list[str]:
    text = content.decode("utf-8", errors="replace").strip()
    if suffix == ".txt":
        return [text] if text else []
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return []
    return _texts(value.get(wanted)) if isinstance(value, dict) else []


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


# --- data sets ------------------------------------------------------------------------------------------------------


def _walk_saved(source: str, columns: ColumnNames) -> Iterator[Item]:
    from datasets import load_from_disk

    yield from _loaded(source, columns, lambda: load_from_disk(source))


def _walk_parquet(source: str, columns: ColumnNames) -> Iterator[Item]:
    from datasets import load_dataset

    yield from _loaded(source, columns, lambda: load_dataset("parquet", data_files=source, streaming=True))


def _walk_hub(source: str, columns: ColumnNames) -> Iterator[Item]:
    from datasets import load_dataset

    yield from _loaded(source, columns, lambda: load_dataset(source, streaming=True))


def _walk_scenes(source: str, columns: ColumnNames) -> Iterator[Item]:
    from .scenes import build_scenes

    yield from _loaded(source, columns, build_scenes)


def _loaded(source: str, columns: ColumnNames, load: Callable[[], Any]) -> Iterator[Item]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        data = load()
        splits = data if isinstance(data, dict) else {str(data.split or ""): data}
        for split, rows in splits.items():
            yield from _rows_of_split(source, split, rows, columns)
    except DataError:
        raise
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source!r} is neither a file or folder here nor a data set that can be read: {one_line(error)}"
        ) from error


def _rows_of_split(source: str, split: str, rows: Any, columns: ColumnNames) -> Iterator[Item]:
    from datasets import Image

    where = f"{source}, split {split}" if split else source
    if rows.features is None:
        raise DataError(f"{where}: its columns are not declared; save it as Parquet and index that")
    image_column = find_image_column(rows, where, columns.image)
    captions = _find_captions(rows.column_names, where, columns.caption)
    rows = rows.cast_column(image_column, Image(decode=False)).select_columns([image_column, *captions])
    for number, row in enumerate(rows):
        image, said = row[image_column], [text for column in captions for text in _texts(row[column])]
        if image and image["bytes"] is None and image["path"] and os.path.isfile(image["path"]):
            yield _file_item(os.path.abspath(image["path"]), said, split)
        else:
            name = "/".join(part for part in (source, split, f"{number:06d}") if part)
            yield Item(name, partial(_content, image, name), None, UNKNOWN, UNKNOWN, said, split)


def _content(image: dict[str, Any] | None, name: str) -> bytes:
    if not image or not image["bytes"]:
        raise DataError(f"{name}: no image in this row; fill it or leave it out")
    return bytes(image["bytes"])


def is_listed_at_once(source: str) -> bool:
    """Whether the images of a source can be listed, and so counted, without reading them."""
    return _walker(source) in (_walk_folder, _walk_table)


def walk_sources(sources: Iterable[str], columns: ColumnNames = DEFAULT_COLUMNS) -> Iterator[tuple[str, Item]]:
    """The images of several sources with the source of each; one that was met before is left out.

    Raises:
        UsageError: no source.
        DataError: as [`walk_source`].
    """
    met: set[str] = set()
    named = list(sources)
    if not named:
        raise UsageError("no source to index: name a folder, a caption file, a tar archive or a data set")
    for source in named:
        for item in walk_source(source, columns):
            if item.id not in met:
                met.add(item.id)
                yield source, item
