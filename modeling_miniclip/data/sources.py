"""The images of any source for an index: what the readers yield, with captions or without."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import DataError, Problem, UsageError
from ..utils.names import name_of, path_of
from .columns import ColumnNames
from .picture_formats import read_encoded
from .problems import HARMLESS, SHARD_PROBLEMS, OnProblem, raise_problem
from .readers.caption_file import check_path
from .readers.image_files import BAD_FILES
from .readers.image_folder import read_image_folder
from .readers.recognise import recognise_source
from .rows import ReadOptions, Row
from .shards.shard_patterns import expand_shards, is_pattern
from .shards.shard_url import Place, place_of
from .shards.tar_index import compressed_by
from .source_kinds import IMAGE_FOLDER, Kind, kind_of, resolve
from .splits import split_of_folder
from .tables.assign_splits import splits_of_files
from .tables.row_blocks import record_batches
from .tables.table import open_table, write_table

UNKNOWN = -1  # size or time of an image that is not a file
DEFAULT_COLUMNS = ColumnNames()
SHARDS = ("tar", "parquet", "saved", "hub")  # kinds of sources whose images are in shards

# Problems that stop an index from being built: a caption file is damaged, and which captions are lost is not clear.
FATAL = ("encoding", "separator", "quotes", "fields", "json", "no-name", "empty-caption")
# Problems that cost no image.
WARNINGS = HARMLESS.union(FATAL, ("two-splits", "no-captions"))


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet.

    Args:
        id: absolute path of an image file; for other images the path or name of their container, `/`, and their name
            in it. Paths are written as by [`name_of`][modeling_miniclip.utils.names.name_of].
        read: function that returns the encoded image.
        path: path of the image file, None for an image inside a container.
        size: size in bytes, or `UNKNOWN`.
        mtime: time of the last change in nanoseconds, of the archive for an image in a tar; if it is `UNKNOWN`, the
            image is read again to see whether it has changed.
        captions: captions of the image.
        split: `train`, `validation`, ..., or "".
        shard: path of the shard that the image is in, or "".
    """

    id: str
    read: Callable[[], bytes]
    path: str | None = None
    size: int = UNKNOWN
    mtime: int = UNKNOWN
    captions: list[str] = field(default_factory=list)
    split: str = ""
    shard: str = ""


def resolve_source(source: str | os.PathLike) -> str:
    """The absolute path or pattern of a source as text, or its name on the Hub; the working folder does not matter.

    Raises:
        DataError: no such file or folder exists, and it cannot be the name of a dataset.
    """
    return name_of(resolve(source))


def is_gone(source: str) -> bool:
    """Whether a source on this machine, as returned by [`resolve_source`], is no longer there."""
    path = path_of(source)
    if not os.path.isabs(path) or os.path.exists(path):
        return False
    try:
        return not is_pattern(path) or not expand_shards(path)
    except DataError:
        return True


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
        raise UsageError("no source to index: name a folder, a caption file, shards or a dataset")
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
        source: a source as returned by [`resolve_source`]: whatever training takes, and besides it
            - a folder: all image files in it and its subfolders, whether they have captions or not;
            - a caption file without captions;
            - a compressed tar archive, and images without captions in any archive or table;
            - a single image.
        columns: columns to look for in caption files and datasets.
        on_problem: function called with each folder that cannot be listed (kind `unlisted`), each image in a format
            that cannot be read (`format`), each link that is not followed (`link`), each shard that is damaged or
            cannot be read (`SHARD_PROBLEMS`), and harmless problems.

    Raises:
        DataError: the source cannot be read, or has no images.
    """
    damaged: list[Problem] = []

    def report(problem: Problem) -> None:
        if problem.kind in SHARD_PROBLEMS:
            damaged.append(problem)
        on_problem(problem)

    try:
        items = _items(source, columns, report)
        first = next(items, None)
        if first is None:
            reason = f"{damaged[0]}; no" if damaged else f"{source}: no"
            raise DataError(f"{reason} images found; the images that were indexed from it before are kept")
        yield first
        yield from items
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the disk for temporary files, not of the source
            raise
        place = name_of(error.filename or path_of(source))
        raise DataError(
            f"{place}: cannot be read: {error.strerror or error}; check its permissions and its disk. The images that "
            "were indexed from it before are kept"
        ) from error


def is_listed_at_once(source: str) -> bool:
    """Whether the images of a source can be listed, and thus counted, without reading them."""
    path = path_of(source)
    try:
        if source == "scenes":
            return False
        if os.path.isdir(path) and recognise_source(path) not in ("shards", "saved"):
            return True
        kind = kind_of(path)
        return kind is None or kind.name != "tar" or not any(map(_compressed_by, expand_shards(path, "tar")))
    except (OSError, DataError):  # which the walk reports
        return False


def _compressed_by(shard: str) -> str:
    with suppress(OSError):  # which the walk reports
        return compressed_by(shard)
    return ""


# --- items ----------------------------------------------------------------------------------------------------------


def _items(source: str, columns: ColumnNames, on_problem: OnProblem) -> Iterator[Item]:
    """The images of a source, each with a name of its own."""
    if source == "scenes":
        yield from _scenes()
        return
    path = path_of(source)
    kind = kind_of(path) if not os.path.isdir(path) else _kind_of_folder(path)
    options = ReadOptions(columns, all_images=True, bad_images=True)
    if kind is None:
        yield _file_item(path)
    elif kind.name in SHARDS:
        rows = kind.read(path, options, on_problem)
        yield from _items_in_shards(source, rows if kind.name == "tar" else _joined(kind, path, rows, on_problem))
    elif not os.path.isdir(path):
        yield from _named_items(kind, path, options, on_problem)
    else:
        known = {} if kind is IMAGE_FOLDER else _known_items(kind, path, options, on_problem)
        for row in read_image_folder(path, options, partial(_report_text, on_problem)):
            item = known.get(os.path.normpath(str(row.image)))
            captions, split = (item.captions, item.split) if item else (row.captions, row.split)
            yield _file_item(str(row.image), captions, split or "")


def _kind_of_folder(path: str) -> Kind | None:
    """The kind of a folder; one without shards is a folder of images, whatever is known about them."""
    name = recognise_source(path)
    return kind_of(path) if name in ("shards", "saved", "coco", "karpathy") else IMAGE_FOLDER


def _known_items(kind: Kind, path: str, options: ReadOptions, on_problem: OnProblem) -> dict[str, Item]:
    """The images that a JSON file in a folder names, by their paths. Those that are missing do not matter."""
    return {path_of(item.id): item for item in _named_items(kind, path, options, on_problem)}


def _report_text(on_problem: OnProblem, problem: Problem) -> None:
    """Raise the problems of caption files; those of a text file next to an image cost only its caption."""
    if problem.kind in FATAL and problem.row is not None:
        raise_problem(problem)
    on_problem(problem)


def _named_items(kind: Kind, path: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Item]:
    """The images that a caption file names. Whoever reads those that are missing reports them."""
    check_path(Path(path), ReadOptions())
    outside: dict[str, str] = {}

    def report(problem: Problem) -> None:
        if problem.kind == "outside" and problem.image is not None:
            outside[problem.image] = problem.text
        elif problem.kind not in BAD_FILES:
            _report_text(on_problem, problem)

    for row in _joined(kind, path, kind.read(path, options, report), report, options):
        image = os.path.normpath(str(row.image))
        if row.name in outside:
            yield Item(name_of(image), partial(_raise, outside[row.name]), name_of(image))
        else:
            yield _file_item(image, row.captions, row.split or "")


def _joined(
    kind: Kind, path: str, rows: Iterable[Row], on_problem: OnProblem, options: ReadOptions | None = None
) -> Iterator[Row]:
    """Rows of which those of the same image are joined; with the splits of split files, if options to read are given.

    Meanwhile, they are in a table on disk.
    """
    with tempfile.TemporaryDirectory(prefix="miniclip-") as place:
        write_table(rows, Path(place), on_problem, f"list {os.path.basename(path)}")
        table = open_table(Path(place))
        split_of: dict[int, str] = {}
        if options is not None and (lines := kind.split_lines(path, options, on_problem)) is not None:
            named = splits_of_files(table, lines, on_problem)
            split_of = {row: split for split, numbers in named.items() for row in numbers.tolist()}
        number = 0
        for batch in record_batches(table, ["image_id", "image", "captions", "split"]):
            for name, image, captions, split in zip(*(column.to_pylist() for column in batch), strict=True):
                content = image["bytes"] if image["bytes"] is not None else image["path"]
                yield Row(name, content, captions, split=split_of.get(number, split))
                number += 1
        del table


def _items_in_shards(source: str, rows: Iterable[Row]) -> Iterator[Item]:
    seen: dict[str, int] = {}
    times: dict[str, int] = {}
    for row in rows:
        place = place_of(row.image) if isinstance(row.image, str) else None
        if isinstance(row.image, str) and place is None and "://" not in row.image:
            yield _file_item(os.path.normpath(row.image), row.captions, row.split or "")
            continue
        name = _name_in_shard(source, row, place)
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name}#{seen[name]}"
        size = mtime = UNKNOWN
        if place is not None and place.size >= 0:
            if place.shard not in times:
                times[place.shard] = _time_of(place.shard)
            size, mtime = place.size, times[place.shard]
        content = {"bytes": row.image, "path": None} if isinstance(row.image, bytes) else {"path": row.image}
        shard = place.shard if place is not None else row.file
        member = name.removeprefix(f"{name_of(shard)}/")
        split = row.split or (split_of_folder(member) if member != name else None) or ""
        yield Item(name, partial(read_encoded, content), None, size, mtime, row.captions, split, shard)


def _name_in_shard(source: str, row: Row, place: Place | None) -> str:
    """The shard and the name of the image in it, or else the source and the name of the row."""
    shard = place.shard if place is not None else row.file
    if place is not None and place.size >= 0:
        return f"{name_of(shard)}/{place.name}"
    start = f"{os.path.basename(shard)}/"
    if len(start) > 1 and row.name.startswith(start):
        return f"{name_of(shard)}/{row.name.removeprefix(start)}"
    return f"{source}/{row.name}"


def _time_of(shard: str) -> int:
    try:
        return os.stat(shard).st_mtime_ns
    except (OSError, ValueError):  # it is elsewhere
        return UNKNOWN


def _file_item(path: str, captions: list[str] | None = None, split: str = "") -> Item:
    """The item of a file as it is now. If the file is missing, its size and time are unknown and it cannot be read."""
    name, read = name_of(path), Path(path).read_bytes
    try:
        info = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte
        return Item(name, read, name, UNKNOWN, UNKNOWN, captions or [], split)
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
        read = partial(_raise, "not a regular file")
    return Item(name, read, name, info.st_size, info.st_mtime_ns, captions or [], split)


def _raise(problem: str) -> bytes:
    raise DataError(problem)


def _scenes() -> Iterator[Item]:
    from datasets import Image

    from .scenes import build_scenes

    for split, rows in build_scenes().items():
        for number, row in enumerate(rows.cast_column("image", Image(decode=False))):
            name = f"scenes/{split}/{number:06d}"
            yield Item(name, partial(read_encoded, row["image"]), captions=row["captions"], split=str(split))
