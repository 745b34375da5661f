"""All images of some sources, for an index: listed once, in a table on disk that all processes map into memory."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..errors import DataError, Problem
from ..utils.names import path_of
from .columns import ColumnNames
from .find_images import ALONE, BLOCK, UNKNOWN, Finder, Found, Shards
from .picture_formats import read_encoded
from .rows import ReadOptions
from .shards.shard_url import place_of
from .shards.tar_index import PackedArchive
from .tables.row_blocks import take_rows

DEFAULT_COLUMNS = ColumnNames()
IMAGES, DIGESTS, STATES, ROWS, ABOUT = "images.arrow", "digests.npy", "states.npy", "rows.npy", "about.json"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # path of the file; else path or name of its container, `/`, and its name there
        ("source", pa.int32()),  # its number
        ("path", pa.string()),  # of the image file; null: it is in a shard
        ("place", pa.string()),  # URL, or name in a shard (see `shard_url.py`)
        ("content", pa.binary()),  # of an image that is nowhere else
        ("problem", pa.string()),  # why it cannot be read; null: try
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("size", pa.int64()),  # bytes
        ("mtime", pa.int64()),  # nanoseconds, of the shard if it is in one
        ("shard", pa.int32()),  # its number, `ALONE` for a file
    ]
)


@dataclass(frozen=True)
class Item:
    """An image of a source, not read yet.

    Args:
        id: its name, see [`SCHEMA`].
        read: function that returns the encoded image.
        path: path of the image file, None for an image inside a container.
        size: size in bytes, or `UNKNOWN`.
        mtime: time of the last change in nanoseconds, of its shard if it is in one, or `UNKNOWN`.
        version: version of its shard, None if it is in none.
    """

    id: str
    read: Callable[[], bytes]
    path: str | None = None
    size: int = UNKNOWN
    mtime: int = UNKNOWN
    version: str | None = None


def digest_of_name(name: str) -> bytes:
    """16 bytes that stand for the name of an image."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def state_of(size: int, mtime: int, version: str | None) -> int:
    """64 bits that change with an image: with its file, or with the version of its shard; 0 if that is not known."""
    if version is not None:
        return _state_of_version(version)
    return 0 if mtime == UNKNOWN else (size * 0x9E3779B97F4A7C15 + mtime) & 0xFFFFFFFFFFFFFFFF or 1


@lru_cache(maxsize=1024)
def _state_of_version(version: str) -> int:
    return int.from_bytes(blake2b(version.encode(), digest_size=8).digest(), "little") if version else 0


class Listing:
    """The images of some sources, in a table on disk that all processes map into memory.

    Args:
        folder: folder that [`list_images`] wrote.

    Attributes:
        table: a row per image that was found, columns as in [`SCHEMA`].
        rows: `[images]` int64, the rows of the images, each image once.
        digests: `[rows of the table, 2]` uint64, see [`digest_of_name`].
        states: `[rows of the table]` uint64, see [`state_of`].
        sources: names of the sources.
        shards: the shards that images are in.
        problems: what was left out, and why.
    """

    def __init__(self, folder: Path):
        self.table = pa.ipc.open_stream(pa.memory_map(str(folder / IMAGES))).read_all()
        self.rows, self.digests, self.states = (
            np.load(folder / name, mmap_mode="r" if self.table.num_rows else None) for name in (ROWS, DIGESTS, STATES)
        )
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.sources: list[str] = about["sources"]
        self.shards = Shards(**about["shards"])
        self.problems = [Problem(**values) for values in about["problems"]]

    def batches(self, rows: np.ndarray, columns: Sequence[str], size: int = BLOCK) -> Iterator[pa.RecordBatch]:
        """Columns of some rows, in blocks, without reading the others."""
        table = self.table.select(list(columns))
        blocks = table.to_batches()
        starts = np.cumsum([0, *(block.num_rows for block in blocks)])
        for start in range(0, len(rows), size):
            yield take_rows(blocks, starts, np.asarray(rows[start : start + size]))

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of numbers in some rows."""
        return self.table[name].to_numpy()[rows]

    def items(self, rows: np.ndarray) -> Iterator[Item]:
        """The images in some rows; those of a compressed archive are read at once, as they follow each other there."""
        archive = PackedArchive()
        columns = ("id", "path", "place", "content", "problem", "size", "mtime", "shard")
        for batch in self.batches(rows, columns, 256):
            for name, path, place, content, problem, size, mtime, shard in zip(
                *(column.to_pylist() for column in batch.columns), strict=True
            ):
                read: Callable[[], bytes] = partial(read_encoded, {"bytes": content, "path": place})
                if problem is not None:
                    read = partial(_raise, problem)
                elif path is not None:
                    read = Path(path_of(path)).read_bytes
                elif shard != ALONE and self.shards.packed[shard] and (at := place_of(place)) is not None:
                    read = archive.read_now(at.shard, self.shards.packed[shard], at.start, at.size)
                version = None if shard == ALONE else self.shards.versions[shard]
                yield Item(name, read, path, size, mtime, version)


def _raise(problem: str) -> bytes:
    raise DataError(problem)


def list_images(
    sources: Iterable[str], folder: Path, columns: ColumnNames = DEFAULT_COLUMNS, progress: bool = False
) -> Listing:
    """List the images of some sources in a table, each image once, always in the same order.

    Args:
        sources: sources as [`resolve_source`] returns them: whatever training takes, and besides it
            - a folder: all image files in it and its subfolders, whether they have captions or not;
            - a caption file without captions;
            - a compressed tar archive, and images without captions in any archive or table;
            - a single image.
        folder: new folder for the table.
        columns: columns to look for in caption files and datasets.
        progress: whether to show a progress bar if this takes more than two seconds.

    Returns:
        The images. Its problems are folders that cannot be listed (kind `unlisted`), images in a format that cannot be
        read (`format`), links that are not followed (`link`), shards that are damaged or cannot be read
        (`SHARD_PROBLEMS`), and harmless problems.

    Raises:
        DataError: a source cannot be read, or has no images.
    """
    named = list(sources)
    folder.mkdir(parents=True)
    problems: list[Problem] = []
    finder = Finder(ReadOptions(columns, all_images=True, bad_images=True), folder, problems.append)
    digests, states = bytearray(), array("Q")
    with pa.OSFile(str(folder / IMAGES), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        with tqdm(desc="list images", unit="image", delay=2, leave=False, disable=not progress) as bar:
            for number, source in enumerate(named):
                images = finder.images(source)
                while block := list(islice(images, BLOCK)):
                    writer.write_batch(_batch_of(block, number))
                    for image in block:
                        version = None if image.shard == ALONE else finder.shards.versions[image.shard]
                        digests += digest_of_name(image.id)
                        states.append(state_of(image.size, image.mtime, version))
                    bar.update(len(block))
    pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
    np.save(folder / DIGESTS, pairs)
    np.save(folder / STATES, np.frombuffer(states, np.uint64))
    np.save(folder / ROWS, _first_rows(pairs))
    about = {"sources": named, "shards": asdict(finder.shards), "problems": [asdict(each) for each in problems]}
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return Listing(folder)


def _batch_of(images: list[Found], source: int) -> pa.RecordBatch:
    columns = dict(zip(Found._fields, zip(*images, strict=True), strict=True)) | {"source": [source] * len(images)}
    return pa.RecordBatch.from_arrays([pa.array(columns[each.name], each.type) for each in SCHEMA], schema=SCHEMA)


def _first_rows(digests: np.ndarray) -> np.ndarray:
    """`[n]` int64, the first row with each digest, ascending."""
    order = np.argsort(digests[:, 0], kind="stable")
    is_first = np.ones(len(order), bool)
    first, second = digests[order, 0], digests[order, 1]
    is_first[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return np.sort(order[is_first])
