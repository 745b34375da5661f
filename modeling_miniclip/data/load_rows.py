"""Load any source as splits of memory-mapped rows: read once into a table on disk, then opened by every process."""

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from ..errors import DataError, Problem
from .columns import NEGATIVES
from .faults import check_damaged, leave_out_damaged, readable, unchanged
from .problems import OnProblem, raise_problem
from .rows import ReadOptions, Row
from .source_kinds import Kind, Sources, captioned_kind, each_source, resolve
from .splits import SPLITS
from .tables.arrow_tables import prefix_column
from .tables.assign_splits import (
    RowNumbers,
    group_numbers,
    order_by_name,
    split_randomly,
    split_within_groups,
    splits_of_files,
    splits_of_rows,
)
from .tables.garbage import only_new_garbage
from .tables.table import OPTIONAL, About, open_table, write_table
from .tables.table_cache import cached_table, default_cache_dir, digest_of

NAMED = "split-{}.npy"  # row numbers of a split that the source names
PUBLIC = ("image", "image_id", "captions", "caption_ids", "group", NEGATIVES)


@dataclass(frozen=True)
class SeededSplit:
    """The random split of a source that has no validation split.

    Args:
        validation_fraction: fraction of the rows for validation.
        seed: random seed.
    """

    validation_fraction: float = 0.1
    seed: int = 0


class Sample(NamedTuple):
    """Where a sample of rows comes from.

    Args:
        images: number of images that it was drawn from.
        seed: seed that drew it.
    """

    images: int
    seed: int


class Splits(DatasetDict):
    """Splits of one or several sources, whose rows follow each other.

    Attributes:
        sizes: number of rows of each source, by split.
        samples: what the rows of a split were drawn from, by split; empty for whole splits.
    """

    sizes: dict[str, list[int]]
    samples: dict[str, Sample]


DEFAULT, SEEDED = ReadOptions(), SeededSplit()


def load_rows(
    source: str | os.PathLike,
    options: ReadOptions = DEFAULT,
    split: SeededSplit | None = SEEDED,
    cache_dir: str | os.PathLike | None = None,
    max_damaged: float = 0.0,
) -> DatasetDict:
    """Load a source as splits `train`, `validation`, `test`, those that it has, with one row per image.

    Args:
        source: path, pattern, URL or name on the Hub; see `docs/data.md`.
        options: how to read it.
        split: how to split it at random, if it has no validation split; None leaves all of these rows in `train`.
        cache_dir: folder of the tables.
        max_damaged: largest fraction of its shards that may be damaged; their other images are left out.

    Returns:
        Splits with the columns of [`table_features`][modeling_miniclip.data.tables.table.table_features].

    Raises:
        DataError: the source cannot be used, or has a problem; names its file and row.
        MiniClipError: the table cannot be stored.
    """
    source = resolve(source)
    if source == "scenes":
        from .scenes import build_scenes

        return build_scenes()
    with readable(source):
        kind = captioned_kind(source)
        inputs = digest_of(kind.inputs(source, options))

    def build(folder: Path) -> None:
        with unchanged(source, kind, options, inputs):
            build_table(folder, source, kind, options, leave_out_damaged if max_damaged else raise_problem)

    folder = cached_table([source, kind.name, asdict(options), inputs], Path(cache_dir or default_cache_dir()), build)
    about = About.load(folder)
    check_damaged(source, about, max_damaged)
    for line in [*about.warnings, *about.damaged.values()]:
        warnings.warn(line, stacklevel=2)
    return splits_of_table(folder, about, kind, split)


def load_datasets(
    sources: Sources,
    options: ReadOptions = DEFAULT,
    split: SeededSplit = SEEDED,
    cache_dir: str | os.PathLike | None = None,
    validation: Sources | None = None,
    max_damaged: float = 0.0,
) -> Splits:
    """Load several sources as one; their rows follow each other in each split.

    Groups of different sources are different, whatever their names.

    Args:
        sources: one or several sources as for [`load_rows`].
        options, split, cache_dir, max_damaged: as for [`load_rows`].
        validation: one or several sources of all validation rows; by default, each source has its own.

    Raises:
        DataError: as in [`load_rows`], or a source has no rows to train on.
    """
    sources, validation = each_source(sources), each_source(validation or ())
    parts = [load_rows(source, options, None if validation else split, cache_dir, max_damaged) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        if "train" not in part:
            text = f"no train split among {', '.join(part)}; name one of them train"
            raise DataError(Problem("unusable", text, source))
    by_split = {name: [part.get(name) for part in parts] for name in SPLITS if any(name in part for part in parts)}
    if validation:
        others = [load_rows(source, options, None, cache_dir, max_damaged) for source in validation]
        by_split["validation"] = [
            next(part[name] for name in ("validation", "test", "train") if name in part) for part in others
        ]
    for each in by_split.values():
        if len(each) > 1:
            each[:] = [_with_own_groups(rows, source) for source, rows in enumerate(each)]
    sizes = {
        name: [0 if rows is None else len(rows) for rows in by_split[name]] for name in SPLITS if name in by_split
    }
    joined = {name: [rows for rows in by_split[name] if rows is not None] for name in sizes}
    splits = Splits({name: some[0] if len(some) == 1 else concatenate_datasets(some) for name, some in joined.items()})
    splits.sizes, splits.samples = sizes, {}
    return splits


def _with_own_groups(rows: Dataset | None, source: int) -> Dataset | None:
    """Rows of a source whose groups are named after it."""
    if rows is None or "group" not in rows.column_names:
        return rows
    return prefix_column(rows, "group", f"{source}:")


def read_source(
    folder: Path, source: str, kind: Kind, options: ReadOptions, on_problem: OnProblem
) -> tuple[About, RowNumbers | None]:
    """Read a source into a table: how all commands read.

    Args:
        folder: empty folder to write to.
        source, kind: the source and its kind.
        options: how to read it.
        on_problem: function called with each problem.

    Returns:
        What the table does not say itself, and the rows of each split that split files name; None without such files.

    Raises:
        DataError: the source cannot be read.
    """
    with only_new_garbage():
        about = write_table(_rows(kind, source, options, on_problem), folder, on_problem, f"read {Path(source).name}")
    rows = open_table(folder)
    lines = kind.split_lines(source, options, on_problem) if len(rows) else None
    return about, None if lines is None else splits_of_files(rows, lines, on_problem)


def build_table(
    folder: Path, source: str, kind: Kind, options: ReadOptions, on_problem: OnProblem = raise_problem
) -> None:
    """Read a source into a table, with the row numbers of the splits that it names.

    Args:
        folder: empty folder to write to.
        source, kind: the source and its kind.
        options: how to read it.
        on_problem: function called with each problem; the default raises a `DataError`, or warns of a harmless one.

    Raises:
        DataError: the source has no captions.
    """
    damaged: dict[str, str] = {}

    def report(problem: Problem) -> None:
        on_problem(problem)
        if problem.kind == "damaged-shard":
            damaged[problem.file] = str(problem)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        about, named = read_source(folder, source, kind, options, report)
        rows = open_table(folder)
        if not len(rows):
            reasons = [*damaged.values(), *(str(one.message) for one in caught)]
            text = f"no images with captions; `miniclip check` says why{': ' * bool(reasons)}{''.join(reasons[:1])}"
            raise DataError(Problem("unusable", text, source))
        if named is None:
            named = splits_of_rows(rows) if "split" in about.columns else {}
    if named and kind.one_split_is_train and len(named) == 1:
        named = {"train": next(iter(named.values()))}
    if named and not named.keys() & set(SPLITS):
        text = f"no train split among {', '.join(named)}; name one of them train"
        raise DataError(Problem("unusable", text, source))
    for split, numbers in named.items():
        if split in SPLITS:
            np.save(folder / NAMED.format(split), numbers)
    left_out = len(rows) - sum(len(numbers) for split, numbers in named.items() if split in SPLITS) if named else 0
    about.warnings, about.damaged = [str(one.message) for one in caught], damaged
    if left_out:
        about.warnings.append(f"{source}: left out {left_out} images that are in none of {', '.join(SPLITS)}")
    about.save(folder)


def _rows(kind: Kind, source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The rows of a source. Its own generator, so that an error while a table is written is not taken for its own."""
    with readable(source):
        yield from kind.read(source, options, on_problem)


def splits_of_table(folder: Path, about: About, kind: Kind, seeded: SeededSplit | None) -> DatasetDict:
    """The splits of a table, see [`rows_of_splits`]; without the columns that it lacks."""
    rows = open_table(folder)
    splits = rows_of_splits(rows, folder, about, kind, seeded)
    lacking = set(OPTIONAL) - set(about.columns)
    columns = [name for name in rows.column_names if name not in lacking]
    rows = rows.select_columns([name for name in columns if name != "split"])
    return DatasetDict({split: _select(rows, splits[split]) for split in SPLITS if split in splits})


def rows_of_splits(rows: Dataset, folder: Path, about: About, kind: Kind, seeded: SeededSplit | None) -> RowNumbers:
    """Row numbers of the splits that a source names, and of a random one for validation if it has none.

    Args:
        rows: all rows of a table.
        folder, about: the table.
        kind: kind of its source.
        seeded: how to split it at random; None leaves the rows of a source without splits in `train`.

    Raises:
        DataError: there are too few rows to split.
    """
    named: RowNumbers = {}
    for split in SPLITS:
        if (path := folder / NAMED.format(split)).exists():
            named[split] = np.load(path, mmap_mode="r")
    if seeded is None:
        return named or {"train": order_by_name(rows) if kind.by_name else np.arange(len(rows))}
    return named | _random_split(rows, named, about, kind, seeded)


def _random_split(rows: Dataset, named: RowNumbers, about: About, kind: Kind, seeded: SeededSplit) -> RowNumbers:
    """`train` and `validation` of a source without validation; empty for one that has it, or has no `train`."""
    if named and ("validation" in named or "train" not in named):
        return {}
    order = named.get("train", order_by_name(rows) if kind.by_name else np.arange(len(rows)))
    if "group" not in about.columns:
        return split_randomly(order, seeded.validation_fraction, seeded.seed)
    split = split_within_groups if kind.groups_are_classes else split_randomly
    return split(order, seeded.validation_fraction, seeded.seed, group_numbers(rows)[order])


def _select(rows: Dataset, numbers: np.ndarray) -> Dataset:
    first = int(numbers[0]) if len(numbers) else 0
    if np.array_equal(numbers, np.arange(first, first + len(numbers))):
        return rows.select(range(first, first + len(numbers)))
    # datasets would pickle the numbers to hash them.
    digest = blake2b(rows._fingerprint.encode() + b" ", digest_size=8)
    digest.update(np.ascontiguousarray(numbers).data)
    return rows.select(numbers, new_fingerprint=digest.hexdigest())


def public_rows(splits: Mapping[str, Dataset]) -> DatasetDict:
    """The columns that `load_captions` promises."""
    return DatasetDict(
        {
            split: rows.select_columns([name for name in PUBLIC if name in rows.column_names])
            for split, rows in splits.items()
        }
    )
