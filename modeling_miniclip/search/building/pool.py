"""Embeddings that exist already: found by the name of an image, by its contents, or gathered in any order.

Memory takes about 60 bytes for each image, twice that while it is filled; names, captions and thumbnails stay on disk.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...data.all_images import digest_of_name, state_of
from ..index import MANIFEST, ROW_GROUP, ImageIndex, Manifest

HELD_BYTES = 64 << 20  # of entries with thumbnails that are in memory while an index is written
MISSING = -1  # the row of what is not there


class Lookup:
    """Rows by digests of 16 bytes.

    Args:
        digests: `[rows, 2]` uint64.
    """

    def __init__(self, digests: np.ndarray):
        order = np.argsort(digests[:, 0], kind="stable")
        self._first, self._second = digests[order, 0], digests[order, 1]
        self._rows = order.astype(np.uint32 if len(order) < 2**32 else np.int64)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """`[n]` int64, the last row with each of `[n, 2]` digests, or `MISSING`."""
        if not len(self._first):
            return np.full(len(digests), MISSING, np.int64)
        at = self._first.searchsorted(digests[:, 0], "right") - 1  # -1 is no row: the last one is not smaller
        is_there = (self._first[at] == digests[:, 0]) & (self._second[at] == digests[:, 1])
        return np.where(is_there, self._rows[at].astype(np.int64), MISSING)


class Pool:
    """All embeddings that the model of an index has computed before. Their rows are numbered over all parts.

    Args:
        parts: the existing index and the shards, oldest first.

    Attributes:
        states: `[rows]` uint64, see [`state_of`][modeling_miniclip.data.all_images.state_of].
    """

    def __init__(self, parts: list[ImageIndex]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])  # of each part
        names, contents = np.empty((self.starts[-1], 2), np.uint64), np.empty((self.starts[-1], 2), np.uint64)
        self.states = np.empty(self.starts[-1], np.uint64)
        row = 0
        for part in parts:
            for batch in part.batches(["id", "hash", "size", "mtime", "version"]):
                here = slice(row, row + len(batch))
                ids, hashes, *stats = (batch[name].to_pylist() for name in batch.schema.names)
                names[here] = as_digests(map(digest_of_name, ids))
                contents[here] = as_digests(map(bytes.fromhex, hashes))
                self.states[here] = [state_of(*values) for values in zip(*stats, strict=True)]
                row += len(batch)
        self._by_name, self._by_content = Lookup(names), Lookup(contents)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of_names(self, digests: np.ndarray) -> np.ndarray:
        """`[n]` int64, the newest row of each image by the `[n, 2]` digests of their names, or `MISSING`."""
        return self._by_name.find(digests)

    def unchanged(self, digests: np.ndarray, states: np.ndarray) -> np.ndarray:
        """`[n]` booleans, which images are here and have not changed since, judged by their states.

        Args:
            digests: `[n, 2]` uint64, digests of their names.
            states: `[n]` uint64, their states now.
        """
        rows = self.rows_of_names(digests)
        if not len(self):
            return np.zeros(len(rows), bool)
        return (rows != MISSING) & (states != 0) & (self.states[rows] == states)

    def row_of_name(self, name: str) -> int:
        """The newest row of an image, or `MISSING`."""
        return int(self._by_name.find(as_digests([digest_of_name(name)]))[0])

    def row_of_content(self, digest: bytes) -> int:
        """The newest row of an image with these contents, by their digest, or `MISSING`."""
        return int(self._by_content.find(as_digests([digest]))[0])

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each row, and its row there."""
        parts = self.starts.searchsorted(rows, "right") - 1
        return parts, rows - self.starts[parts]

    def embedding(self, row: int) -> np.ndarray:
        """`[dim]`, the embedding in a row."""
        part, here = self.places(np.array([row]))
        embedding: np.ndarray = self.parts[part[0]].embeddings[here[0]]
        return embedding


def open_pool(existing: ImageIndex | None, shards: Path, manifest: Manifest) -> Pool:
    """Open the existing index and the finished shards, except those of another model, length, format or decoding.

    Args:
        existing: the index before the update, if there is one.
        shards: folder of the shards.
        manifest: manifest of the index after the update.
    """
    folders = [path for path in shards.iterdir() if not path.name.startswith(".") and (path / MANIFEST).is_file()]
    folders.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    parts = [*([existing] if existing else []), *(ImageIndex.open(path) for path in folders)]
    return Pool([part for part in parts if _kind(part.manifest) == _kind(manifest)])


def _kind(manifest: Manifest) -> tuple[str, int, str, bool]:
    return manifest.fingerprint, manifest.dim, manifest.dtype, manifest.reduced


def as_digests(digests: Iterable[bytes]) -> np.ndarray:
    """`[n, 2]` uint64 of digests of 16 bytes."""
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


class Entries:
    """Entries of several parts with their thumbnails, in any order.

    The row groups that were read last stay in memory; in the order in which an update encodes, each is read once.

    Args:
        parts: parts of a pool.
    """

    def __init__(self, parts: Sequence[ImageIndex]):
        self.parts = parts
        self._held: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()  # the last one used comes last
        self._bytes = 0

    def take(self, parts: np.ndarray, rows: np.ndarray) -> pa.Table:
        """Entries by the number of their part and their row there."""
        keys = parts * (1 << 32) + rows // ROW_GROUP
        order = np.argsort(keys, kind="stable")
        groups, starts = np.unique(keys[order], return_index=True)
        taken = [
            self._group(int(key >> 32), int(key & 0xFFFFFFFF)).take(pa.array(rows[some] % ROW_GROUP))
            for key, some in zip(groups, np.split(order, starts[1:]), strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(taken).take(pa.array(back)).combine_chunks()

    def _group(self, part: int, number: int) -> pa.Table:
        key = (part, number)
        if key not in self._held:
            self._held[key] = self.parts[part].group(number)
            self._bytes += self._held[key].nbytes
            while self._bytes > HELD_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(key)
        return self._held[key]
