"""Datasets of a Python program as names of sources, which the training flags take."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from datasets import DatasetDict

from ..data.readers.memory import held
from ..data.tables.memory_tables import is_data


@contextmanager
def named_sources(given: Any, wanted: Collection[str] = ()) -> Iterator[tuple[list[str], list[float] | None]]:
    """Within the block, datasets can be read under the names that it yields.

    Args:
        given: a path or name, data as for [`held`][modeling_miniclip.data.readers.memory.held], a list of several of
            these, or a dictionary of paths and names with the weight of each.
        wanted: names of columns that are read in any case.

    Yields:
        The names, and their weights if they have some.

    Raises:
        DataError: data is of another type, or holds something else than images and texts.
    """
    with ExitStack() as stack:
        if isinstance(given, Mapping) and given and all(isinstance(weight, int | float) for weight in given.values()):
            yield [os.fspath(name) for name in given], [float(weight) for weight in given.values()]
        else:
            several = given if _is_list_of_sources(given) else [given]
            yield [stack.enter_context(held(one, wanted)) if is_data(one) else os.fspath(one) for one in several], None


def _is_list_of_sources(given: Any) -> bool:
    """Whether this is a list of datasets, not one of rows."""
    if not isinstance(given, list | tuple) or not given:
        return False
    return not isinstance(given[0], Mapping) or isinstance(given[0], DatasetDict)
