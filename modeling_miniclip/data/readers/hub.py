"""Datasets on the Hub, read from the Arrow files that `datasets` keeps of them."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from ...errors import DataError, MiniClipError, disk_error_message, one_line
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..tables.arrow_tables import files_of_dataset
from ..tables.table_cache import stat_of
from ..tables.table_rows import read_tables

SHARD_KINDS = {"parquet": "parquet", "webdataset": "tar"}  # by the module of `datasets` that reads them
COMMIT = re.compile(r"^(hf://datasets/[^@]+)@[0-9a-f]{40}/")
PLAIN_URL = re.compile(r"hf://[^{},*?\[\]]+")  # without what would be a pattern

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict


def read_hub(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of a dataset on the Hub, split by split, as [`read_tables`] yields them.

    Args:
        source: name of the dataset, `user/name`, or `user/name:configuration`.
        options: how to read it; with `stream_first_rows`, the images come with their bytes.
        on_problem: function called with what is left out.

    Raises:
        DataError: it cannot be loaded, or has no column of images or of captions.
    """
    splits = _load(source, options.revision, options.stream_first_rows)
    _load.cache_clear()
    files = [
        file
        for split, rows in splits.items()
        for file in files_of_dataset(rows, f"{source}, split {split}", str(split))
    ]
    yield from read_tables(files, options, on_problem, compare_all=True)


def inputs_hub(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows of a dataset depend on, for the key of their table."""
    for split, rows in _load(source, options.revision, options.stream_first_rows).items():
        yield str(split)
        yield from (stat_of(file["filename"]) for file in rows.cache_files)
        if not rows.cache_files:
            whole = hashlib.blake2b()
            for batch in rows.data.table.to_batches():
                whole.update(batch.serialize())
            yield whole.hexdigest()


@lru_cache(maxsize=1)  # the key of the table and its rows need the same
def _load(source: str, revision: str | None, first_rows: int | None) -> "DatasetDict":
    """The splits of a dataset.

    Raises:
        DataError: it cannot be loaded.
        MiniClipError: it cannot be stored.
    """
    from datasets import DatasetDict, load_dataset

    name, _, configuration = source.partition(":")
    with _explained(source):
        raw = load_dataset(
            name, configuration or None, revision=revision, streaming=first_rows is not None,
            **({} if first_rows is not None else {"keep_in_memory": False}),
        )  # fmt: skip
        return DatasetDict(raw) if first_rows is None else _first_rows(raw, first_rows)


def hub_shards(source: str) -> list[tuple[str, str, str]]:
    """The splits of a dataset whose images can be read from its shards, without a copy of all of them on this machine.

    Returns:
        For each split its name, the kind of its shards (`tar` or `parquet`) and a pattern of their URLs; empty for a
        dataset in other files.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import load_dataset_builder

    name, _, configuration = source.partition(":")
    with _explained(source):
        builder = load_dataset_builder(name, configuration or None)
    kind = SHARD_KINDS.get(type(builder).__module__.rpartition(".")[2])
    found = []
    for split, files in (builder.config.data_files or {}).items() if kind is not None else ():
        urls = [COMMIT.sub(r"\1/", str(file)) for file in files]  # the version of each shard is known anyway
        if not all(map(PLAIN_URL.fullmatch, urls)):
            return []
        start = os.path.commonprefix(urls).rpartition("/")[0] + "/"
        names = [url.removeprefix(start) for url in urls]
        found.append((str(split), str(kind), start + (names[0] if len(names) == 1 else f"{{{','.join(names)}}}")))
    return found


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Within the block, the errors of the libraries become one sentence."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    name, _, configuration = source.partition(":")
    try:
        yield
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        if (full := disk_error_message(error)) is not None:
            text = f"{source!r} cannot be stored: {full}; free some space, or let HF_HOME name another disk"
            raise MiniClipError(text) from error
        reason = one_line(error)
        if (known := re.search(r"(?:available configs|Available): \[(.*?)\]", reason)) is not None:
            names = re.findall(r"'([^']*)'", known[1])
            what = f"no configuration {configuration!r}" if configuration else "several configurations"
            raise DataError(f"{name!r} has {what}: name one of them, {source_names(name, names)}") from error
        if "script" in reason:  # datasets has no separate error class for this
            reason += '; the Hub keeps most such datasets as files too: revision="refs/convert/parquet"'
        raise DataError(f"{source!r} is neither a local file or folder nor a dataset on the Hub: {reason}") from error


def source_names(name: str, configurations: list[str]) -> str:
    """The names of the configurations of a dataset, as sources."""
    names = [f"{name}:{each}" for each in configurations[:10]]
    return ", ".join(names) + (", ..." if len(configurations) > 10 else "")


def _first_rows(streamed: "IterableDatasetDict", count: int) -> "DatasetDict":
    """The first rows of each split with the bytes of their images, in memory."""
    from datasets import Dataset, DatasetDict, Image

    taken = DatasetDict()
    for split, rows in streamed.items():
        features = rows.features.copy()
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        undecoded = rows.decode(False)
        first = list(undecoded.take(count))
        for cell in (row[name] for row in first for name in images):
            if cell and cell["bytes"] is None and cell["path"]:  # a file on the Hub
                with fsspec.open(cell["path"], "rb") as file:
                    cell["bytes"] = file.read()
        taken[split] = Dataset.from_list(first, features=undecoded.features).cast(features)
    return taken
