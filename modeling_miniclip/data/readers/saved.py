"""Folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` wrote: read in place."""

from collections.abc import Iterator
from typing import Any

from ...errors import DataError, Problem, one_line
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..tables.arrow_tables import files_of_dataset
from ..tables.table_cache import stat_of
from ..tables.table_rows import TableFile, read_tables


def read_saved(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The images of a saved dataset, split by split, as [`read_tables`] yields them.

    Raises:
        DataError: the folder cannot be read, or has no column of images or of captions.
    """
    yield from read_tables(_files(source), options, on_problem, compare_all=True)


def inputs_saved(source: str, options: ReadOptions) -> Iterator[Any]:
    """Everything that the rows of a saved dataset depend on, for the key of their table."""
    for file in _files(source):
        yield [file.where, stat_of(file.path)]


def _files(source: str) -> list[TableFile]:
    from datasets import load_from_disk

    try:
        data = load_from_disk(source, keep_in_memory=False)
        splits = data if isinstance(data, dict) else {str(data.split) if data.split else None: data}
        return [
            file
            for split, rows in splits.items()
            for file in files_of_dataset(rows, f"{source}, split {split}" if split else source, split)
        ]
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # pyarrow's errors are among them
        text = f"cannot be read as a saved dataset: {one_line(error)}; save it again"
        raise DataError(Problem("unusable", text, source)) from error
