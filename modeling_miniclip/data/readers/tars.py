"""Tar archives as WebDataset and img2dataset write them: images, with their captions in text and JSON members."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, BinaryIO

from ...errors import DataError, Problem, one_line
from ...utils.names import name_of
from ..picture_formats import BY_SUFFIX, FORMATS, START, picture_format
from ..problems import OnProblem
from ..remote_shards import default_folder
from ..rows import ReadOptions, Row
from ..shard_patterns import expand_shards, inputs_of_shards, short_names, split_of_shard
from ..shard_url import member_url
from ..tar_index import (
    Entry,
    TarIndex,
    build_index,
    build_indexes,
    compressed_by,
    compressed_message,
    open_compressed,
    open_index,
)


def read_tar(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of archives, in the order of the archives and of their members; names are `archive.tar/name`.

    Args:
        source: path of an archive, of a folder of archives, or a pattern such as `shards/{00000..00999}.tar`.
        options: how to read it. With `all_images`, compressed archives are read too, their images into memory one at a
            time.
        on_problem: function called if an archive is damaged (kind `shard`: its images before the damage are used), if
            some images are left out for lack of a caption (`left-out`), and with each image in a format that cannot be
            read (`format`) or without content (`empty`).

    Raises:
        DataError: nothing matches the pattern, or an archive is compressed.
    """
    shards = expand_shards(source, "tar")
    compressed = {shard: program for shard in shards if (program := _compressed_by(shard))}
    for shard, program in compressed.items():
        if not options.all_images:
            raise DataError(Problem("unusable", compressed_message(shard, program), name_of(shard)))
    folder, column = options.shard_folder or default_folder(), options.columns.caption
    if len(shards) > 1:
        build_indexes([shard for shard in shards if shard not in compressed], folder, column)
    for shard, name in zip(shards, short_names(shards), strict=True):
        try:
            with ExitStack() as stack:
                packed: BinaryIO | None = None
                if shard in compressed:
                    with open_compressed(shard, compressed[shard]) as first:
                        index = build_index(first, column)
                    packed = stack.enter_context(open_compressed(shard, compressed[shard]))
                else:
                    index = open_index(shard, folder, column)
                yield from _rows(shard, name, index, packed, options, on_problem)
        except (OSError, EOFError) as error:
            text = f"cannot be read: {one_line(error)}; check that it is there, its permissions and its disk"
            on_problem(Problem("shard", text, shard))


def inputs_tar(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows of archives depend on, for the key of their table."""
    yield from inputs_of_shards(expand_shards(source, "tar"))
    yield [each.name for each in FORMATS if each.is_readable]


def _compressed_by(shard: str) -> str:
    with suppress(OSError):
        return compressed_by(shard)
    return ""


def _rows(
    source: str, shard: str, index: TarIndex, packed: BinaryIO | None, options: ReadOptions, on_problem: OnProblem
) -> Iterator[Row]:
    split, silent = split_of_shard(source), 0
    first = ""
    for entry in index:
        if not entry.captions and not options.all_images:
            first, silent = first or entry.member, silent + 1
            continue
        problem = _problem(source, entry, packed)
        if problem is not None:
            on_problem(problem)
            continue
        yield Row(
            name=f"{shard}/{entry.name}",
            image=_image(source, entry, packed),
            captions=entry.captions,
            split=entry.split or split,
            group=entry.group,
            file=source,
        )
    if index.damage:
        text = f"{index.damage}; copy or download it again to use more than the {len(index)} images before"
        on_problem(Problem("shard", text, source))
    _report(source, index, silent, first, on_problem)


def _image(source: str, entry: Entry, packed: BinaryIO | None) -> str | bytes:
    if packed is None:
        return member_url(source, entry.start, entry.size, entry.member)
    packed.seek(entry.start)
    return packed.read(entry.size)


def _problem(source: str, entry: Entry, packed: BinaryIO | None) -> Problem | None:
    """Why an image cannot be used, as far as that shows before it is decoded."""
    if not entry.size:
        return Problem("empty", f"image {entry.member!r} is empty; copy it again", source, image=entry.name)
    by_suffix = BY_SUFFIX["." + entry.member.rpartition(".")[2].lower()]
    if by_suffix.is_readable or packed is not None:
        return None
    with open(source, "rb") as file:
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
