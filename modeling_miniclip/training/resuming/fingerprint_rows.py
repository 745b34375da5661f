"""The rows of a fingerprint: read from the splits or from a checkpoint, a block of rows at a time."""

import json
import math
import shutil
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

from ...data.columns import NEGATIVES
from ...data.picture_formats import read_encoded
from ...data.tables.image_places import IN_FILE, image_places, is_table, sizes_of, state_of_images
from ...data.tables.row_blocks import batches_of, record_batches
from ...errors import DataError
from ...utils.files import shared_file

SPLITS = ("train", "validation")  # nothing of a run depends on a test split
SCHEMA = pa.schema(
    {"split": pa.string(), "image_id": pa.string(), "image": pa.uint64(), "captions": pa.list_(pa.uint32())}
)
WRITTEN_TOGETHER = 32_768  # rows


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


def related_columns(splits: Mapping[str, Dataset], with_negatives: bool) -> dict[str, int]:
    """Checksums of the columns that say which images and captions belong together, by split and column.

    Args:
        splits: rows of a run.
        with_negatives: whether the run uses the column of wrong captions.
    """
    found = {}
    for split in SPLITS:
        for column in ("group", NEGATIVES) if with_negatives and split == "train" else ("group",):
            if column in splits[split].column_names:
                value = 0
                for batch in record_batches(splits[split], [column]):
                    value = zlib.crc32(json.dumps(batch[column].to_pylist()).encode(), value)
                found[f"{column} of {split}"] = value
    return found


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
        sizes = sizes_of(places, tables)
        total += int(sizes[np.asarray(is_table(places)) == 0].sum())
        elsewhere = elsewhere or pc.any(pc.match_substring(places.shards, "://")).as_py()
        parts.append(sizes)
    return np.concatenate(parts), math.inf if elsewhere else total + sum(tables.values())


def image_hashes(rows: Dataset, cache_dir: Path) -> np.ndarray:
    """`[rows]` uint64, a hash of each encoded image; 0 for one that cannot be read.

    Images are read once: as long as nothing is written to their files, the hashes are those of the cache. An edit is
    noticed even if it leaves a file's size and time as they were.

    Args:
        rows: rows with `image` and `image_id`.
        cache_dir: folder of the hashes.
    """
    state, is_settled = state_of_images(rows)
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
