"""Which rows of a table belong to which split, as row numbers: by split files, the rows themselves, or a seed."""

from array import array
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ...errors import DataError, Problem
from ..problems import OnProblem
from ..rows import SplitName
from ..splits import split_of_value
from .row_blocks import record_batches

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_UP = 100_000  # names of split files that are looked up at a time

RowNumbers = dict[str, np.ndarray]  # row numbers of each split, int64


def splits_of_files(rows: "Dataset", lines: Iterable[SplitName], on_problem: OnProblem) -> RowNumbers:
    """Splits by split files, in the order of their lines.

    Args:
        rows: rows of a table.
        lines: all lines of the split files.
        on_problem: function called with each name that has no captions (kind `no-captions`) or is in a split already
            (`two-splits`).
    """
    hashes = [_hashes(chunk.to_pylist()) for chunk in rows.data.column("image_id").chunks]
    known = np.concatenate([np.zeros(0, np.int64), *hashes])
    order = np.argsort(known, kind="stable")
    number_of, file_of = np.zeros(len(known), np.int32), np.zeros(len(known), np.int8)  # the line that names each row
    files: list[str] = []
    found: dict[str, array] = {}
    lines = iter(lines)
    while block := list(islice(lines, LOOKED_UP)):
        wanted = _hashes([line.name for line in block])
        at = np.minimum(known.searchsorted(wanted, sorter=order), max(len(known) - 1, 0))
        row_of = order[at] if len(order) else np.zeros(len(block), np.int64)
        is_known = known[row_of] == wanted if len(order) else np.zeros(len(block), bool)
        for line, row, known_here in zip(block, row_of.tolist(), is_known.tolist(), strict=True):
            if not files or files[-1] != line.file:
                files.append(line.file)
            numbers = found.setdefault(line.split, array("q"))
            if not known_here:
                on_problem(Problem("no-captions", f"{line.name!r} has no caption", line.file, line.number))
            elif number_of[row]:
                place = f"{files[file_of[row]]}, row {number_of[row]}"
                text = f"{line.name!r} is already in {place}; an image can be in only one split"
                on_problem(Problem("two-splits", text, line.file, line.number))
            else:
                number_of[row], file_of[row] = line.number, len(files) - 1
                numbers.append(row)
    return {split: np.frombuffer(numbers, np.int64) for split, numbers in found.items()}


def _hashes(names: list[str]) -> np.ndarray:
    return np.fromiter(map(hash, names), np.int64, len(names))


def splits_of_rows(rows: "Dataset") -> RowNumbers:
    """Splits by the `split` of each row, under the usual names or their own; rows without one are in the split ""."""
    names: list[str] = []
    parts = []
    for chunk in rows.data.column("split").chunks:
        encoded = pc.dictionary_encode(chunk.fill_null(""))
        own = [split_of_value(name) or "" for name in encoded.dictionary.to_pylist()]
        names += [name for name in dict.fromkeys(own) if name not in names]
        parts.append(np.array([names.index(name) for name in own], np.int16)[np.asarray(encoded.indices)])
    code_of = np.concatenate([np.zeros(0, np.int16), *parts])
    return {name: np.flatnonzero(code_of == code) for code, name in enumerate(names)}


def order_by_name(rows: "Dataset") -> np.ndarray:
    """Row numbers in the order of the image names, so that a seeded split does not depend on the order of a file."""
    return pc.sort_indices(rows.data.column("image_id")).to_numpy().astype(np.int64)


def split_randomly(order: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None) -> RowNumbers:
    """A random split into `train` and `validation`, each with at least one row.

    Args:
        order: row numbers, in the order that the draw depends on.
        fraction: fraction of the rows for validation, between 0 and 1.
        seed: random seed of the split.
        groups: `[len(order)]`, number of each row's group; a group stays in one split.

    Raises:
        DataError: there are fewer than two rows or groups, or the fraction is outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, not {fraction}")
    unit_of = np.arange(len(order)) if groups is None else _numbered_by_first_use(groups)
    units = int(unit_of.max(initial=-1)) + 1
    if units < 2:
        what = "image" if groups is None else "group of images"
        raise DataError(f"{units} {what} cannot be split into train and validation: at least two are needed")
    drawn = np.random.default_rng(seed).permutation(units)
    wanted = min(max(1, round(fraction * len(order))), len(order) - 1)
    sizes = np.bincount(unit_of, minlength=units)[drawn].cumsum()
    held_out = min(max(1, int(np.searchsorted(sizes, wanted)) + 1), units - 1)
    chosen = np.zeros(units, bool)
    chosen[drawn[:held_out]] = True
    in_validation = chosen[unit_of]
    return {"train": order[~in_validation], "validation": order[in_validation]}


def split_within_groups(order: np.ndarray, fraction: float, seed: int, groups: np.ndarray) -> RowNumbers:
    """A random split of each group within itself; arguments as in [`split_randomly`].

    A group of a single row stays in `train`.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, not {fraction}")
    in_validation = np.zeros(len(order), bool)
    generator = np.random.default_rng(seed)
    unit_of = _numbered_by_first_use(groups)
    members = np.split(np.argsort(unit_of, kind="stable"), np.bincount(unit_of).cumsum()[:-1])
    for rows in members:
        if len(rows) > 1:
            in_validation[generator.permutation(rows)[: max(1, round(fraction * len(rows)))]] = True
    if not in_validation.any():
        raise DataError(
            f"none of {len(members)} classes has two images, so none can be held out for validation; add images"
        )
    return {"train": order[~in_validation], "validation": order[in_validation]}


def _numbered_by_first_use(groups: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def group_numbers(rows: "Dataset") -> np.ndarray:
    """`[rows]` int64, a number for each row's group; a row without a group is one of its own."""
    known: dict[str, int] = {}
    parts, start = [], 0
    for batch in record_batches(rows, ["group"]):
        chunk = batch["group"]
        encoded = pc.dictionary_encode(chunk)
        own = np.array([known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()], np.int64)
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        alone = -1 - np.arange(start, start + len(chunk))
        parts.append(np.where(indices < 0, alone, own[indices] if len(own) else alone))
        start += len(chunk)
    return np.concatenate([np.zeros(0, np.int64), *parts])
