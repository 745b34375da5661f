"""Tar archives as WebDataset and img2dataset write them: images, with their captions in text and JSON members."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat
from typing import Any

from tqdm.auto import tqdm

from ...errors import DataError, Problem, one_line
from ...utils.names import name_of
from ..columns import NEGATIVES
from ..picture_formats import BY_SUFFIX, FORMATS, START, picture_format
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..shards.remote_files import UnreachableError, is_url, read_ahead
from ..shards.remote_shards import GB, current_cache, default_folder, local_shard, size_of
from ..shards.shard_patterns import expand_shards, inputs_of_shards, short_names, split_of_shard
from ..shards.shard_url import member_url
from ..shards.sidecars import read_sidecar
from ..shards.tar_index import (
    Entry,
    TarIndex,
    build_index,
    build_indexes,
    compressed_by,
    compressed_message,
    load_index,
    open_compressed,
    open_index,
)
from .record_captions import NO_LIST

AHEAD = 8  # tables next to archives that are fetched while another one is used
ENDINGS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".tbz2": "bzip2", ".xz": "xz", ".txz": "xz"}


def read_tar(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of archives, in the order of the archives and of their members; names are `archive.tar/name`.

    Args:
        source: path or URL of an archive, path of a folder of archives, or a pattern such as
            `shards/{00000..00999}.tar`.
        options: how to read it. With `all_images`, compressed archives are read too; their images are at their places
            in what `PackedArchive` unpacks.
        on_problem: function called if an archive cannot be read (kind `shard`) or is damaged (`damaged-shard`: its
            images before the damage are used), if some images are left out for lack of a caption (`left-out`), and
            with each image in a format that cannot be read (`format`) or without content (`empty`).

    Raises:
        DataError: nothing matches the pattern, or an archive is compressed.
    """
    shards = expand_shards(source, "tar")
    compressed = {shard: program for shard in shards if (program := _compressed_by(shard))}
    for shard, program in compressed.items():
        if is_url(shard) or not options.all_images:
            raise DataError(Problem("unusable", compressed_message(shard, program), name_of(shard)))
    folder, column = options.shard_folder or default_folder(), options.columns.caption
    local = [shard for shard in shards if not is_url(shard) and shard not in compressed]
    if len(local) > 1:
        build_indexes(local, folder, column)
    remote = _RemoteIndexes([shard for shard in shards if is_url(shard)], folder, options)
    for shard, name in zip(shards, short_names(shards), strict=True):
        try:
            if shard in compressed:
                with open_compressed(shard, compressed[shard]) as content:
                    index = build_index(content, column)
            else:
                index = remote.open(shard) if is_url(shard) else open_index(shard, folder, column)
            yield from _rows(shard, name, index, shard in compressed, options, on_problem)
        except DataError as error:
            if error.problem is None or error.problem.kind != "shard":
                raise
            on_problem(error.problem)
        except (OSError, EOFError) as error:
            text = f"cannot be read: {one_line(error)}; check that it is there, its permissions and its disk"
            on_problem(Problem("shard", text, shard))
    remote.close()


class _RemoteIndexes:
    """Indexes of remote archives: from img2dataset's tables next to them, or else each archive is fetched once.

    Args:
        shards: URLs of the archives.
        folder: folder of the indexes.
        options: how to read them. With `all_images`, all archives are needed anyway.
    """

    def __init__(self, shards: list[str], folder: str | os.PathLike, options: ReadOptions):
        self.cache, self.folder, self.caption_column = current_cache(), folder, options.columns.caption
        self.versions = dict(zip(shards, self.cache.versions(shards), strict=True))
        known = [shard for shard in shards if isinstance(self.versions[shard], str)]
        self.sidecars: Iterator[TarIndex | DataError | None] = repeat(None)
        if known and not options.all_images and isinstance(self._sidecar(known[0]), TarIndex):
            self.sidecars = read_ahead(self._sidecar, known, AHEAD)
            known = []
        missing = [shard for shard in known if self._load(shard) is None]
        self.cache.expect(missing)
        self.bar = None
        if missing:
            size = sum(size_of(str(self.versions[shard])) for shard in missing)
            title = f"fetching shards once ({size / GB:.1f} GB), to find their images"
            self.bar = tqdm(total=len(missing), desc=title, unit="shard", leave=False)

    def _load(self, shard: str) -> TarIndex | None:
        return load_index(shard, self.folder, self.caption_column, str(self.versions[shard]))

    def _sidecar(self, shard: str) -> TarIndex | DataError | None:
        try:
            return read_sidecar(shard, self.caption_column)
        except UnreachableError as error:
            return error

    def open(self, shard: str) -> TarIndex:
        """The index of an archive, which is fetched if need be. They are opened in their order.

        Raises:
            DataError: it cannot be fetched.
        """
        version = self.versions[shard]
        if isinstance(version, DataError):
            raise version
        index = next(self.sidecars)
        if isinstance(index, DataError):
            raise index
        if index is None:
            index = self._load(shard)
        if index is None:
            index = open_index(self.cache.local(shard), self.folder, self.caption_column, shard, version)
            if self.bar is not None:
                self.bar.update()
        return index

    def close(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.close()


def inputs_tar(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows of archives depend on, for the key of their table."""
    yield from inputs_of_shards(expand_shards(source, "tar"))
    yield [each.name for each in FORMATS if each.is_readable]


def _compressed_by(shard: str) -> str:
    """The program that compressed an archive, "" if none did; for a URL, its name says so."""
    if is_url(shard):
        return next((program for ending, program in ENDINGS.items() if shard.lower().endswith(ending)), "")
    with suppress(OSError):
        return compressed_by(shard)
    return ""


def _rows(
    source: str, shard: str, index: TarIndex, is_packed: bool, options: ReadOptions, on_problem: OnProblem
) -> Iterator[Row]:
    split, silent = split_of_shard(source), 0
    first = ""
    without_reader = {suffix[1:] for suffix, each in BY_SUFFIX.items() if not each.is_readable}
    for entry in index:
        if not entry.captions and not options.all_images:
            first, silent = first or entry.member, silent + 1
            continue
        if not entry.size or entry.member.rpartition(".")[2].lower() in without_reader:
            problem = _problem(source, entry, is_packed)
            if problem is not None:
                on_problem(problem)
                continue
        yield Row(
            name=f"{shard}/{entry.name}",
            image=member_url(source, entry.start, entry.size, entry.member),
            captions=entry.captions,
            split=entry.split or split,
            group=entry.group,
            file=source,
            negatives=entry.negatives,
        )
    if index.damage:
        text = f"{index.damage}; copy or download it again to use more than the {len(index)} images before"
        on_problem(Problem("damaged-shard", text, source))
    _report(source, index, silent, first, on_problem)


def _problem(source: str, entry: Entry, is_packed: bool) -> Problem | None:
    """Why an image cannot be used, as far as that shows before it is decoded."""
    if not entry.size:
        return Problem("empty", f"image {entry.member!r} is empty; copy it again", source, image=entry.name)
    by_suffix = BY_SUFFIX["." + entry.member.rpartition(".")[2].lower()]
    if by_suffix.is_readable or is_packed:
        return None
    with open(local_shard(source), "rb") as file:
        file.seek(entry.start)
        found = picture_format(file.read(START)) or by_suffix
    if found.is_readable:
        return None
    return Problem("format", f"image {entry.member!r} is {found.reason}", source, image=entry.name)


def _report(source: str, index: TarIndex, silent: int, first: str, on_problem: OnProblem) -> None:
    reasons = []
    if silent:
        reasons.append(f"{silent} of {len(index)} images without a caption (first: {first!r})")
    if index.lost[0]:
        reasons.append(f"{index.lost[0]} captions without an image (first: {index.lost[1]!r})")
    if index.unreadable[0]:
        count, name = index.unreadable
        reasons.append(f"{count} texts that are not UTF-8, or not JSON (first: {name!r})")
    if reasons:
        on_problem(Problem("left-out", f"left out {', '.join(reasons)}", source))
    if index.no_lists[0]:
        count, name = index.no_lists
        on_problem(Problem("negatives", f"the {NEGATIVES} of {count} texts {NO_LIST} (first: {name!r})", source))
