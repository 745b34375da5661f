"""Where the images of rows are, and what shows that they are those of before, without opening each of them."""

import os
import time
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ...utils.processes import process_rank
from ..shards.remote_files import is_url
from ..shards.remote_shards import current_cache
from ..shards.shard_url import IN_TABLE, PREFIX
from .row_blocks import BLOCK, selected_batches

if TYPE_CHECKING:
    from datasets import Dataset

# A name as in `shard_url.py`.
PLACE = f"(?s)^{PREFIX}(?P<start>[0-9]+)(?:,(?P<size>-?[0-9]+))?(?:@[0-9a-f]+)?/(?P<name>.*)::(?P<shard>.*)$"
SETTLED = 3_000_000_000  # nanoseconds; some file systems have times in steps of two seconds
SAMPLE = 65_536  # bytes at the start and at the end of a shard that its identity depends on
IN_ROW, IN_FILE = "\0row", "\0file"  # in the place of a shard's name
FEWEST, MOST = 256, 4_096  # images of a part
BYTES_TOGETHER = 64  # images that are read at a time, if the table has them


class Places(NamedTuple):
    """Where the images of a block of rows are.

    Args:
        names: `image_id` of each row.
        contents: the encoded images that are in the table itself, null elsewhere.
        paths: path or URL of each image.
        shards: the shard of each image, [`IN_ROW`] for one in the table and [`IN_FILE`] for a file.
        starts, sizes: `[rows]` int64, as of a [`Place`][modeling_miniclip.data.shards.shard_url.Place].
        columns: the column in a table, the member's name in an archive.
    """

    names: pa.Array
    contents: pa.Array
    paths: pa.Array
    shards: pa.Array
    starts: np.ndarray
    sizes: np.ndarray
    columns: pa.Array


def image_places(rows: "Dataset") -> Iterator[Places]:
    """The places of all images of a split, a block of rows at a time."""
    table = rows.data.table
    image = table.column("image")
    parts = {name: pa.chunked_array([pc.struct_field(chunk, name) for chunk in image.chunks] or [[]],
                                    image.type.field(name).type) for name in ("bytes", "path")}  # fmt: skip
    columns = pa.table(parts | {"image_id": table.column("image_id")})
    whole = parts["bytes"].null_count == len(image)
    size = BLOCK if whole else BYTES_TOGETHER
    batches = selected_batches(columns, rows, size)
    blocks, is_main = -(-len(rows) // size), process_rank() == 0
    for batch in tqdm(batches, "look at images", blocks, unit="block", delay=2, leave=False, disable=not is_main):
        contents, paths = batch["bytes"], batch["path"]
        found = pc.extract_regex(paths, PLACE)
        start, size, name, shard = (pc.struct_field(found, field) for field in ("start", "size", "name", "shard"))
        in_row, in_shard = pc.is_valid(contents), pc.fill_null(pc.is_valid(found), False)
        shards = pc.if_else(in_row, IN_ROW, pc.if_else(in_shard, shard, IN_FILE))
        yield Places(batch["image_id"], contents, paths, shards, _numbers(start), _numbers(size), name)


def _numbers(digits: pa.Array) -> np.ndarray:
    filled = pc.if_else(pc.fill_null(pc.equal(digits, ""), True), "-1", digits)
    numbers: np.ndarray = pc.cast(filled, pa.int64()).to_numpy(zero_copy_only=False)
    return numbers


def size_and_time(path: str | None) -> tuple[int, int]:
    """Bytes of a file, and the time of its last change in nanoseconds; (0, 0) for a file that is not there."""
    try:
        status = os.stat(path or "")
    except (OSError, ValueError):  # ValueError: a null byte
        return 0, 0
    return status.st_size, status.st_mtime_ns


def is_table(places: Places) -> pa.BooleanArray:
    """`[rows]`, which images are in a column of another table, where nothing says how many bytes they have."""
    return pc.and_(pa.array(places.sizes < 0), pc.invert(pc.is_in(places.shards, pa.array([IN_ROW, IN_FILE]))))


def sizes_of(places: Places, tables: dict[str, int]) -> np.ndarray:
    """What shows a change of an image without opening it.

    Args:
        places: places of images.
        tables: bytes of each table that holds images; tables that it lacks are added.

    Returns:
        `[rows]` int64: bytes of an image in the table itself, in a file (0 if there is none) or in an archive; for one
        in another table a number made from the bytes of that table and from its row there.
    """
    sizes = places.sizes.copy()
    in_row = np.asarray(pc.equal(places.shards, IN_ROW))
    sizes[in_row] = np.asarray(pc.fill_null(pc.binary_length(places.contents), 0))[in_row]
    in_file = np.asarray(pc.equal(places.shards, IN_FILE))
    if in_file.any():
        paths = places.paths.filter(pa.array(in_file)).to_pylist()
        sizes[in_file] = [size_and_time(path)[0] for path in paths]
    for shard in pc.unique(places.shards.filter(is_table(places))).to_pylist():
        here = np.asarray(pc.equal(places.shards, shard))
        tables.setdefault(shard, size_and_time(shard)[0])
        sizes[here] = tables[shard] * 1_000_003 + places.starts[here]
    return sizes


def state_of_images(rows: "Dataset") -> tuple[str, bool]:
    """A hash that changes when a file of these images does, and whether none of them has changed just now.

    A file that is written to twice within one tick of the system's clock has the same times as after the first.
    """
    whole, latest, files = blake2b(digest_size=16), 0, dict[str, bytes]()
    for places in image_places(rows):
        whole.update(np.stack([places.starts, places.sizes], axis=1).tobytes())
        images = zip(places.contents, places.paths.to_pylist(), places.shards.to_pylist(), strict=True)
        for content, path, shard in images:
            if shard == IN_ROW:
                whole.update(blake2b(content.as_buffer(), digest_size=16).digest())
                continue
            file = (path or "") if shard == IN_FILE else shard
            if file not in files:
                changed, files[file] = _state_of_file(file)
                latest = max(latest, changed)
            whole.update(files[file])
    return whole.hexdigest(), time.time_ns() - latest > SETTLED


def _state_of_file(path: str) -> tuple[int, bytes]:
    """When a file changed last, and what is different after the next change.

    Only the system sets `ctime`: at each change of content, name, owner or times.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte
        return time.time_ns(), repr(path).encode()
    about = path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return max(status.st_mtime_ns, status.st_ctime_ns), repr(about).encode()


class Run(NamedTuple):
    """Neighbouring rows of a block whose images are in the same shard, or in none.

    Args:
        places: the block.
        rows: their numbers in the block.
        shard: their shard, [`IN_ROW`] or [`IN_FILE`].
        column: their column, if the shard is a table.
    """

    places: Places
    rows: range
    shard: str
    column: str | None

    def identity(self) -> bytes:
        """Bytes that change if an image does, together with [`identity_of_shard`].

        For images in a shard, the place of each; for files, the name, size and time of each, as `rsync` compares them;
        for images in the table, their contents.
        """
        part = slice(self.rows.start, self.rows.stop)
        if self.shard == IN_ROW:
            contents = self.places.contents[part]
            return b"".join(blake2b(content.as_buffer(), digest_size=16).digest() for content in contents)
        if self.shard == IN_FILE:
            files = zip(self.places.names[part].to_pylist(), self.places.paths[part].to_pylist(), strict=True)
            return "".join(f"{name!r}{size_and_time(path)}" for name, path in files).encode()
        return np.stack([self.places.starts[part], self.places.sizes[part]], axis=1).tobytes()


def image_runs(rows: "Dataset") -> Iterator[Run]:
    """The rows of a split in runs whose images are in the same shard."""
    for places in image_places(rows):
        codes = np.asarray(places.shards.dictionary_encode().indices)
        columns = pc.if_else(pa.array(places.sizes == IN_TABLE), places.columns, None)
        column_codes = np.asarray(pc.fill_null(columns, "").dictionary_encode().indices)
        changes = np.flatnonzero((np.diff(codes) != 0) | (np.diff(column_codes) != 0)) + 1
        edges = [0, *changes.tolist(), len(codes)]
        for start, stop in zip(edges, edges[1:], strict=False):
            yield Run(places, range(start, stop), places.shards[start].as_py(), columns[start].as_py())


@lru_cache(maxsize=4_096)
def identity_of_shard(shard: str) -> bytes:
    """Bytes that change if a shard does, whatever its name: from its size, its time, its start and its end.

    Args:
        shard: path, or URL, whose version the server names; [`IN_ROW`] and [`IN_FILE`] stand for themselves.

    Raises:
        DataError: a remote shard cannot be asked for.
        OSError: the shard cannot be read.
    """
    if shard in (IN_ROW, IN_FILE):
        return shard.encode()
    if is_url(shard):
        return f"{shard}\0{current_cache().version(shard)}".encode()
    identity = blake2b(repr(size_and_time(shard)).encode(), digest_size=16)
    with open(shard, "rb") as file:
        identity.update(file.read(SAMPLE))
        file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE))
        identity.update(file.read(SAMPLE))
    return identity.digest()


def image_parts(rows: "Dataset") -> Iterator[tuple[range, str]]:
    """A split in parts, each with a hash that changes if one of its images does; images in files are not opened.

    A part ends with its shard, so that other shards before it leave it as it is. It has at most [`MOST`] rows, and at
    least [`FEWEST`] even if neighbours are in different shards.
    """
    identity_of_shard.cache_clear()
    start = stop = 0
    identity, last, lengths = blake2b(digest_size=16), None, list[int]()
    for run in image_runs(rows):
        left = run.rows
        while left:
            full = stop - start == MOST or (stop - start >= FEWEST and (run.shard, run.column) != last)
            if full:
                yield range(start, stop), _finished(identity, lengths)
                identity, last, lengths, start = blake2b(digest_size=16), None, [], stop
            if (run.shard, run.column) != last:
                last = (run.shard, run.column)
                identity.update(identity_of_shard(run.shard) + (run.column or "").encode())
                lengths.append(0)
            piece, left = left[: MOST - (stop - start)], left[MOST - (stop - start) :]
            identity.update(run._replace(rows=piece).identity())
            stop += len(piece)
            lengths[-1] += len(piece)
    if stop > start:
        yield range(start, stop), _finished(identity, lengths)


def _finished(identity: Any, lengths: list[int]) -> str:
    identity.update(repr(lengths).encode())
    return str(identity.hexdigest())
