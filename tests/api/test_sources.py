"""What `train` takes as datasets: names, data, several of them, and weights."""

from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset, DatasetDict

from modeling_miniclip.api.sources import named_sources
from modeling_miniclip.data.readers.memory import is_memory

ROWS = [{"image": "a.jpg", "caption": "a"}, {"image": "b.jpg", "caption": "b"}]
FRAME = pandas.DataFrame(ROWS)
SPLITS = DatasetDict(train=Dataset.from_list(ROWS))


def names(given: Any) -> list[str]:
    """The names under which something is read, with the content left out of names of data."""
    with named_sources(given) as (found, weights):
        assert weights is None
        return [name.partition("-")[0] if is_memory(name) else name for name in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.csv", ["a.csv"]),
        (Path("a/b"), ["a/b"]),
        (["a.csv", Path("b")], ["a.csv", "b"]),
        (ROWS, ["memory:paths"]),
        (FRAME, ["memory:paths"]),
        (SPLITS, ["memory:paths"]),
        ({"train": FRAME, "validation": ROWS}, ["memory:paths"]),
        ([FRAME, "a.csv", SPLITS], ["memory:paths", "a.csv", "memory:paths"]),
        ([SPLITS, FRAME], ["memory:paths", "memory:paths"]),
        ([{"image": b"x", "caption": "a"}], ["memory:images"]),
    ],
)
def test_everything_has_a_name(given: Any, expected: list[str]) -> None:
    assert names(given) == expected


def test_a_dictionary_may_hold_weights() -> None:
    with named_sources({"a.csv": 2, Path("b.csv"): 0.5}) as found:
        assert found == (["a.csv", "b.csv"], [2.0, 0.5])
