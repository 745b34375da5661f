"""Entries: the images of any source with their captions, and the rows they come from, for `miniclip check`."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import DataError
from ..faults import readable
from ..load_rows import NAMED, SeededSplit, build_table, rows_of_splits
from ..problems import OnProblem
from ..rows import ReadOptions
from ..source_kinds import Sources, captioned_kind, each_source, resolve
from ..splits import SPLITS
from ..tables.row_blocks import record_batches
from ..tables.table import NO_ROW, About, open_table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

NONE = "none"  # the split of an image that is in none


class Entry(NamedTuple):
    """An image of a split with all its captions.

    Args:
        name: name of the image.
        split: name of its split, "none" if it is in no split.
        captions: all captions of the image.
        rows: row number of each caption, None if it has none.
        file: file, or dataset and split on the Hub.
        column: name of the column that names the image.
        content: path of the image file, its name in a shard, or the encoded image.
        group: group of the image, None if it is in none.
    """

    name: str
    split: str
    captions: list[str]
    rows: list[int | None]
    file: str
    column: str | None
    content: str | bytes
    group: str | None = None


@dataclass(frozen=True)
class Entries:
    """All images of a source.

    Args:
        entries: the images, also those that cannot be used.
        has_splits: whether the source names its splits.
        rows_name_splits: whether its rows do, instead of split files.
    """

    entries: list[Entry]
    has_splits: bool
    rows_name_splits: bool

    @property
    def folder(self) -> str | None:
        """Folder that the names of all images are relative to; None if they are not all in files."""
        if not all(is_file(entry.content) for entry in self.entries):
            return None
        for entry in self.entries:
            path = str(entry.content)
            if not entry.name.startswith("/") and path.endswith(f"/{entry.name}"):
                return path.removesuffix(entry.name)
        return None


def is_file(content: str | bytes) -> bool:
    """Whether the image of an entry is in a file of its own on this machine."""
    return isinstance(content, str) and "://" not in content


def read_entries(
    dataset: str,
    options: ReadOptions,
    split: SeededSplit | None,
    on_problem: OnProblem,
    validation: Sources | None = None,
) -> Entries:
    """Read a source as training does.

    Args:
        dataset: source as for [`load_rows`][modeling_miniclip.data.load_rows.load_rows].
        options: how to read it.
        split: how to split it at random, if it has no validation split; ignored if it has too few images.
        on_problem: function called with each problem.
        validation: one or several sources of all validation images; the dataset's own ones are then in no split.

    Raises:
        DataError: a source cannot be used.
    """
    validation = each_source(validation or ())
    if not validation:
        return _read_one(dataset, options, split, on_problem)
    main, *others = (_read_one(source, options, None, on_problem) for source in (dataset, *validation))
    entries = [one._replace(split=NONE) if one.split == "validation" else one for one in main.entries]
    names = {one.name for one in entries}
    for source, other in zip(validation, others, strict=True):
        there = {one.split for one in other.entries}
        held_out = next(name for name in ("validation", "test", "train", NONE) if name in there)
        for one in other.entries:
            name = one.name if one.name not in names else f"{one.name} of {source}"
            entries.append(one._replace(name=name, split="validation" if one.split == held_out else NONE))
        names |= {one.name for one in entries[-len(other.entries) :]}
    return Entries(entries, True, False)


def _read_one(dataset: str, options: ReadOptions, split: SeededSplit | None, on_problem: OnProblem) -> Entries:
    source = resolve(dataset)
    if source == "scenes":
        from ..scenes import build_scenes

        return Entries(_entries_of_splits(build_scenes(), dataset), True, True)
    with readable(source):
        kind = captioned_kind(source)
    options = replace(options, bad_images=True)
    with tempfile.TemporaryDirectory(prefix="miniclip-") as place:
        folder = Path(place)
        build_table(folder, source, kind, options, on_problem)
        about, rows = About.load(folder), open_table(folder)
        has_splits = any((folder / NAMED.format(name)).exists() for name in SPLITS)
        try:
            numbers = rows_of_splits(rows, folder, about, kind, split)
        except DataError:  # too few images, which is another problem
            numbers = rows_of_splits(rows, folder, about, kind, None)
        split_of = np.full(len(rows), -1, np.int8)
        for name, some in numbers.items():
            split_of[some] = SPLITS.index(name)
        files = about.files

        def place_of(i: int, number: int) -> tuple[str, str, str | None]:
            return SPLITS[split_of[i]] if split_of[i] >= 0 else NONE, *files[number]

        entries = list(_entries(rows, place_of))
        del rows
    return Entries(entries, has_splits, "split" in about.columns)


def _entries(rows: "Dataset", place_of: Callable[[int, int], tuple[str, str, str | None]]) -> Iterator[Entry]:
    """The rows of a table, whose split, file and column a function returns for the row and the number of the file."""
    i = 0
    for batch in record_batches(rows, ["image_id", "captions", "rows", "file", "image", "group"]):
        for name, captions, numbers, number, image, group in zip(*(c.to_pylist() for c in batch), strict=True):
            split, file, column = place_of(i, number)
            content = image["bytes"] if image["bytes"] is not None else image["path"]
            rows_of_captions = [None if row == NO_ROW else row for row in numbers]
            yield Entry(name, split, captions, rows_of_captions, file, column, content, group)
            i += 1


def _entries_of_splits(splits: "DatasetDict", dataset: str) -> list[Entry]:
    """Entries of rows in memory, with their encoded images."""
    from datasets import Image

    entries = []
    for split, rows in splits.items():
        for i, row in enumerate(rows.cast_column("image", Image(decode=False))):
            name, captions, content = row["image_id"], row["captions"], row["image"]["bytes"]
            file = f"{dataset}, split {split}"
            entries.append(Entry(name, split, captions, [i] * len(captions), file, None, content))
    return entries
