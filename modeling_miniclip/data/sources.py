"""List the images of any source for an index: folders, caption files, local and Hub datasets, tar archives."""

import json
import os
import stat
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, Problem, UsageError, one_line
from ..utils.names import name_of, path_of
from .caption_files import CaptionedImage, read_caption_file
from .columns import ColumnNames, caption_columns, find_columns
from .image_files import BAD_FILES, bad_files, image_folder
from .layouts import SAVED_DATASETS, find_caption_file, find_metadata_files
from .listing import ListedFolder, images_of_folder, is_hidden_path, walk_folders
from .picture_formats import is_picture_file
from .problems import OnProblem, raise_problem
from .recognise import SOURCE_KINDS, recognise_file
from .source_kinds import local_path
from .splits import read_splits, split_of_folder

UNKNOWN = -1  # size or time of an image that is not a file
DEFAULT_COLUMNS = ColumnNames()

# Lists the images of a source, with the columns to look for; calls a function with each problem.
Walker = Callable[[str, ColumnNames, OnProblem], Iterator["Item"]]


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet.

    Args:
        id: absolute path of an image file; for other images the path or name of their container, `/`, and their name
            in it. Paths are written as by [`name_of`][modeling_miniclip.utils.names.name_of].
        read: function that returns the encoded image.
        path: path of the image file, None for an image inside a container.
        size: size in bytes, or `UNKNOWN`.
        mtime: time of the last change in nanoseconds; if it is `UNKNOWN`, the image is read again to see whether it
            has changed.
        captions: captions of the image.
        split: `train`, `validation`, ..., or "".
    """

    id: str
    read: Callable[[], bytes]
    path: str | None = None
    size: int = UNKNOWN
    mtime: int = UNKNOWN
    captions: list[str] = field(default_factory=list)
    split: str = ""


def resolve_source(source: str | os.PathLike) -> str:
    """The absolute path of a source as text, or its name on the Hub, so that the working folder does not matter.

    Raises:
        DataError: no such file or folder exists, and it cannot be the name of a dataset.
    """
    path = local_path(source)
    return os.fspath(source) if path is None else name_of(os.path.abspath(path))


def walk_sources(
    sources: Iterable[str], columns: ColumnNames = DEFAULT_COLUMNS, on_problem: OnProblem = raise_problem
) -> Iterator[tuple[str, Item]]:
    """The images of several sources, each with its source. A repeated image is returned once.

    Args:
        sources: sources as returned by [`resolve_source`].
        columns: columns to look for in caption files and datasets.
        on_problem: function called with what is left out: see [`walk_source`].

    Raises:
        UsageError: there are no sources.
        DataError: a source cannot be read, or has no images.
    """
    named = list(sources)
    if not named:
        raise UsageError("no source to index: name a folder, a caption file, a tar archive or a dataset")
    seen: set[str] = set()
    for source in named:
        for item in walk_source(source, columns, on_problem):
            if item.id not in seen:
                seen.add(item.id)
                yield source, item


def walk_source(
    source: str, columns: ColumnNames = DEFAULT_COLUMNS, on_problem: OnProblem = raise_problem
) -> Iterator[Item]:
    """The images of one source, always in the same order.

    Args:
        source: a source as returned by [`resolve_source`]:
            - a folder: all image files in it and its subfolders, linked ones too, except hidden ones, with the
              captions and splits of a caption file or of `metadata.csv` in it;
            - a CSV, TSV or JSON Lines file that names images next to it, with or without captions;
            - a tar archive; `name.txt`, or the `caption` in `name.json`, is the caption of `name.jpg`;
            - a folder of `Dataset.save_to_disk`, a Parquet file, a dataset on the Hub (streamed), or `scenes`.
        columns: columns to look for in caption files and datasets.
        on_problem: function called with each folder that cannot be listed (kind `unlisted`), each image in a format
            that cannot be read (`format`), and each link that is not followed (`link`).

    Raises:
        DataError: the source cannot be read, or has no images.
    """
    try:
        items = _walker(source)(source, columns, on_problem)
        first = next(items, None)
        if first is None:
            raise DataError(f"{source}: no images found; the images that were indexed from it before are kept")
        yield first
        yield from items
    except OSError as error:
        place = name_of(error.filename or path_of(source))
        raise DataError(
            f"{place}: cannot be read: {error.strerror or error}; check its permissions and its disk. The images that "
            "were indexed from it before are kept"
        ) from error


def is_listed_at_once(source: str) -> bool:
    """Whether the images of a source can be listed, and thus counted, without reading them."""
    try:
        return _walker(source) in (_walk_folder, _walk_table)
    except OSError:  # which the walk reports
        return False


def _walker(source: str) -> Walker:
    """The function that lists the images of this kind of source."""
    path = Path(path_of(source))
    if path.is_dir():
        saved = any((path / name).is_file() for name in SAVED_DATASETS)
        return _walk_saved if saved else _walk_folder
    if path.is_file():
        walkers = {"tar": _walk_tar, "parquet": _walk_parquet, "image": _walk_image, "text": _walk_table}
        kind = recognise_file(path)
        if kind not in walkers:
            raise DataError(f"{source}: {SOURCE_KINDS[kind]}; an index reads the folder of its images")
        return walkers[kind]
    if path.exists():
        raise DataError(f"{source}: neither a file nor a folder; name the file or folder with the images")
    return _walk_scenes if source == "scenes" else _walk_hub


def _walk_image(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    yield _file_item(path_of(source))


def _file_item(path: str, captions: list[str] | None = None, split: str = "") -> Item:
    """The item of a file as it is now. If the file is missing, its size and time are unknown and it cannot be read."""
    name, read = name_of(path), Path(path).read_bytes
    try:
        info = os.stat(path)
    except OSError:
        return Item(name, read, name, UNKNOWN, UNKNOWN, captions or [], split)
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
        read = partial(_raise, "not a regular file")
    return Item(name, read, name, info.st_size, info.st_mtime_ns, captions or [], split)


# --- folders and caption files --------------------------------------------------------------------------------------


def _walk_folder(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    root = path_of(source)
    folders = list(walk_folders(root, on_problem))
    captions, splits = _captions_of_folder(Path(root), folders, columns)
    for folder in folders:
        for path in images_of_folder(folder, on_problem):
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            yield _file_item(path, captions.get(path), splits.get(path) or split_of_folder(relative) or "")


def _captions_of_folder(
    root: Path, folders: list[ListedFolder], columns: ColumnNames
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions, and the splits of split files, by the absolute path of the image."""
    caption_file = find_caption_file(root)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for file in [caption_file] if caption_file else find_metadata_files(folders):
        images = _read_table(file, columns)
        folder = image_folder(root, images) if caption_file else file.parent
        paths = {name: os.path.normpath(folder / name) for name in images}
        captions |= {paths[name]: image.captions for name, image in images.items()}
        if caption_file:
            named = read_splits(root, images, caption_file)
            splits = {paths[name]: split for split, names in named.items() for name in names}
    return captions, splits


def _walk_table(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    file = Path(path_of(source))
    images = _read_table(file, columns)
    folder = image_folder(file.parent, images)
    splits = {name: split for split, names in read_splits(file.parent, images, file).items() for name in names}
    bad = dict(bad_files(folder, file.parent, images, columns.allow_outside_images))
    for name, image in images.items():
        path = os.path.normpath(folder / name)
        if bad.get(name) == "outside":
            reason = BAD_FILES["outside"].format(folder=folder)
            yield Item(name_of(path), partial(_raise, reason), name_of(path))
        else:
            yield _file_item(path, image.captions, splits.get(name) or split_of_folder(name) or "")


def _raise(problem: str) -> bytes:
    raise DataError(problem)


def _read_table(file: Path, columns: ColumnNames) -> dict[str, CaptionedImage]:
    return read_caption_file(file, partial(find_columns, wanted=columns, needs_captions=False))


def _optional_captions(names: Collection[str], wanted: str) -> list[str]:
    try:
        return caption_columns(names, "", None, wanted)
    except DataError:
        return []


# --- tar archives ---------------------------------------------------------------------------------------------------


def _walk_tar(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    """Members in their order. As in WebDataset, neighbours that differ only in their suffix belong together."""
    images: list[Item] = []
    captions: list[str] = []
    current = ""
    try:
        with tarfile.open(path_of(source)) as archive:
            for member in archive:
                if not member.isfile() or is_hidden_path(member.name):
                    continue
                stem, suffix = os.path.splitext(member.name)
                if stem != current:
                    yield from _with_captions(source, images, captions)
                    images, captions, current = [], [], stem
                if is_picture_file(member.name):
                    content = _content_of_member(archive, member)
                    name = f"{source}/{name_of(PurePosixPath(member.name))}"
                    images.append(Item(name, partial(bytes, content), None, member.size, int(member.mtime * 1e9)))
                elif suffix.lower() in (".txt", ".json"):
                    content = _content_of_member(archive, member)
                    captions += _captions_of_member(content, suffix.lower(), columns.caption)
            yield from _with_captions(source, images, captions)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source}: the tar archive cannot be read: {one_line(error)}") from error


def _content_of_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _with_captions(source: str, images: list[Item], captions: list[str]) -> Iterator[Item]:
    for image in images:
        split = split_of_folder(image.id.removeprefix(f"{source}/")) or ""
        yield Item(image.id, image.read, None, image.size, image.mtime, captions, split)


def _captions_of_member(content: bytes, suffix: str, wanted: str) -> list[str]:
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


# --- datasets -------------------------------------------------------------------------------------------------------


def _walk_saved(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    from datasets import load_from_disk

    path = path_of(source)
    yield from _walk_dataset(source, columns, lambda: load_from_disk(path))


def _walk_parquet(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    from datasets import load_dataset

    path = path_of(source)
    yield from _walk_dataset(source, columns, lambda: load_dataset("parquet", data_files=path, streaming=True))


def _walk_hub(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    from datasets import load_dataset

    yield from _walk_dataset(source, columns, lambda: load_dataset(source, streaming=True))


def _walk_scenes(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    from .scenes import build_scenes

    yield from _walk_dataset(source, columns, build_scenes)


def _walk_dataset(source: str, columns: ColumnNames, load: Callable[[], Any]) -> Iterator[Item]:
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
            f"{source!r} is neither a local file or folder nor a dataset that can be read: {one_line(error)}"
        ) from error


def _rows_of_split(source: str, split: str, rows: Any, columns: ColumnNames) -> Iterator[Item]:
    from datasets import Image

    where = f"{source}, split {split}" if split else source
    if rows.features is None:
        raise DataError(f"{where}: its column types are unknown; save it as Parquet and index that file")
    image_column = _find_image_column(rows, where, columns.image)
    captions = _optional_captions(rows.column_names, columns.caption)
    rows = rows.cast_column(image_column, Image(decode=False)).select_columns([image_column, *captions])
    for number, row in enumerate(rows):
        image, texts = row[image_column], [text for column in captions for text in _texts(row[column])]
        if image and image["bytes"] is None and image["path"] and os.path.isfile(image["path"]):
            yield _file_item(os.path.abspath(image["path"]), texts, split)
        else:
            name = "/".join(part for part in (source, split, f"{number:06d}") if part)
            yield Item(name, partial(_content_of_row, image, name), None, UNKNOWN, UNKNOWN, texts, split)


def _find_image_column(rows: Any, where: str, wanted: str) -> str:
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


def _content_of_row(image: dict[str, Any] | None, name: str) -> bytes:
    if not image or not image["bytes"]:
        raise DataError(f"{name}: no image in this row; fill it or leave the row out")
    return bytes(image["bytes"])
