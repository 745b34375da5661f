"""Find all images of a source, with captions or without, for an index.

Sources are read as training reads them, by `read_source`. An index also takes each image file below a folder, whatever
a caption file there names, images without captions, compressed archives, and a single image.
"""

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DataError, MiniClipError, Problem
from ..utils.names import name_of, path_of
from .faults import readable, unchanged
from .load_rows import read_source
from .problems import HARMLESS, SHARD_PROBLEMS, OnProblem, raise_problem
from .readers.caption_file import check_path
from .readers.hub import hub_shards
from .readers.image_files import BAD_FILES
from .readers.image_folder import Layout, read_all_images, read_metadata
from .rows import ReadOptions, Row
from .shards.remote_files import is_url
from .shards.remote_shards import current_cache
from .shards.shard_patterns import expand_shards, is_pattern
from .shards.shard_url import Place, place_of
from .shards.tar_index import compressed_by
from .source_kinds import BY_NAME, IMAGE_FOLDER, Kind, kind_of, resolve
from .splits import SPLITS, split_of_value
from .tables.row_blocks import record_batches, take_rows
from .tables.table import open_table
from .tables.table_cache import cached_table, default_cache_dir, digest_of

if TYPE_CHECKING:
    from datasets import Dataset

UNKNOWN = -1  # size or time of an image that is not known
ALONE = -1  # number of the shard of an image that is in none
BLOCK = 4_096  # images that are looked up at a time
PROBLEMS = "problems.json"
SHARDS = ("tar", "parquet", "saved", "hub")  # kinds of sources whose images are in shards

# Problems that stop an index from being built: a caption file is damaged, and which captions are lost is not clear.
FATAL = ("encoding", "separator", "quotes", "fields", "json", "no-name", "empty-caption")
# Problems that cost no image.
WARNINGS = HARMLESS.union(FATAL, ("two-splits", "no-captions", "negatives"))


class Found(NamedTuple):
    """An image of a source; fields as in the table of [`Listing`][modeling_miniclip.data.all_images.Listing]."""

    id: str
    path: str | None = None
    place: str | None = None
    content: bytes | None = None
    problem: str | None = None
    captions: Sequence[str] = ()
    split: str = ""
    size: int = UNKNOWN
    mtime: int = UNKNOWN
    shard: int = ALONE


@dataclass
class Shards:
    """The shards that images are in, by number.

    Args:
        paths: path or URL of each.
        versions: size and time of each, or what its server says; "" if that is nothing.
        packed: the program that compressed each archive, "" if none did.
    """

    paths: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)


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


class _Unreadable(MiniClipError):
    """Some shards cannot be read now, so what was read of the others is not kept for the next time."""


class Finder:
    """Finds the images of sources.

    Args:
        options: how to read them.
        folder: folder for tables that are only needed meanwhile.
        on_problem: function called with what is left out.
    """

    def __init__(self, options: ReadOptions, folder: Path, on_problem: OnProblem):
        self.options, self.folder, self.on_problem = options, folder, on_problem
        self.shards = Shards()
        self._numbers: dict[str, int] = {}  # of the shards
        self._mtimes: list[int] = []

    def images(self, source: str) -> Iterator[Found]:
        """The images of one source.

        Raises:
            DataError: it cannot be read, or has no images.
        """
        damaged: list[Problem] = []

        def report(problem: Problem) -> None:
            if problem.kind in SHARD_PROBLEMS:
                damaged.append(problem)
            self.on_problem(problem)

        try:
            images = self._images(source, report)
            first = next(images, None)
            if first is None:
                reason = f"{damaged[0]}; no" if damaged else f"{source}: no"
                raise DataError(f"{reason} images found; the images that were indexed from it before are kept")
            yield first
            yield from images
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the disk for the table, not of the source
                raise
            place = name_of(error.filename or path_of(source))
            raise DataError(
                f"{place}: cannot be read: {error.strerror or error}; check its permissions and its disk. The images "
                "that were indexed from it before are kept"
            ) from error

    def _images(self, source: str, on_problem: OnProblem) -> Iterator[Found]:
        if source == "scenes":
            yield from _scenes()
            return
        path = path_of(source)
        kind = kind_of(path)
        if kind is None:
            yield _file(path)
        elif kind.name == "hub" and (splits := hub_shards(path)):
            for split, shards, pattern in splits:
                for image in self._in_shards(source, self._table_of_shards(BY_NAME[shards], pattern, on_problem)):
                    yield image._replace(split=split_of_value(split) or "")
        elif kind.name in SHARDS:
            yield from self._in_shards(source, self._table_of_shards(kind, path, on_problem))
        elif os.path.isdir(path):
            yield from self._in_folder(kind, path, on_problem)
        else:
            check_path(Path(path), ReadOptions())
            yield from self._in_caption_file(kind, path, on_problem)

    # --- files ---

    def _in_caption_file(self, kind: Kind, path: str, on_problem: OnProblem) -> Iterator[Found]:
        """The images that a caption file names. Whoever reads those that are missing reports them."""
        outside: dict[str, str] = {}

        def report(problem: Problem) -> None:
            if problem.kind == "outside" and problem.image is not None:
                outside[problem.image] = problem.text
            elif problem.kind not in BAD_FILES:
                _report_text(on_problem, problem)

        rows, split_of = self._table_of_captions(kind, path, self.options, report)
        number = 0
        for batch in record_batches(rows, ["image_id", "image", "captions", "split"]):
            for name, image, captions, split in zip(*(column.to_pylist() for column in batch), strict=True):
                split = SPLITS[split_of[number]] if split_of[number] >= 0 else split or ""
                number += 1
                if name in outside:
                    yield Found(image["path"], image["path"], problem=outside[name])
                else:
                    yield _file(path_of(image["path"]), captions, split)

    def _in_folder(self, kind: Kind, path: str, on_problem: OnProblem) -> Iterator[Found]:
        """All images of a folder and its subfolders, with what caption files there say about them."""
        report = partial(_report_text, on_problem)
        layout, wanted = kind.layout, self.options.columns.caption
        if layout is None or layout.wanted != wanted:
            layout = Layout.of(Path(path), wanted)
        known: _Known | None = None
        if kind.layout is None or layout.metadata:  # of those that are named but missing, an index wants nothing
            if kind.layout is not None:
                kind = replace(IMAGE_FOLDER, read=lambda source, *rest: read_metadata(layout, *rest))
            quiet = partial(_report_text, lambda each: each.kind in BAD_FILES or on_problem(each))
            known = _Known(*self._table_of_captions(kind, path, self.options, quiet))
        rows = read_all_images(layout, self.options, report)
        while block := list(islice(rows, BLOCK)):
            if known is not None:
                known.add_to(block)
            for row in block:
                yield _file(str(row.image), row.captions, row.split or "")

    def _table_of_captions(
        self, kind: Kind, path: str, options: ReadOptions, on_problem: OnProblem
    ) -> tuple["Dataset", np.ndarray]:
        """The rows of caption files, their images named by `name_of`, and the splits that split files name.

        The splits are `[rows]` int8, numbers in [`SPLITS`], or -1.
        """

        def read(*args: Any) -> Iterator[Row]:
            for row in kind.read(*args):
                row.image = name_of(os.path.normpath(str(row.image)))
                yield row

        place = self.folder / f"captions-{len(list(self.folder.iterdir()))}"
        place.mkdir()
        _, named = read_source(place, path, replace(kind, read=read), options, on_problem)
        rows = open_table(place)
        split_of = np.full(len(rows), -1, np.int8)
        for split, numbers in (named or {}).items():
            split_of[numbers] = SPLITS.index(split)
        return rows, split_of

    # --- shards ---

    def _table_of_shards(self, kind: Kind, path: str, on_problem: OnProblem) -> "Dataset":
        """The rows of shards, read again only if one of them has changed."""
        with readable(path):
            inputs = digest_of(kind.inputs(path, self.options))

        def read(folder: Path) -> list[Problem]:
            problems: list[Problem] = []
            with unchanged(path, kind, self.options, inputs):
                read_source(folder, path, kind, self.options, problems.append)
            return problems

        def build(folder: Path) -> None:
            problems = read(folder)
            if any(problem.kind == "shard" for problem in problems):
                raise _Unreadable
            text = json.dumps([asdict(problem) for problem in problems])
            (folder / PROBLEMS).write_text(text, encoding="utf-8")

        try:
            key = ["all images", path, kind.name, asdict(self.options), inputs]
            place = cached_table(key, default_cache_dir(), build, "let HF_HOME name another disk")
            problems = [Problem(**each) for each in json.loads((place / PROBLEMS).read_text(encoding="utf-8"))]
        except _Unreadable:
            place = self.folder / f"shards-{len(list(self.folder.iterdir()))}"
            place.mkdir()
            problems = read(place)
        for problem in problems:
            on_problem(problem)
        return open_table(place)

    def _in_shards(self, source: str, rows: "Dataset") -> Iterator[Found]:
        seen: Counter[str] = Counter()  # names in the current archive
        before = None
        for batch in record_batches(rows, ["image_id", "image", "captions", "split"]):
            for name, image, captions, split in zip(*(column.to_pylist() for column in batch), strict=True):
                content, url = image["bytes"], image["path"]
                place = place_of(url) if url is not None else None
                if place is None and url is not None and "://" not in url:
                    yield _file(os.path.normpath(url), captions, split or "")
                    continue
                if place is None:
                    yield Found(f"{source}/{name}", None, url, content, None, captions, split or "")
                    continue
                if place.shard != before:
                    before, number = place.shard, self._add_shard(place.shard)
                    seen.clear()
                name = _name_in_shard(source, name, place)
                if place.size >= 0:
                    seen[name] += 1
                    name = f"{name}#{seen[name]}" if seen[name] > 1 else name
                mtime = self._mtimes[number]
                yield Found(name, None, url, None, None, captions, split or "", place.size, mtime, number)

    def _add_shard(self, shard: str) -> int:
        """The number of a shard."""
        number = self._numbers.setdefault(shard, len(self._numbers))
        if number == len(self.shards.paths):
            mtime, packed = UNKNOWN, ""
            if is_url(shard):
                version = current_cache().version(shard)
                version = "" if version == "{}" else version  # the server says nothing
            else:
                info = os.stat(shard)
                version, mtime, packed = f"{info.st_size} {info.st_mtime_ns}", info.st_mtime_ns, compressed_by(shard)
            self.shards.paths.append(shard)
            self.shards.versions.append(version)
            self.shards.packed.append(packed)
            self._mtimes.append(mtime)
        return number


def _report_text(on_problem: OnProblem, problem: Problem) -> None:
    """Raise the problems of caption files; those of a text file next to an image cost only its caption."""
    if problem.kind in FATAL and problem.row is not None:
        raise_problem(problem)
    on_problem(problem)


class _Known:
    """What caption files say about images, by the paths of their files.

    Args:
        rows: rows of caption files.
        split_of: `[rows]` int8, the split that split files name, as its number in [`SPLITS`], or -1.
    """

    def __init__(self, rows: "Dataset", split_of: np.ndarray):
        self._blocks = rows.data.table.select(["captions", "split"]).to_batches()
        self._starts = np.cumsum([0, *map(len, self._blocks)])
        self._split_of = split_of
        hashes = [
            [hash(image["path"]) for image in batch["image"].to_pylist()] for batch in record_batches(rows, ["image"])
        ]
        known = np.concatenate([np.zeros(0, np.int64), *(np.array(some, np.int64) for some in hashes)])
        self._order = np.argsort(known, kind="stable")
        self._hashes = known[self._order]

    def add_to(self, images: list[Row]) -> None:
        """Replace captions and splits of images by those that are known."""
        if not len(self._hashes):
            return
        wanted = np.array([hash(name_of(os.path.normpath(str(row.image)))) for row in images], np.int64)
        at = np.minimum(self._hashes.searchsorted(wanted), len(self._hashes) - 1)
        found = np.flatnonzero(self._hashes[at] == wanted)
        rows = self._order[at[found]]
        if not len(rows):
            return
        batch = take_rows(self._blocks, self._starts, rows)
        for i, row, captions, split in zip(
            found.tolist(), rows.tolist(), *(column.to_pylist() for column in batch.columns), strict=True
        ):
            named = SPLITS[self._split_of[row]] if self._split_of[row] >= 0 else split
            images[i].captions, images[i].split = captions, named or images[i].split


def _name_in_shard(source: str, name: str, place: Place) -> str:
    """The shard and the name of the image in it, or else the source and the name of the row."""
    if place.size >= 0:
        return f"{name_of(place.shard)}/{place.name}"
    start = f"{os.path.basename(place.shard)}/"
    if name.startswith(start):
        return f"{name_of(place.shard)}/{name.removeprefix(start)}"
    return f"{source}/{name}"


def _file(path: str, captions: Sequence[str] = (), split: str = "") -> Found:
    """A file as it is now. If it is missing, its size and time are unknown, and it cannot be read."""
    name = name_of(path)
    try:
        info = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte
        return Found(name, name, captions=captions, split=split)
    odd = None if stat.S_ISREG(info.st_mode) else "not a regular file"  # reading a pipe would wait for ever
    return Found(name, name, None, None, odd, captions, split, info.st_size, info.st_mtime_ns)


def _scenes() -> Iterator[Found]:
    from datasets import Image

    from .scenes import build_scenes

    for split, rows in build_scenes().items():
        for number, row in enumerate(rows.cast_column("image", Image(decode=False))):
            name, content = f"scenes/{split}/{number:06d}", row["image"]["bytes"]
            yield Found(name, content=content, captions=row["captions"], split=str(split))
