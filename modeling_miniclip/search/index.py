"""`ImageIndex`: images embedded once and searched often, in a folder that is either complete or absent.

| file | contents |
|---|---|
| `manifest.json` | the fields of [`Manifest`] with the checksums of the other files, and a checksum of itself |
| `entries.parquet` | one row per image, see [`SCHEMA`]; a thumbnail if the image has no file |
| `embeddings.safetensors` | `embeddings` `[images, dim]`, unit norm, one row per entry; for int8 `scales`, too |
| `neighbours.faiss` | an approximate index of the embeddings, for large indexes (see `approximate.py`) |
| `unrelated.safetensors` | what unrelated captions score here (see `unrelated.py`); older indexes lack it |

Checksums detect damage on the disk. They are compared before every update, when an index of up to `VERIFIED` bytes is
opened, and on request. `FORMAT` goes up whenever an older version of this package could misread a folder.
"""

import copy
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, MiniClipError, ModelError, UsageError
from ..utils.arrays import as_array
from ..utils.checksums import file_checksum, value_checksum
from ..utils.files import identity, recover_folder, replace_file, replace_text, replaced_folder
from .approximate import FILE as NEIGHBOURS
from .approximate import ApproximateNeighbours, build_neighbours, uses_approximate_search
from .embeddings_file import BLOCK, Embeddings, map_embeddings, truncate_rows, write_embeddings
from .exact import Match, Neighbours
from .filters import EntryFilter
from .unrelated import FILE as UNRELATED
from .unrelated import UnrelatedCaptions, cut_matches, cutoff_of

FORMAT = 1
MANIFEST, ENTRIES, EMBEDDINGS = "manifest.json", "entries.parquet", "embeddings.safetensors"
ROW_GROUP = 2_048  # entries that are read at a time
VERIFIED = 256 << 20  # bytes; checking them takes little time compared with a search's imports and model
OWN = "sha256"  # key of the manifest that holds the checksum of all other keys

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # absolute path, or source/name; bytes that are not UTF-8 are escaped, see utils/names.py
        ("path", pa.string()),  # null: the image is not a file
        ("source", pa.string()),
        ("size", pa.int64()),  # bytes; -1: unknown until the image is read
        ("mtime", pa.int64()),  # nanoseconds; -1: unknown
        ("hash", pa.string()),  # blake2b of the encoded image, 16 bytes in hexadecimal
        ("date", pa.timestamp("s")),  # when it was taken (EXIF), else when its file changed; local time
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("thumbnail", pa.large_binary()),  # JPEG; null: the image is a file
        (
            "version",
            pa.string(),
        ),  # of the shard that the image is in; null: it is a file; older indexes lack it
    ]
)
COLUMNS = [name for name in SCHEMA.names if name not in ("thumbnail", "version")]


@dataclass(frozen=True)
class Manifest:
    """Description of an index, stored as `manifest.json`.

    Args:
        model: name or folder of the model.
        fingerprint: hash of the model's weights and settings. Embeddings are comparable only if it is equal.
        dim: numbers per embedding.
        dtype: number format of the embeddings, `float32`, `float16` or `int8`.
        count: number of images.
        files: `[name, size, mtime in ns]` of the model's files when the fingerprint was computed.
        sources: indexed sources, as named by `resolve_source`.
        skipped: images that could not be read, and folders that could not be listed, with the reason.
        neighbours: kind of search: `exact`, `approximate`, or `auto`, which depends on the number of images.
        format: version of the folder's format.
        checksums: SHA-256 of the other files, by name.
        reduced: whether large JPEGs were decoded at reduced size.
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
    reduced: bool = False


class ImageIndex:
    """An index on disk, opened for search. Its files are memory-mapped and read when they are needed.

    Several threads may use an index at once, and so may processes that were forked before or after its first search.
    An open index does not change when its folder is updated.

    Args:
        folder: folder of the index.
        manifest: manifest in this folder.

    Attributes:
        embeddings: `[images, dim]`, unit norm, in the order of the entries; memory-mapped.

    Examples:
        >>> index = ImageIndex.open("photos.index")  # doctest: +SKIP
        >>> index.search(encode_texts(model, ["two dogs in the snow"])[0], k=5)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        # All files are opened here, so that they belong together even if the folder is replaced later.
        self._entries_file: pa.Buffer = pa.memory_map(str(folder / ENTRIES)).read_buffer()
        self.embeddings: Embeddings = map_embeddings(folder / EMBEDDINGS)  # [images, dim], in the order of the entries
        self.neighbours = _open_neighbours(folder, self.embeddings)
        self.unrelated = _load_unrelated(folder, self.embeddings)
        self._row_groups: dict[int, pa.Table] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike, verify: bool | None = None) -> "ImageIndex":
        """Open the index in a folder.

        Args:
            folder: folder of the index.
            verify: whether to compare the files with their checksums; by default only up to 256 MB.

        Returns:
            The opened index.

        Raises:
            DataError: there is no index, a later version wrote it, or it is damaged.
        """
        path = Path(folder).expanduser()
        recover_folder(path)
        if not (path / MANIFEST).is_file():
            raise DataError(f"{folder}: no index here; make one with: miniclip index MODEL SOURCE -o {folder}")
        opened = identity(path / MANIFEST)
        try:
            manifest = _read_manifest(path)
            _verify_checksums(path, manifest, verify)
            index = cls(path, manifest)
            index._check_sizes()
        except Exception as error:  # the libraries raise errors of many classes for damaged files
            if (path / MANIFEST).is_file() and identity(path / MANIFEST) != opened:  # replaced in the meantime
                return cls.open(folder, verify)
            raise error if isinstance(error, DataError) else _damaged(path, error) from error
        return index

    def close(self) -> None:
        """Let go of the files, after which the index is of no more use: Windows replaces no file that is open."""
        for name in ("_entries_file", "embeddings", "neighbours", "unrelated", "entries"):
            vars(self).pop(name, None)
        self._row_groups = {}

    def _check_sizes(self) -> None:
        manifest = self.manifest
        sizes = self.embeddings.shape, pq.read_metadata(pa.BufferReader(self._entries_file)).num_rows
        expected = (manifest.count, manifest.dim), manifest.count
        if sizes != expected or self.embeddings.dtype != manifest.dtype:
            raise DataError(
                f"{self.folder}: {MANIFEST} lists {expected[0]} {manifest.dtype} embeddings and {expected[1]} "
                f"entries, but there are {sizes[0]} {self.embeddings.dtype} and {sizes[1]}; delete it and index again"
            )

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def model(self) -> str:
        """Folder or Hub name of the model that computed the embeddings."""
        return self.manifest.model

    @cached_property
    def entries(self) -> pa.Table:
        """One row per image, for example for `datasets.Dataset(...)`.

        The columns are `id`, `path`, `source`, `size` in bytes, `mtime` in nanoseconds, `hash`, `date`, `width` and
        `height` in pixels, `captions` and `split`.
        """
        return self._read_entries(columns=COLUMNS)

    def read_entries(self) -> pa.Table:
        """The entries with their thumbnails, which are JPEG.

        Returns:
            One row per image, with all columns.

        Raises:
            DataError: the index is damaged.
        """
        return self._read_entries(schema=SCHEMA)

    def _read_entries(self, **options: Any) -> pa.Table:
        try:
            source = pa.BufferReader(self._entries_file)
            return pq.read_table(source, **options, page_checksum_verification=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Columns of the entries in blocks, null where an index lacks them.

        Args:
            columns: names of the columns.

        Yields:
            Blocks of rows, in the order of the index.

        Raises:
            DataError: the index is damaged.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(self._entries_file), page_checksum_verification=True)
            names = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROW_GROUP, columns=names):
                arrays = [
                    batch.column(name) if name in names else pa.nulls(len(batch), SCHEMA.field(name).type)
                    for name in columns
                ]
                yield pa.RecordBatch.from_arrays(arrays, columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    def group(self, number: int) -> pa.Table:
        """All columns of a group of 2,048 entries.

        Args:
            number: number of the group, from 0.

        Returns:
            One row per image.

        Raises:
            DataError: the index is damaged.
        """
        table = self._read_row_group(number, SCHEMA.names)
        for name in SCHEMA.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
        return table.select(SCHEMA.names).cast(SCHEMA)

    def entry(self, index: int) -> dict[str, Any]:
        """The entry of one image, without its thumbnail.

        Args:
            index: row of the image.

        Returns:
            Its values by column.

        Raises:
            DataError: the index is damaged.
        """
        row: dict[str, Any] = self._row_group(index // ROW_GROUP).slice(index % ROW_GROUP, 1).to_pylist()[0]
        return row

    def thumbnail(self, index: int) -> bytes | None:
        """The thumbnail of an image that is not a file.

        Args:
            index: row of the image.

        Returns:
            JPEG, or None for a file.

        Raises:
            DataError: the index is damaged.
        """
        rows = self._read_row_group(index // ROW_GROUP, ["thumbnail"])
        content: bytes | None = rows["thumbnail"][index % ROW_GROUP].as_py()
        return content

    def _row_group(self, number: int) -> pa.Table:
        """`ROW_GROUP` entries. A search shows a few images; reading all entries would take most of its time."""
        if "entries" in vars(self):  # all of them have been read already
            return self.entries.slice(number * ROW_GROUP, ROW_GROUP)
        if number not in self._row_groups:
            self._row_groups[number] = self._read_row_group(number, COLUMNS)
        return self._row_groups[number]

    def _read_row_group(self, number: int, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(pa.BufferReader(self._entries_file), page_checksum_verification=True)
            return file.read_row_group(number, columns=columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.folder, error) from error

    def search(
        self,
        query_embedding: Any,
        k: int = 10,
        filter: Any = None,
        exact: bool = False,
        cutoff: float | str | None = None,
    ) -> list[Match]:
        """Find the images nearest to a query.

        Args:
            query_embedding: `[dim]` or `[1, dim]` array, tensor or list from this index's model, of any length.
            k: number of images to find.
            filter: images to consider: an [`EntryFilter`], or `[n]` rows (array, tensor or list).
            exact: whether to search exactly even if there is an approximate index; filtered searches always do.
            cutoff: for queries of text: leave out images if unrelated captions find one that fits them as well more
                often than this, from 0 to 1; `auto` for the cutoff that keeps about 95 % of the right first results, 1
                to keep all. Unless it is None, the matches have a `chance`.

        Returns:
            At most `k` [`Match`]es, best first, ties in the order of the index: `name` is the entry's id, `score` the
            cosine similarity, `index` the row, `chance` how often unrelated captions score as high.

        Raises:
            UsageError: `k` is below 1, the query is not a finite vector of the index's dimension, there is no such
                cutoff, or the index does not know what unrelated captions score.
        """
        query = self._checked_query(query_embedding)
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        largest = None if cutoff is None else cutoff_of(cutoff)
        rows = filter.rows(self.entries) if isinstance(filter, EntryFilter) else self._checked_rows(filter)
        neighbours = Neighbours(self.embeddings) if exact else self.neighbours
        scores, found = neighbours.search(query, k, rows)
        names = (self._row_group(i // ROW_GROUP)["id"][i % ROW_GROUP].as_py() for i in found.tolist())
        matches = [Match(name, float(s), int(i)) for name, s, i in zip(names, scores, found, strict=True)]
        return matches if largest is None else self._cut(matches, query, largest)

    def _cut(self, matches: list[Match], query: np.ndarray, cutoff: float) -> list[Match]:
        """The matches whose chance is at most `cutoff`, with their chances."""
        if self.unrelated is None:
            update = shlex.join(["miniclip", "index", self.model, "-o", str(self.folder)])
            raise UsageError(f"{self.folder} does not know what unrelated captions score; update it: {update}")
        return cut_matches(matches, self.unrelated, query, cutoff)

    def truncate(self, dim: int) -> "ImageIndex":
        """The index with the first `dim` dimensions of its embeddings, normalised again; its folder does not change.

        They are in memory, in float32, and are searched exactly.

        Args:
            dim: number of dimensions to keep.

        Returns:
            An index in memory, with `[images, dim]` float32 embeddings.

        Raises:
            UsageError: the embeddings do not have as many.
        """
        if not 1 <= dim <= self.manifest.dim:
            raise UsageError(
                f"truncate_dim {dim}: expected a number from 1 to {self.manifest.dim}, the dimensions of {self.folder}"
            )
        short = np.empty((len(self), dim), np.float32)
        for start in range(0, len(self), BLOCK):
            short[start : start + BLOCK] = truncate_rows(self.embeddings[start : start + BLOCK], dim)
        index = copy.copy(self)
        index.manifest = replace(self.manifest, dim=dim, dtype="float32", neighbours="exact")
        index.embeddings, index.neighbours = short, Neighbours(short)
        if self.unrelated is not None:
            index.unrelated = UnrelatedCaptions.compare(truncate_rows(self.unrelated.captions, dim), short)
        return index

    def _checked_rows(self, rows: Any) -> np.ndarray | None:
        if rows is None:
            return None
        chosen = as_array(rows)
        if chosen.dtype == bool and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        is_row = (chosen >= 0) & (chosen < len(self)) if chosen.dtype.kind in "iu" else np.zeros(1, bool)
        if chosen.size and (chosen.ndim != 1 or not is_row.all()):
            raise UsageError(f"filter: expected rows from 0 to {len(self) - 1}, got {chosen.dtype} {chosen.shape}")
        is_sorted = bool((np.diff(chosen) > 0).all())
        return chosen.astype(np.int64) if is_sorted else np.unique(chosen).astype(np.int64)

    def _checked_query(self, query_embedding: Any) -> np.ndarray:
        query = as_array(query_embedding).astype(np.float32).squeeze()
        if query.shape != (self.manifest.dim,) or not np.isfinite(query).all() or not query.any():
            raise UsageError(
                f"expected a query of {self.manifest.dim} finite numbers, not all 0, embedded by {self.model}; got "
                f"shape {query.shape}{self._hint(query)}"
            )
        return query / np.linalg.norm(query)

    def _hint(self, query: np.ndarray) -> str:
        is_longer = query.ndim == 1 and len(query) > self.manifest.dim
        return f"; embed it with truncate_dim={self.manifest.dim}" if is_longer else ""

    def to_parquet(self, path: str | os.PathLike) -> Path:
        """Write entries and embeddings to one Parquet file, for other engines; int8 as float32.

        Args:
            path: file to write, with the columns of `entries` and `embedding`.

        Returns:
            The path of the file.

        Raises:
            DataError: the index is damaged.
            OSError: the file cannot be written.
        """
        target = Path(path)
        fresh = target.with_name(f".{target.name}.new")
        dtype = pa.from_numpy_dtype(self.embeddings[:0].dtype)
        schema = self.entries.schema.append(pa.field("embedding", pa.list_(dtype, self.manifest.dim)))
        with pq.ParquetWriter(fresh, schema) as writer:
            for start in range(0, len(self), BLOCK):
                block = np.ascontiguousarray(self.embeddings[start : start + BLOCK])
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), self.manifest.dim)
                part = self.entries.slice(start, BLOCK).append_column(schema.field("embedding"), vectors)
                writer.write_table(part)
        replace_file(fresh, target)
        return target


def _read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
        DataError: a later version wrote it.
        ValueError: it does not match its own checksum.
    """
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if values["format"] > FORMAT:
        raise DataError(
            f"{folder}: an index of format {values['format']}, but this version reads up to {FORMAT}: upgrade "
            "miniclip, or index again into another folder"
        )
    own = values.pop(OWN, None)
    if own is not None and own != value_checksum(values):
        raise ValueError(f"{MANIFEST} does not match its checksum")
    return Manifest(**values)


def _verify_checksums(folder: Path, manifest: Manifest, verify: bool | None) -> None:
    files = {name: folder / name for name in manifest.checksums}
    if verify or (verify is None and sum(file.stat().st_size for file in files.values()) <= VERIFIED):
        for name, file in files.items():
            if file_checksum(file) != manifest.checksums[name]:
                raise ValueError(f"{name} does not match its checksum")


def _open_neighbours(folder: Path, embeddings: Embeddings) -> Neighbours:
    """Approximate search if the index has a file for it and FAISS is installed, otherwise exact search."""
    path = folder / NEIGHBOURS
    if path.is_file() and find_spec("faiss") is not None:
        return ApproximateNeighbours(embeddings, path)
    return Neighbours(embeddings)


def _load_unrelated(folder: Path, embeddings: Embeddings) -> UnrelatedCaptions | None:
    path = folder / UNRELATED
    return UnrelatedCaptions.load(path, embeddings) if path.is_file() else None


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: this index cannot be read ({error}); delete it and index again")


def folder_of_model(index: ImageIndex) -> Path:
    """The folder of the model that built an index, see `clips.exported.export_folder`.

    Raises:
        ModelError: it is gone; the message has the command that names its new place.
    """
    from ..clips.exported import export_folder  # loads torch

    try:
        return export_folder(index.model)
    except ModelError as error:
        command = f"miniclip index NEW_PLACE -o {shlex.quote(str(index.folder))}"
        raise ModelError(f"{error}; if the model has moved, run (nothing is encoded again): {command}") from error


def rebuild_command(
    index: ImageIndex,
    model: str,
    width: int,
    dtype: str | None = None,
    truncate_dim: int | None = None,
    reduced: bool | None = None,
) -> str:
    """The command that builds an index again, in its format and length or in others.

    Args:
        index: the index.
        model: model to build it with.
        width: dimensions of the model.
        dtype: another format, or None.
        truncate_dim: another length, or None.
        reduced: whether to decode large JPEGs at reduced size; None keeps what it is.
    """
    manifest = _read_manifest(index.folder)  # that of `index` may be cut short
    words = ["miniclip", "index", model, *manifest.sources, "-o", str(index.folder), "--overwrite"]
    kind, dim = dtype or manifest.dtype, truncate_dim or manifest.dim
    if dtype is not None or kind != "float32":
        words += ["--dtype", kind]
    if truncate_dim is not None or dim < width:
        words += ["--truncate_dim", str(dim)]
    if manifest.reduced if reduced is None else reduced:
        words.append("--reduced")
    return shlex.join(words)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace the manifest of an index, in one step."""
    values = asdict(manifest)
    text = json.dumps({**values, OWN: value_checksum(values)}, indent=1)  # ASCII, so that any path can be stored
    replace_text(folder / MANIFEST, text + "\n")


def write_index(
    folder: Path,
    manifest: Manifest,
    entries: Iterable[pa.Table],
    blocks: Iterable[np.ndarray],
    release: Callable[[], None] | None = None,
    captions: np.ndarray | None = None,
) -> ImageIndex:
    """Write or replace an index. The folder holds the old index until the new one is complete.

    Args:
        folder: folder to write.
        manifest: manifest of the new index; `count` and `checksums` are filled in here.
        entries: tables with the columns of [`SCHEMA`], all but the last one of `ROW_GROUP` rows.
        blocks: `[n, dim]` arrays of embeddings, together in the order of the entries.
        release: called when all has been read, before the folder is replaced; closes what is still open in it.
        captions: `[captions, dim]` embeddings of unrelated captions, to compare all images with; None for an index
            that only keeps embeddings for another one.

    Returns:
        The new index, opened.

    Raises:
        MiniClipError: the disk is full or cannot be written; the old index is kept.
    """
    try:
        with replaced_folder(folder) as fresh:
            count = 0
            with pq.ParquetWriter(fresh / ENTRIES, SCHEMA, write_page_checksum=True) as writer:
                for table in entries:
                    writer.write_table(table.cast(SCHEMA), ROW_GROUP)
                    count += len(table)
            manifest = replace(manifest, count=count)
            write_embeddings(fresh / EMBEDDINGS, manifest.count, manifest.dim, manifest.dtype, blocks)
            if uses_approximate_search(manifest.neighbours, manifest.count):
                build_neighbours(map_embeddings(fresh / EMBEDDINGS), fresh / NEIGHBOURS)
            if captions is not None:
                UnrelatedCaptions.compare(captions, map_embeddings(fresh / EMBEDDINGS)).save(fresh / UNRELATED)
            manifest = replace(manifest, checksums={path.name: file_checksum(path) for path in fresh.iterdir()})
            write_manifest(fresh, manifest)
            if release is not None:
                release()
    except OSError as error:
        raise MiniClipError(
            f"{folder} cannot be written: {error.strerror or error}; free some space or choose another folder, then "
            "run again: the old index and all finished embeddings are kept"
        ) from error
    return ImageIndex(folder, manifest)
