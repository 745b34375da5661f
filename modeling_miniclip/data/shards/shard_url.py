"""Names for images inside a shard, and how to read them: `row://PLACE/NAME::SHARD`.

| shard | PLACE/NAME | the image is |
|---|---|---|
| tar archive | `1536,20481/0001.jpg` | 20,481 bytes from byte 1,536 on, the member `0001.jpg` |
| remote archive that was not fetched yet | `3523407757,-2/0001` | the picture `0001` of any format, wherever it is |
| Parquet or Arrow file | `17@5e2b90c1/image` | in row 17 (from 0) of the column `image` of this version of the file |

Such a name is a chained URL of fsspec, so plain `datasets` opens it too, wherever this module was imported. SHARD is a
path or, for a remote shard, a URL.
"""

import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from ...errors import DataError
from .remote_shards import local_shard
from .tar_headers import BLOCK, DamagedArchive, find_members, is_header_of

PROTOCOL = "row"
PREFIX = f"{PROTOCOL}://"
IN_TABLE, UNPLACED = -1, -2  # instead of the size of an image
OPEN_SHARDS = 64  # files that a process keeps open
KNOWN_SHARDS = 16  # archives of which a process remembers where all members are
HELD_BYTES = 128_000_000  # of row groups in memory; a window of images (see `order.py`) of up to 125 kB
END = 65_536  # bytes at the end of an Arrow file that tell its versions apart


class Place(NamedTuple):
    """Where an image is in its shard.

    Args:
        shard: path or URL of the shard.
        start: byte offset in a tar archive, row number in a table; any number if it is [`UNPLACED`].
        size: bytes in a tar archive; [`IN_TABLE`] in a table; [`UNPLACED`] for a member whose place is not known.
        name: member of the archive, without its suffix if its place is not known; or column of the table.
        version: version of the table, see [`version_of`]; "" for any.
    """

    shard: str
    start: int
    size: int
    name: str
    version: str = ""


def member_url(shard: str, start: int, size: int, name: str) -> str:
    """Name of an image in a tar archive; arguments as in [`Place`]."""
    return f"{PREFIX}{start},{size}/{name.replace('::', ': :')}::{shard}"  # fsspec takes a URL apart at each ::


def table_url(shard: str, row: int, column: str, version: str = "") -> str:
    """Name of an image in a Parquet or Arrow file; arguments as in [`Place`]."""
    return f"{PREFIX}{row}{'@' * bool(version)}{version}/{column}::{shard}"


def place_of(url: str) -> Place | None:
    """The place that a name stands for; None for the path of an image file or another URL."""
    if not url.startswith(PREFIX):
        return None
    place, _, rest = url.removeprefix(PREFIX).partition("/")
    name, _, shard = rest.rpartition("::")
    place, _, version = place.partition("@")
    start, _, size = place.partition(",")
    return Place(shard, int(start), int(size or IN_TABLE), name, version)


def version_of(table: str) -> str:
    """What tells versions of a Parquet or Arrow file apart, whatever their times: its size and its footer or its end.

    Raises:
        OSError: it cannot be read.
    """
    with open(table, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        last = file.read()
        length = int.from_bytes(last[:4], "little") if last[4:] == b"PAR1" else END
        file.seek(max(0, size - 8 - length))
        return f"{zlib.crc32(file.read(), size):08x}"


def read_place(place: Place, local: Callable[[str], str] = local_shard) -> bytes:
    """The encoded image at a place.

    Args:
        place: place in a shard.
        local: function that returns the local file of a remote shard.

    Raises:
        DataError: the shard has changed, or the row holds no image.
        OSError: the shard cannot be read.
    """
    path = local(place.shard)
    if place.size == UNPLACED:
        place = _find(place, path)
    if place.size >= 0:
        with open(path, "rb") as file:
            file.seek(place.start - BLOCK)
            content = file.read(BLOCK + place.size)
        if not is_header_of(content[:BLOCK], place.name, place.size):
            raise DataError(f"{place.shard}: {place.name} is not where it was; the shard has changed: start again")
        if len(content) < BLOCK + place.size:
            raise DataError(f"{place.shard}: ends within {place.name}; it has changed: start again")
        return content[BLOCK:]
    size_and_time = _size_and_time(path)
    if place.version not in ("", _version_at(path, *size_and_time)):
        raise DataError(f"{place.shard}: has changed since its rows were listed: start again")
    value = _open_table(path, *size_and_time).read(place.start, place.name)
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    if not value:
        raise DataError(
            f"{place.shard}, row {place.start}, column {place.name!r}: no image; fill it or delete the row"
        )
    return value


def _find(place: Place, path: str) -> Place:
    """The place of a member in its archive, by its name.

    Raises:
        DataError: the archive has no such picture.
    """
    found = _members_of(path, os.stat(path).st_mtime_ns).get(place.name)
    if found is None:
        raise DataError(
            f"{place.shard}: has no picture {place.name!r}, which the table next to it names; fetch both again"
        )
    return place._replace(start=found[0], size=found[1], name=found[2])


@lru_cache(maxsize=KNOWN_SHARDS)
def _members_of(path: str, changed: int) -> dict[str, tuple[int, int, str]]:
    """Start, size and name of the pictures of an archive by their names without suffix."""
    members: dict[str, tuple[int, int, str]] = {}
    with open(path, "rb") as file, suppress(DamagedArchive):  # those before the damage are found
        for member in find_members(file):
            stem, _, suffix = member.name.removeprefix("./").rpartition(".")
            if suffix not in ("txt", "json"):
                members.setdefault(stem, (member.start, member.size, member.name))
    return members


class _ArrowTable:
    """An Arrow file of `datasets`, memory-mapped."""

    def __init__(self, path: str):
        self.table = pa.ipc.open_stream(pa.memory_map(path)).read_all()  # nothing is copied

    def read(self, row: int, column: str) -> Any:
        return self.table[column][row].as_py()


class _ParquetTable:
    """A Parquet file, whose row groups are read as a whole; the last ones of all files stay in memory."""

    # By file, version, group and column; the last one used comes last.
    held: ClassVar[OrderedDict[tuple[str, str, int, str], pa.ChunkedArray]] = OrderedDict()
    held_bytes: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()  # an index reads in threads: one reads a group, all use it

    def __init__(self, path: str, version: str):
        self.path, self.version = path, version
        self.file = pq.ParquetFile(path)  # a memory map would end the process if the file became shorter
        about = self.file.metadata
        self.starts = np.cumsum([0, *(about.row_group(i).num_rows for i in range(about.num_row_groups))])

    def read(self, row: int, column: str) -> Any:
        group = int(self.starts.searchsorted(row, "right")) - 1
        return self._group(group, column)[row - int(self.starts[group])].as_py()

    def _group(self, group: int, column: str) -> pa.ChunkedArray:
        key, cls = (self.path, self.version, group, column), _ParquetTable
        with cls.lock:
            if key not in cls.held:
                cls.held[key] = self.file.read_row_group(group, columns=[column], use_threads=False)[column]
                cls.held_bytes += cls.held[key].nbytes
                while cls.held_bytes > HELD_BYTES and len(cls.held) > 1:
                    cls.held_bytes -= cls.held.popitem(last=False)[1].nbytes
            cls.held.move_to_end(key)
            return cls.held[key]


def _size_and_time(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns


@lru_cache(maxsize=OPEN_SHARDS)
def _version_at(path: str, size: int, time: int) -> str:
    return version_of(path)


@lru_cache(maxsize=OPEN_SHARDS)
def _open_table(path: str, size: int, time: int) -> _ArrowTable | _ParquetTable:
    """The table in a file, which is opened again when its size or time changes."""
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return _ParquetTable(path, _version_at(path, size, time)) if is_parquet else _ArrowTable(path)


def row_groups(path: str) -> np.ndarray | None:
    """`[row groups + 1]`, where the row groups of a Parquet file start and end; None for another or a damaged file."""
    try:
        table = _open_table(path, *_size_and_time(path))
    except (OSError, pa.ArrowException):  # reading its images says what is wrong
        return None
    return table.starts if isinstance(table, _ParquetTable) else None


class RowFileSystem(AbstractFileSystem):
    """Opens images inside shards for libraries that use fsspec."""

    protocol = PROTOCOL
    root_marker = ""

    def __init__(self, fo: str = "", target_protocol: str | None = None, target_options: Any = None, **options: Any):
        super().__init__(**options)
        is_remote = target_protocol not in (None, "file", "local") and "://" not in fo  # some leave it there
        self.shard = f"{target_protocol}://{fo}" if is_remote else fo

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        place = place_of(f"{PREFIX}{self._strip_protocol(path)}::{self.shard}")
        assert place is not None, "the prefix is there"
        return io.BytesIO(read_place(place))


fsspec.register_implementation(PROTOCOL, RowFileSystem, clobber=True)
