"""Rows to splits: by files, by the rows' own names, or by a seed that keeps groups together."""

from pathlib import Path

import numpy as np
import pytest

from modeling_miniclip.data.rows import Row, SplitName
from modeling_miniclip.data.tables.assign_splits import (
    group_numbers,
    order_by_name,
    split_randomly,
    split_within_groups,
    splits_of_files,
    splits_of_rows,
)
from modeling_miniclip.data.tables.table import open_table, write_table
from modeling_miniclip.errors import DataError, Problem


def rows_of(folder: Path, names: list[str], **columns: list[str | None]):
    values = [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)] or [{}] * len(
        names
    )
    write_table(
        [Row(name, name, ["x"], name, **some) for name, some in zip(names, values, strict=True)], folder, print
    )
    return open_table(folder)


def test_split_files_keep_the_order_of_their_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ["a", "b", "c", "d"])
    lines = [("train", "c"), ("train", "a"), ("test", "d"), ("test", "nowhere"), ("test", "a")]
    problems: list[Problem] = []
    found = splits_of_files(
        rows, (SplitName(s, n, f"{s}.txt", i) for i, (s, n) in enumerate(lines, 1)), problems.append
    )
    assert {split: numbers.tolist() for split, numbers in found.items()} == {"train": [2, 0], "test": [3]}
    assert [(each.kind, each.row) for each in problems] == [("no-captions", 4), ("two-splits", 5)]


def test_rows_name_their_split_in_any_usual_spelling(tmp_path: Path) -> None:
    names = ["Train", "VAL", " test ", None, "restval", "extra"]
    rows = rows_of(tmp_path, list("abcdef"), split=names)
    found = {split: numbers.tolist() for split, numbers in splits_of_rows(rows).items()}
    assert found == {"train": [0, 4], "validation": [1], "test": [2], "": [3], "extra": [5]}


def test_random_split_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    names = [f"{i:03d}.jpg" for i in range(50)]
    rows = rows_of(tmp_path, names[::-1])
    found = split_randomly(order_by_name(rows), 0.1, 3)
    same = split_randomly(np.arange(50), 0.1, 3)
    for split in ("train", "validation"):
        assert [rows["image_id"][int(i)] for i in found[split]] == [names[i] for i in same[split]]
    assert len(found["validation"]) == 5


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_in_one_split(tmp_path: Path, seed: int) -> None:
    groups = [f"group {i // 4}" if i < 80 else None for i in range(100)]
    rows = rows_of(tmp_path, [f"{i:03d}" for i in range(100)], group=groups)
    numbers = group_numbers(rows)
    found = split_randomly(np.arange(100), 0.2, seed, numbers)
    assert sorted([*found["train"], *found["validation"]]) == list(range(100))
    assert not set(numbers[found["train"]]) & set(numbers[found["validation"]])
    assert 20 <= len(found["validation"]) < 24  # at most one group more than asked for


def test_classes_are_split_within_themselves() -> None:
    classes = np.repeat([5, 3, 9], [10, 20, 1])
    found = split_within_groups(np.arange(31), 0.1, 0, classes)
    assert np.bincount(classes[found["validation"]], minlength=10)[[5, 3, 9]].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("images", "fraction", "held_out"), [(2, 0.001, 1), (2, 0.999, 1), (10, 0.25, 2), (10, 0.3, 3)]
)
def test_both_parts_of_a_random_split_have_rows(images: int, fraction: float, held_out: int) -> None:
    parts = split_randomly(np.arange(images), fraction, 0)
    assert len(parts["validation"]) == held_out
    assert sorted([*parts["train"], *parts["validation"]]) == list(range(images))


@pytest.mark.parametrize("seed", range(6))
def test_both_parts_of_two_groups_have_rows(seed: int) -> None:
    parts = split_randomly(np.arange(10), 0.5, seed, np.repeat([0, 1], [9, 1]))
    assert {len(parts["train"]), len(parts["validation"])} == {1, 9}


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_impossible_fraction_is_an_error(fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        split_randomly(np.arange(4), fraction, 0)


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 group of images cannot be split"):
        split_randomly(np.arange(4), 0.5, 0, np.zeros(4, int))
