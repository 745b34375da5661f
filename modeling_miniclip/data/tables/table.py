"""The rows of a source as a table on disk: one row per image, memory-mapped, so that memory does not grow with it.

`rows.arrow` is read by `datasets`. It is written in two passes: the first writes the rows as they come, the second
joins those of the same image, and is skipped if there are none. In memory, there are only some numbers for each row.
"""

import json
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ...errors import Problem
from ...utils.files import replace_file
from ..columns import NEGATIVES
from ..problems import OnProblem
from ..rows import Row

if TYPE_CHECKING:
    from datasets import Dataset, Features

ROWS, ABOUT = "rows.arrow", "about.json"
BLOCK = 4_096  # rows that are written at a time,
LARGEST_BLOCK = 2**29  # or fewer, if they hold more bytes of images: Arrow's offsets end at 2 GB
NO_ROW = -1  # number of a row that is a whole file
JOINED_TOGETHER = 1_000_000  # keys that are sorted at a time

# Columns that hold a list per image, one value per caption, or any number of wrong captions.
LISTS = ("captions", "caption_hashes", "rows", "caption_ids", NEGATIVES)
# Columns that a source may lack, and their value in a row.
OPTIONAL: dict[str, Callable[[Row], Any]] = {
    "caption_ids": lambda row: row.ids,
    NEGATIVES: lambda row: row.negatives,
    "group": lambda row: row.group,
    "split": lambda row: row.split,
}


@dataclass
class About:
    """What a table does not say itself.

    Args:
        files: files, or datasets and splits, that the rows were read from, each with the column of the image's name.
        columns: the [`OPTIONAL`] columns that have any value.
        warnings: what a reader left out or did with a warning.
        damaged: damaged shards, each with what is wrong with it.
    """

    files: list[tuple[str, str | None]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it next to the rows."""
        (folder / ABOUT).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "About":
        """Read what [`save`][About.save] wrote."""
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return cls(**values | {"files": [(file, column) for file, column in values["files"]]})


def table_features() -> "Features":
    """Columns of `rows.arrow`.

    `caption_hashes` are CRC-32 of the captions, `rows` their row numbers in their file ([`NO_ROW`] for a whole file),
    `file` its number in `About`.
    """
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("int32")
    return Features(
        {
            "image": Image(),
            "image_id": text,
            "captions": List(text),
            "caption_ids": List(text),
            NEGATIVES: List(text),
            "group": text,
            "split": text,
            "caption_hashes": List(Value("uint32")),
            "rows": List(number),
            "file": number,
        }
    )


def write_table(rows: Iterable[Row], folder: Path, on_problem: OnProblem, title: str = "rows") -> About:
    """Write the rows of a source, joining those with equal keys in the order of their first one.

    Args:
        rows: rows as a reader yields them.
        folder: existing folder for `rows.arrow`.
        on_problem: function called if rows of one image are in different splits or groups; the first row counts.
        title: title of the progress bar, which is shown if this takes more than two seconds.
    """
    about = About()
    bar = tqdm(rows, desc=title, unit="row", delay=2, leave=False)
    keys = _write_runs(bar, folder / ROWS, about, on_problem)
    firsts = _first_runs(keys)
    if firsts is not None:
        _join_runs(folder / ROWS, firsts, about, on_problem, title)
    return about


# --- first pass: rows as they come ----------------------------------------------------------------------------------


def _write_runs(rows: Iterable[Row], path: Path, about: About, on_problem: OnProblem) -> array:
    """Write the rows, neighbours with equal keys as one; returns a hash of the key of each."""
    schema = table_features().arrow_schema
    keys, seen = array("q"), set[str]()
    files: dict[tuple[str, str | None], int] = {}
    block: list[Row] = []
    numbers: list[list[int]] = []  # of the rows that were joined, one per caption
    size = 0  # bytes of the images in the block

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:

        def flush() -> None:
            writer.write_batch(_batch_of(block, numbers, files, schema))
            for name, value_of in OPTIONAL.items():
                if name not in seen and any(value_of(row) for row in block):
                    seen.add(name)
            block.clear()
            numbers.clear()

        for row in rows:
            here = [NO_ROW if row.number is None else row.number] * (len(row.captions) or 1)
            if block and row.key is not None and row.key == block[-1].key:
                last = block[-1]
                if last.split != row.split or last.group != row.group:
                    _report_disagreement(last, row, on_problem)
                last.captions += row.captions
                last.ids += row.ids
                last.negatives += row.negatives
                numbers[-1] += here
                continue
            if len(block) == BLOCK or size >= LARGEST_BLOCK:
                flush()
                size = 0
            keys.append(hash(row.key if row.key is not None else (len(keys), "a row of its own")))
            block.append(row)
            size += len(row.image) if isinstance(row.image, bytes) else 0
            numbers.append(here)
        if block:
            flush()
    about.files = list(files)
    about.columns = sorted(seen)
    return keys


def _batch_of(
    rows: list[Row], numbers: list[list[int]], files: dict[tuple[str, str | None], int], schema: pa.Schema
) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "image": [
            {"bytes": row.image, "path": None} if isinstance(row.image, bytes) else {"bytes": None, "path": row.image}
            for row in rows
        ],
        "image_id": [row.name for row in rows],
        "captions": [row.captions for row in rows],
        "caption_ids": [row.ids for row in rows],
        NEGATIVES: [row.negatives for row in rows],
        "group": [row.group for row in rows],
        "split": [row.split for row in rows],
        "caption_hashes": [[zlib.crc32(text.encode()) for text in row.captions] for row in rows],
        "rows": numbers,
        "file": [files.setdefault((row.file, row.column), len(files)) for row in rows],
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[each.name], each.type) for each in schema], schema=schema)


def _report_disagreement(first: Row, row: Row, on_problem: OnProblem) -> None:
    """Report that two rows of an image name different splits or groups."""
    for name in ("split", "group"):
        one, other = getattr(first, name), getattr(row, name)
        if one != other:
            on_problem(_disagreement(name, first.name, one, other, row.file, row.number, row.column))


def _disagreement(
    name: str, image: str, one: str | None, other: str | None, file: str, number: int | None, column: str | None
) -> Problem:
    text = f"image {image!r} is in the {name} {other!r} here, and in {one!r} above; an image can be in only one {name}"
    return Problem("two-splits", text, file, number, column)


# --- second pass: rows of one image become one ----------------------------------------------------------------------


def _first_runs(keys: array) -> np.ndarray | None:
    """`[runs]` int64, for each run the first one with the same key; None if no key occurs twice."""
    hashes = np.frombuffer(keys, np.int64)
    firsts, repeated = None, False
    parts = 1 << max(0, (len(hashes) // JOINED_TOGETHER).bit_length())  # equal keys are in the same part
    for part in range(parts):
        here = np.flatnonzero((hashes & (parts - 1)) == part) if parts > 1 else np.arange(len(hashes))
        order = here[np.argsort(hashes[here], kind="stable")]
        same = hashes[order[1:]] == hashes[order[:-1]]
        if not same.any():
            continue
        repeated = True
        if firsts is None:
            firsts = np.arange(len(hashes))
        starts = np.flatnonzero(np.concatenate([[True], ~same]))  # of each group of equal keys in `order`
        firsts[order] = np.repeat(order[starts], np.diff([*starts, len(order)]))
    return firsts if repeated else None


def _join_runs(path: Path, firsts: np.ndarray, about: About, on_problem: OnProblem, title: str) -> None:
    """Write the table again, with the runs of each image as one row."""
    order = np.argsort(firsts, kind="stable")  # each image's runs one after the other, in the order of its first
    is_first = firsts[order] == order
    joined = path.with_suffix(".joined")
    source = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    blocks = source.to_batches()
    starts = np.cumsum([0, *map(len, blocks)])
    with pa.OSFile(str(joined), "wb") as file, pa.ipc.new_stream(file, source.schema) as writer:
        edges = np.flatnonzero(is_first)
        for start in tqdm(range(0, len(edges), BLOCK), f"{title}: join", unit="block", delay=2, leave=False):
            stop = edges[start + BLOCK] if start + BLOCK < len(edges) else len(order)
            runs = _take(blocks, starts, order[edges[start] : stop])
            heads = np.flatnonzero(is_first[edges[start] : stop])
            _check_runs(runs, heads, about, on_problem)
            for batch in _joined(runs, heads).to_batches():
                writer.write_batch(batch)
    del source, blocks
    replace_file(joined, path)


def _take(blocks: list[pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Rows of a table, whose blocks start at `starts`. (`Table.take` would first copy the whole table.)"""
    by_block = np.argsort(rows, kind="stable")
    block_of = starts.searchsorted(rows[by_block], "right") - 1
    numbers, firsts = np.unique(block_of, return_index=True)
    parts = np.split(rows[by_block] - starts[block_of], firsts[1:])
    taken = [blocks[number].take(pa.array(part)) for number, part in zip(numbers, parts, strict=True)]
    back = np.empty_like(by_block)
    back[by_block] = np.arange(len(rows))
    return pa.Table.from_batches(taken).combine_chunks().take(pa.array(back)).combine_chunks()


def _joined(runs: pa.Table, heads: np.ndarray) -> pa.Table:
    """Join runs: scalars are those of the first run of each image, lists are concatenated.

    Args:
        runs: runs of some images, those of an image one after the other.
        heads: number of each image's first run.
    """
    result = runs.take(pa.array(heads))
    for name in LISTS:
        values = pa.concat_arrays(runs[name].chunks) if runs[name].num_chunks != 1 else runs[name].chunk(0)
        edges = np.asarray(values.offsets)
        offsets = pa.array(np.append(edges[heads], edges[-1]), pa.int32())
        lists = pa.ListArray.from_arrays(offsets, values.values, type=values.type)
        result = result.set_column(result.schema.get_field_index(name), result.schema.field(name), lists)
    return result


def _check_runs(runs: pa.Table, heads: np.ndarray, about: About, on_problem: OnProblem) -> None:
    """Report runs that are in another split or group than the first run of their image."""
    head_of = np.repeat(heads, np.diff([*heads, len(runs)]))
    for name in ("split", "group"):
        if name not in about.columns:
            continue
        value = runs[name].to_pylist()
        for run in range(len(runs)):
            if value[run] != value[head_of[run]]:
                file, column = about.files[runs["file"][run].as_py()]
                image, number = runs["image_id"][run].as_py(), runs["rows"][run][0].as_py()
                place = file, None if number == NO_ROW else number, column
                on_problem(_disagreement(name, image, value[head_of[run]], value[run], *place))


# --- open -----------------------------------------------------------------------------------------------------------


def open_table(folder: Path) -> "Dataset":
    """All rows of a table, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / ROWS))
