"""Images that are embedded once and searched often: a folder on disk, memory-mapped, that is complete or not there.

| file | what it holds |
|---|---|
| `manifest.json` | what [`Manifest`] says, the checksums of the other files, and its own |
| `entries.parquet` | one row an image, see [`SCHEMA`], with the thumbnail of an image that is no file of its own |
| `embeddings.safetensors` | `embeddings` `[images, dim]`, unit norm, float32 or float16, in the order of the entries |
| `neighbours.faiss` | an approximate index over them, where there are many (see `approximate.py`) |

A bit that flipped on the disk is told: files are compared with their checksums before an index is updated, when one of
up to `VERIFIED` bytes is opened, and when it is asked for. `FORMAT` is raised whenever an older version of this
package could misread a folder.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, MiniClipError, UsageError
from ..utils.checksums import file_checksum, value_checksum
from ..utils.files import recover_folder, replaced_folder
from .approximate import FILE as NEIGHBOURS
from .approximate import ApproximateNeighbours, build_neighbours, is_chosen
from .embeddings_file import BLOCK, map_embeddings, write_embeddings
from .exact import Match, Neighbours
from .filters import EntryFilter

FORMAT = 1
MANIFEST, ENTRIES, EMBEDDINGS = "manifest.json", "entries.parquet", "embeddings.safetensors"
ROW_GROUP = 2_048  # entries of one read of thumbnails
VERIFIED = 256 << 20  # bytes of which the checksum costs little beside the imports and the model that a search needs
OWN = "sha256"  # the manifest's key for the checksum of all other keys

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # absolute path, or source/name
        ("path", pa.string()),  # null: no file of its own
        ("source", pa.string()),
        ("size", pa.int64()),  # bytes; -1: not known before it is read
        ("mtime", pa.int64()),  # nanoseconds; -1: not known
        ("hash", pa.string()),  # blake2b of the encoded image, 16 bytes in hexadecimal
        ("date", pa.timestamp("s")),  # when it was taken (EXIF), else of the file; local time
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("thumbnail", pa.large_binary()),  # JPEG; null: the file is there
    ]
)
COLUMNS = [name for name in SCHEMA.names if name != "thumbnail"]


@dataclass(frozen=True)
class Manifest:
    """What an index says of itself.

    Args:
        model: name or folder of the model, as [`ImageIndex.model`].
        fingerprint: of the model's weights and settings; embeddings of another one do not compare.
        files: `[name, size, mtime in ns]` of the files that the fingerprint was taken of.
        dim, dtype, count: of the embeddings.
        sources: what was indexed, as `resolve_source` names it.
        skipped: images that could not be read, and why.
        neighbours: `exact`, `approximate` or `auto`, by which size decides.
        checksums: SHA-256 of the other files, by name.
    """

    model: str
    fingerprint: str
    dim: int
    dtype: str = "float32"
    count: int = 0
    files: list[list[Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    neighbours: str = "auto"
    format: int = FORMAT
    checksums: dict[str, str] = field(default_factory=dict)


class ImageIndex:
    """An index on disk, opened for search. Nothing but its manifest is read before it is used.

    It may be used by several threads at once, and by processes forked from the one that opened it, before or after its
    first search. It stays the one that was opened when the folder is updated meanwhile.

    Args:
        folder: of the index.
        manifest: its manifest.

    Example:
        >>> index = ImageIndex.open("photos.index")  # doctest: +SKIP
        >>> index.search(encode_texts(model, ["two dogs in the snow"])[0], k=5)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self._parts: dict[int, pa.Table] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike, verify: bool | None = None) -> "ImageIndex":
        """The index in a folder.

        Args:
            folder: of the index.
            verify: compare the files with their checksums; by default those of an index of up to `VERIFIED` bytes.

        Raises:
            DataError: there is none, a later version wrote it, it is damaged, or its files do not belong together.
        """
        path = Path(folder).expanduser()
        recover_folder(path)
        if not (path / MANIFEST).is_file():
            raise DataError(f"{folder}: no index here; make one with: miniclip index MODEL SOURCE -o {folder}")
        begun = (path / MANIFEST).stat().st_ino
        try:
            index = cls(path, _read_manifest(path))
            index._check_files(verify)
        except Exception as error:  # whatever the libraries raise at files that nobody wrote
            if (path / MANIFEST).is_file() and (path / MANIFEST).stat().st_ino != begun:  # replaced in the meantime
                return cls.open(folder, verify)
            raise error if isinstance(error, DataError) else _damaged(path, error) from error
        return index

    def _check_files(self, verify: bool | None) -> None:
        """Hold the files against the manifest; they stay open, so that they are always those of one index."""
        manifest, files = self.manifest, {name: self.folder / name for name in self.manifest.checksums}
        if verify or (verify is None and sum(file.stat().st_size for file in files.values()) <= VERIFIED):
            for name, file in files.items():
                if file_checksum(file) != manifest.checksums[name]:
                    raise ValueError(f"{name} does not have the checksum that it was written with")
        sizes = self.embeddings.shape, pq.read_metadata(pa.BufferReader(self._parquet)).num_rows
        expected = (manifest.count, manifest.dim), manifest.count
        if sizes != expected or self.embeddings.dtype != manifest.dtype:
            raise DataError(
                f"{self.folder}: {MANIFEST} tells of {expected[0]} {manifest.dtype} embeddings and {expected[1]} "
                f"entries, there are {sizes[0]} {self.embeddings.dtype} and {sizes[1]}; delete it and index again"
            )
        self.neighbours  # noqa: B018  (opened)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def model(self) -> str:
        """Folder or Hub name of the model that made the embeddings."""
        return self.manifest.model

    @cached_property
    def _parquet(self) -> pa.Buffer:
        """The whole file of entries, memory-mapped: each reader has its own place in it."""
        return pa.memory_map(str(self.folder / ENTRIES)).read_buffer()

    @cached_property
    def entries(self) -> pa.Table:
        """One row an image: the columns of [`SCHEMA`] but for `thumbnail`. `datasets.Dataset(index.entries)` works."""
        try:
            return pq.read_table(pa.BufferReader(self._parquet), columns=COLUMNS, page_checksum_verification=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    @cached_property
    def embeddings(self) -> np.ndarray:
        """`[images, dim]`, memory-mapped, in the order of the entries."""
        return map_embeddings(self.folder / EMBEDDINGS)

    @cached_property
    def neighbours(self) -> Neighbours:
        """What answers a search: the approximate index if there is one and FAISS to read it, else exact."""
        path = self.folder / NEIGHBOURS
        if path.is_file() and find_spec("faiss") is not None:
            return ApproximateNeighbours(self.embeddings, path)
        return Neighbours(self.embeddings)

    def read_entries(self) -> pa.Table:
        """All columns of [`SCHEMA`], thumbnails too."""
        try:
            source = pa.BufferReader(self._parquet)
            return pq.read_table(source, schema=SCHEMA, page_checksum_verification=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    def entry(self, index: int) -> dict[str, Any]:
        """The row of an image as a dictionary."""
        row: dict[str, Any] = self._part(index // ROW_GROUP).slice(index % ROW_GROUP, 1).to_pylist()[0]
        return row

    def _part(self, number: int) -> pa.Table:
        """`ROW_GROUP` entries: a search shows a few, and to read all of them would take most of its time."""
        if "entries" in vars(self):
            return self.entries.slice(number * ROW_GROUP, ROW_GROUP)
        if number not in self._parts:
            self._parts[number] = self._read_part(number, COLUMNS)
        return self._parts[number]

    def _read_part(self, number: int, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(pa.BufferReader(self._parquet), page_checksum_verification=True)
            return file.read_row_group(number, columns=columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    def thumbnail(self, index: int) -> bytes | None:
        """JPEG of an image that has no file of its own; None for one that has."""
        part = self._read_part(index // ROW_GROUP, ["thumbnail"])
        content: bytes | None = part["thumbnail"][index % ROW_GROUP].as_py()
        return content

    def search(
        self,
        query_embedding: Any,
        k: int = 10,
        filter: EntryFilter | np.ndarray | None = None,
        exact: bool = False,
    ) -> list[Match]:
        """The images nearest to a query, best first; equal ones in the order of the index.

        Args:
            query_embedding: `[dim]` or `[1, dim]`, array or tensor, of this index's model; its length does not matter.
            k: how many.
            filter: which images may be found: an [`EntryFilter`], or their rows.
            exact: leave an approximate index aside. What passes a filter is always compared exactly.

        Returns:
            At most `k` [`Match`]es: `name` is the entry's id, `score` the cosine similarity, `index` the row.

        Raises:
            UsageError: `k` below 1, or a query that is not a finite vector of the index's dimension.
        """
        query = self._checked_query(query_embedding)
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        rows = filter.rows(self.entries) if isinstance(filter, EntryFilter) else filter
        neighbours = Neighbours(self.embeddings) if exact else self.neighbours
        scores, found = neighbours.search(query, k, rows)
        names = (self._part(i // ROW_GROUP)["id"][i % ROW_GROUP].as_py() for i in found.tolist())
        return [Match(name, float(s), int(i)) for name, s, i in zip(names, scores, found, strict=True)]

    def _checked_query(self, query_embedding: Any) -> np.ndarray:
        query = np.asarray(query_embedding, dtype=np.float32).squeeze()
        if query.shape != (self.manifest.dim,) or not np.isfinite(query).all() or not query.any():
            raise UsageError(
                f"expected a query of {self.manifest.dim} finite numbers, not all 0, as {self.model} embeds it; got "
                f"shape {query.shape}"
            )
        return query / np.linalg.norm(query)

    def to_parquet(self, path: str | os.PathLike) -> Path:
        """Entries and embeddings in one Parquet file, for other engines: the columns of `entries`, and `embedding`.

        Returns:
            The file.
        """
        target = Path(path)
        fresh = target.with_name(f".{target.name}.new")
        dtype = pa.from_numpy_dtype(self.embeddings.dtype)
        schema = self.entries.schema.append(pa.field("embedding", pa.list_(dtype, self.manifest.dim)))
        with pq.ParquetWriter(fresh, schema) as writer:
            for start in range(0, len(self), BLOCK):
                block = np.ascontiguousarray(self.embeddings[start : start + BLOCK])
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), self.manifest.dim)
                part = self.entries.slice(start, BLOCK).append_column(schema.field("embedding"), vectors)
                writer.write_table(part)
        fresh.replace(target)
        return target


def _read_manifest(folder: Path) -> Manifest:
    """The manifest of an index.

    Raises:
        DataError: a later version wrote it.
        ValueError: it was changed since it was written.
    """
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if values["format"] > FORMAT:
        raise DataError(
            f"{folder}: an index of format {values['format']}, this version reads up to {FORMAT}: upgrade "
            "miniclip, or index again into another folder"
        )
    own = values.pop(OWN, None)
    if own is not None and own != value_checksum(values):
        raise ValueError(f"{MANIFEST} does not have the checksum that it was written with")
    return Manifest(**values)


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: an index that cannot be read ({error}); delete it and index again")


def write_index(folder: Path, manifest: Manifest, entries: pa.Table, blocks: Iterable[np.ndarray]) -> ImageIndex:
    """Write an index, or replace one: at any moment the folder is the old one or the new one.

    Args:
        folder: to write.
        manifest: of it; `count` and `checksums` are set here.
        entries: of [`SCHEMA`].
        blocks: `[n, dim]` embeddings in the order of the entries.

    Raises:
        MiniClipError: the disk is full or cannot be written; what was there before is kept.
    """
    manifest = replace(manifest, count=entries.num_rows)
    try:
        with replaced_folder(folder) as fresh:
            table = entries.cast(SCHEMA)
            pq.write_table(table, fresh / ENTRIES, row_group_size=ROW_GROUP, write_page_checksum=True)
            write_embeddings(fresh / EMBEDDINGS, manifest.count, manifest.dim, manifest.dtype, blocks)
            if is_chosen(manifest.neighbours, manifest.count):
                build_neighbours(map_embeddings(fresh / EMBEDDINGS), fresh / NEIGHBOURS)
            manifest = replace(manifest, checksums={path.name: file_checksum(path) for path in fresh.iterdir()})
            values = asdict(manifest)
            text = json.dumps({**values, OWN: value_checksum(values)}, indent=1, ensure_ascii=False)
            (fresh / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MiniClipError(
            f"{folder} cannot be written: {error.strerror or error}; make room or name another folder, and start "
            "again: what was there before is kept, and so is what has been encoded"
        ) from error
    return ImageIndex(folder, manifest)


# --- embeddings as safetensors, written in blocks and memory-mapped -------------------------------------------------
