"""The rows of a fingerprint: read from the splits or from a checkpoint, a block of rows at a time."""

import math
import os
import shutil
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ...data.picture_formats import read_encoded
from ...data.tables.image_places import IN_FILE, IN_ROW, Places, image_places, size_and_time
from ...data.tables.row_blocks import batches_of, record_batches
from ...errors import DataError
from ...utils.files import shared_file

SPLITS = ("train", "validation")  # nothing of a run depends on a test split
SCHEMA = pa.schema(
    {"split": pa.string(), "image_id": pa.string(), "image": pa.uint64(), "captions": pa.list_(pa.uint32())}
)
WRITTEN_TOGETHER = 32_768  # rows
SETTLED = 3_000_000_000  # nanoseconds; some file systems have times in steps of two seconds


class FingerprintRows(ABC):
    """Rows `{split, image_id, image, captions}`: a hash (or size) of the image, a hash for each caption."""

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, with the columns of [`SCHEMA`]; can be called again and again."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write a Parquet file."""

    def table(self) -> pa.Table:
        """All rows in memory."""
        return pa.Table.from_batches(self.batches(), SCHEMA)

    def equals(self, other: "FingerprintRows") -> bool:
        """Whether another fingerprint has the same rows in the same order."""
        blocks = (batches_of(rows.batches(), WRITTEN_TOGETHER) for rows in (self, other))
        return all(a is not None and b is not None and a.equals(b) for a, b in zip_longest(*blocks))


class RowsOfFile(FingerprintRows):
    """The rows that [`save`][FingerprintRows.save] wrote.

    Raises:
        OSError, ValueError: the file cannot be read, or is another one.
    """

    def __init__(self, path: Path):
        self.path = path
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError(f"{path.name} has other columns")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, with the columns of [`SCHEMA`]."""
        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(WRITTEN_TOGETHER)

    def save(self, path: Path) -> None:
        """Copy the Parquet file."""
        shutil.copyfile(self.path, path)


class RowsOfSplits(FingerprintRows):
    """The rows of the splits of a run.

    Args:
        splits: rows `{image_id, captions}`, and `caption_hashes` where they are known already.
        images: `[rows]` uint64, a hash or size of each image, by split.
    """

    def __init__(self, splits: Mapping[str, Dataset], images: Mapping[str, np.ndarray]):
        self.splits, self.images = {name: splits[name] for name in SPLITS}, images

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, with the columns of [`SCHEMA`]."""
        for split, rows in self.splits.items():
            hashed = "caption_hashes" in rows.column_names
            start = 0
            for batch in record_batches(rows, ["image_id", "caption_hashes" if hashed else "captions"]):
                images = self.images[split][start : start + len(batch)].astype(np.uint64)
                captions = batch.column(1) if hashed else _hashes_of_captions(batch.column(1))
                columns = [
                    pa.repeat(split, len(batch)),
                    batch["image_id"],
                    pa.array(images),
                    captions.cast(SCHEMA.types[3]),
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
                start += len(batch)

    def save(self, path: Path) -> None:
        """Write a Parquet file."""
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for batch in batches_of(self.batches(), WRITTEN_TOGETHER):
                writer.write_batch(batch)

    def names(self, split: str, rows: Sequence[int]) -> list[str]:
        """`image_id` of some rows of a split."""
        return list(self.splits[split].select_columns(["image_id"])[list(rows)]["image_id"])


def _hashes_of_captions(captions: pa.ListArray) -> pa.ListArray:
    hashes = np.array([zlib.crc32(text.encode()) for text in captions.flatten().to_pylist()], np.uint32)
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(captions).to_numpy())])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(hashes, pa.uint32()))


def image_sizes(rows: Dataset) -> tuple[np.ndarray, float]:
    """What shows a change of an image without opening it, and the bytes of all images.

    Returns:
        `[rows]` int64: the bytes of an image in the table, in a file (0 if there is none) or in an archive; for one in
        another table a number made from the bytes of that table and from its row there. And the number of bytes of all
        images and of such tables, infinite for shards that are elsewhere.
    """
    parts, tables, elsewhere = [np.zeros(0, np.int64)], dict[str, int](), False
    total = 0
    for places in image_places(rows):
        sizes = _sizes_of(places, tables)
        total += int(sizes[np.asarray(_is_table(places)) == 0].sum())
        elsewhere = elsewhere or pc.any(pc.match_substring(places.shards, "://")).as_py()
        parts.append(sizes)
    return np.concatenate(parts), math.inf if elsewhere else total + sum(tables.values())


def _is_table(places: Places) -> pa.BooleanArray:
    return pc.and_(pa.array(places.sizes < 0), pc.invert(pc.is_in(places.shards, pa.array([IN_ROW, IN_FILE]))))


def _sizes_of(places: Places, tables: dict[str, int]) -> np.ndarray:
    sizes = places.sizes.copy()
    in_row = np.asarray(pc.equal(places.shards, IN_ROW))
    sizes[in_row] = np.asarray(pc.fill_null(pc.binary_length(places.contents), 0))[in_row]
    in_file = np.asarray(pc.equal(places.shards, IN_FILE))
    if in_file.any():
        paths = places.paths.filter(pa.array(in_file)).to_pylist()
        sizes[in_file] = [size_and_time(path)[0] for path in paths]
    for shard in pc.unique(places.shards.filter(_is_table(places))).to_pylist():
        here = np.asarray(pc.equal(places.shards, shard))
        tables.setdefault(shard, size_and_time(shard)[0])
        sizes[here] = tables[shard] * 1_000_003 + places.starts[here]
    return sizes


def image_hashes(rows: Dataset, cache_dir: Path) -> np.ndarray:
    """`[rows]` uint64, a hash of each encoded image; 0 for one that cannot be read.

    Images are read once: as long as nothing is written to their files, the hashes are those of the cache. An edit is
    noticed even if it leaves a file's size and time as they were.

    Args:
        rows: rows with `image` and `image_id`.
        cache_dir: folder of the hashes.
    """
    state, is_settled = _state_of_images(rows)
    place = cache_dir / f"images-{state}.npy"
    with suppress(OSError, ValueError):
        known: np.ndarray = np.load(place)
        if known.shape == (len(rows),) and known.dtype == np.uint64 and known.all():
            return known
    hashes = _hashes_of_images(rows)
    if is_settled and hashes.all():
        with suppress(OSError), shared_file(place) as fresh, fresh.open("wb") as file:
            np.save(file, hashes)
    return hashes


def _state_of_images(rows: Dataset) -> tuple[str, bool]:
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


def _hashes_of_images(rows: Dataset) -> np.ndarray:
    parts = [np.zeros(0, np.uint64)]
    for places in image_places(rows):
        images = zip(places.contents, places.paths.to_pylist(), places.shards.to_pylist(), strict=True)
        hashes = [_hash_of_image(content.as_py(), path, shard) for content, path, shard in images]
        parts.append(np.array(hashes, np.uint64))
    return np.concatenate(parts)


def _hash_of_image(content: bytes | None, path: str | None, shard: str) -> int:
    try:
        if shard == IN_FILE:
            content = Path(path or "").read_bytes()
        elif content is None:
            content = read_encoded({"bytes": None, "path": path})
    except (OSError, ValueError, DataError):  # ValueError: a null byte
        return 0
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
