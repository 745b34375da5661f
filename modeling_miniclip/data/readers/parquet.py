"""Parquet files with images: `{bytes, path}` as `datasets` writes them, bytes as img2dataset does, or paths."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ...errors import DataError, Problem, one_line
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..shards.remote_files import explained, file_system, is_url
from ..shards.remote_shards import CONNECTIONS, current_cache
from ..shards.shard_patterns import expand_shards, inputs_of_shards, short_names, split_of_shard
from ..shards.shard_url import HELD_BYTES, version_of
from ..tables.table_rows import (
    HELD,
    NAMED,
    Block,
    TableColumns,
    TableFile,
    find_columns,
    hashes_of_images,
    held_images,
    kind_of_error,
    read_tables,
)

ROWS = 4096  # that are read at a time
NO_COLUMNS = pa.RecordBatch.from_arrays([], names=[])
AHEAD = 8  # remote files whose texts are read while those of another one are used
SMALL_GROUP = 16_000_000  # bytes of a row group from which images are read fast in any order
LOOKED_AT = 500  # rows of a folder's first file, to see whether it repeats images


def read_parquet(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of Parquet files, their rows numbered from 0 within each file.

    Only text columns are read, except where a footer says that images are missing, and where names, or the first rows,
    show that images occur in several rows.

    Args:
        source: path or URL of a file, path of a folder of such files, or a pattern such as `data/train-*.parquet`.
        options: how to read them.
        on_problem: function called with what is left out, and with a file that cannot be read (kind `shard`) or is
            damaged (`damaged-shard`).

    Raises:
        DataError: nothing matches the pattern, or a file has no column of images or of captions.
    """
    sources = expand_shards(source, "parquet")
    ahead = _ReadAhead(sources)
    try:
        files = []
        for found in _table_files(sources, ahead):
            if isinstance(found, Problem):
                on_problem(found)
            else:
                files.append(found)
        if not options.all_images:  # an index reads one image after the other
            _report_large_groups(files, on_problem)
        yield from read_tables(files, options, on_problem, bool(files) and _repeats_images(files[0], options))
    finally:
        ahead.pool.shutdown(wait=False, cancel_futures=True)


def _table_files(paths: list[str], ahead: "_ReadAhead") -> Iterator[TableFile | Problem]:
    """The files, or why they cannot be read; those that are elsewhere several at a time."""

    def open_file(number: int, name: str) -> TableFile | Problem:
        try:
            return table_file(paths[number], name, partial(ahead.read, number))
        except DataError as error:
            if error.problem is None or error.problem.kind != "shard":
                raise
            return error.problem
        except (OSError, pa.ArrowException) as error:
            text = f"cannot be read as Parquet: {one_line(error)}; copy or download it again"
            return Problem(kind_of_error(error), text, paths[number])

    pool = ThreadPoolExecutor(CONNECTIONS if any(map(is_url, paths)) else 1)
    try:
        found = pool.map(open_file, range(len(paths)), short_names(paths))
        yield from tqdm(found, "read footers", len(paths), unit="file", delay=2, leave=False)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def inputs_parquet(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows of Parquet files depend on, for the key of their table."""
    yield from inputs_of_shards(expand_shards(source, "parquet"))


def table_file(path: str, name: str, read: Callable[[TableColumns, list[str], bool], Iterator[Block]]) -> TableFile:
    """A Parquet file as part of a table.

    Args:
        path: path or URL of the file.
        name: its name in the names of rows.
        read: as of [`TableFile`].

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        DataError: it is elsewhere and cannot be read.
    """
    with _open(path) as file:
        about = file.metadata
    return TableFile(
        path=path,
        where=path,
        prefix=f"{name}/",
        schema=about.schema.to_arrow_schema(),
        rows=about.num_rows,
        read=read,
        split=split_of_shard(path),
        bounds="" if is_url(path) else os.path.dirname(os.path.abspath(path)),
        version="" if is_url(path) else version_of(path),
        group=_largest_group(about),
    )


def _largest_group(about: pq.FileMetaData) -> tuple[int, int]:
    """Rows and bytes of the largest column in a row group."""
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    sizes = [
        (max((group.column(i).total_uncompressed_size for i in range(group.num_columns)), default=0), group.num_rows)
        for group in groups
    ]
    size, rows = max(sizes, default=(0, 0))
    return rows, size


def _report_large_groups(files: Sequence[TableFile], on_problem: OnProblem) -> None:
    """Report row groups that are too large to read images in any order."""
    large = [file for file in files if file.group[1] > HELD_BYTES]
    if not large:
        return
    rows, size = max((file.group for file in large), key=lambda group: group[1])
    fewer = max(1, rows * SMALL_GROUP // size)
    text = (
        f"{len(large)} of {len(files)} files have row groups of up to {size / 1e6:,.0f} MB, and to read one image, "
        "all of its group is read. For fast training, write each file again with smaller ones: "
        f"datasets.Dataset.from_parquet(OLD).to_parquet(NEW, batch_size={fewer})"
    )
    on_problem(Problem("row-groups", text, large[0].where))


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; of one behind a URL, only the parts that are needed are fetched.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        DataError: it is elsewhere and cannot be read.
    """
    local = current_cache().fetched(path)
    if local is not None:
        with pq.ParquetFile(local) as file:
            yield file
        return
    damaged: pa.ArrowException | None = None
    with explained(path):
        try:
            with _open_remote(path) as file:
                yield file
        except pa.ArrowException as error:
            damaged = error
    if damaged is not None:
        raise damaged


def _open_remote(path: str) -> pq.ParquetFile:
    files, remote = file_system(path)
    try:
        return pq.ParquetFile(files.open(remote, "rb", cache_type="none"))  # else it would read far ahead
    except pa.ArrowException:
        raise
    except (ValueError, NotImplementedError):  # the server sends files only as a whole
        return pq.ParquetFile(current_cache().local(path))


def _read_blocks(path: str, columns: TableColumns, texts: list[str], with_images: bool) -> Iterator[Block]:
    with _open(path) as file:
        for group in range(file.metadata.num_row_groups):
            all_held = columns.kind != "path" and _all_held(file, group, columns)
            wanted = [*texts, columns.image] if with_images or not all_held else texts
            if not wanted:
                yield NO_COLUMNS, np.full(file.metadata.row_group(group).num_rows, HELD, np.int8)
                continue
            rows = ROWS if wanted == texts else ROWS // 32
            for batch in file.iter_batches(rows, row_groups=[group], columns=list(dict.fromkeys(wanted))):
                yield batch, _held(batch, columns, all_held)


class _ReadAhead:
    """Reads the texts of remote files while those of the files before them are used: most of the time is waiting.

    Args:
        paths: paths and URLs of files.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.pool = ThreadPoolExecutor(AHEAD)
        self.waiting: dict[int, tuple[Any, Future[list[Block]]]] = {}

    def read(self, number: int, columns: TableColumns, texts: list[str], with_images: bool) -> Iterator[Block]:
        """The rows of a file, as `read` of a [`TableFile`]."""
        path = self.paths[number]
        if with_images or not is_url(path):
            yield from _read_blocks(path, columns, texts, with_images)
            return
        what = (columns, texts)
        if number in self.waiting and self.waiting[number][0] != what:  # its columns are not those of the file before
            del self.waiting[number]
        for following in range(number, min(number + AHEAD, len(self.paths))):
            if following not in self.waiting and is_url(self.paths[following]):
                self.waiting[following] = what, self.pool.submit(_texts_of, self.paths[following], columns, texts)
        yield from self.waiting.pop(number)[1].result()


def _texts_of(path: str, columns: TableColumns, texts: list[str]) -> list[Block]:
    """All rows of a file, without images that need not be in memory."""
    blocks = _read_blocks(path, columns, texts, False)
    return [(batch if (held == NAMED).any() else batch.select(texts), held) for batch, held in blocks]


def _held(batch: pa.RecordBatch, columns: TableColumns, all_held: bool) -> np.ndarray:
    if all_held:
        return np.full(len(batch), HELD, np.int8)
    return held_images(batch.column(columns.image), columns.kind)


def _all_held(file: pq.ParquetFile, group: int, columns: TableColumns) -> bool:
    """Whether the footer says that each row of a row group has an image."""
    leaf = f"{columns.image}.bytes" if columns.kind == "struct" else columns.image
    about = file.metadata.row_group(group)
    for number in range(about.num_columns):
        column = about.column(number)
        if column.path_in_schema == leaf:
            statistics = column.statistics
            return bool(statistics is not None and statistics.has_null_count and statistics.null_count == 0)
    return False


def _repeats_images(file: TableFile, options: ReadOptions) -> bool:
    """Whether images occur in several of the first rows, and no column names them."""
    columns = find_columns(file.schema, file.where, options)
    if columns.name is not None:
        return False
    seen: set[int] = set()
    count = 0
    for batch, held in file.read(columns, [], True):
        hashes = hashes_of_images(batch.column(columns.image), columns.kind, held)[held == HELD].tolist()
        if len(seen | set(hashes)) < len(seen) + len(hashes):
            return True
        seen.update(hashes)
        count += len(held)
        if count >= LOOKED_AT:
            break
    return False
