"""Columns are read in blocks, and samples are drawn, as if a split were a list."""

from random import Random
from typing import Any

import pytest
from datasets import Dataset, Features, Value, concatenate_datasets

from modeling_miniclip.data.tables import row_blocks
from modeling_miniclip.data.tables.row_blocks import (
    Captions,
    caption_counts,
    record_batches,
    sample_of_captions,
    sample_rows,
)

FEATURES = Features({"image_id": Value("string"), "captions": [Value("string")]})


def split_of(captions: list[list[str]]) -> Dataset:
    names = [f"{i}.png" for i in range(len(captions))]
    return Dataset.from_dict({"image_id": names, "captions": captions}, features=FEATURES)


def some_split(random: Random) -> Dataset:
    """A table of several blocks, and some of its rows: all of them, a part, or any in any order."""
    parts = [split_of([["é" * random.randrange(3)] * random.randrange(4) for _ in range(random.randrange(1, 9))])
             for _ in range(random.randrange(1, 4))]  # fmt: skip
    whole = concatenate_datasets(parts)
    chosen = [random.randrange(len(whole)) for _ in range(random.randrange(30))]
    kind = random.randrange(4)
    if kind < 2:
        return whole if kind == 0 else whole.select(range(len(whole) // 2, len(whole)))
    return whole.select(sorted(set(chosen)) if kind == 2 else chosen)


def test_blocks_have_the_rows_of_any_selection() -> None:
    random = Random(0)
    for _ in range(60):
        split, size = some_split(random), random.choice([1, 3, 100])
        batches = list(record_batches(split, ["image_id", "captions"], size))
        full, rest = divmod(len(split), size)
        assert [batch.num_rows for batch in batches] == [size] * full + [rest] * (rest > 0)
        assert [row for batch in batches for row in batch.to_pylist()] == list(split)
        assert caption_counts(split).tolist() == [len(texts) for texts in split["captions"]]
        captions = Captions(split)
        assert list(captions) == list(captions) == list(split["captions"])


def test_samples_are_drawn_by_the_seed_in_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of([["a", "b"]] * 100)
    drawn = [sample_rows(split, 10, seed)["image_id"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 10
    assert drawn[0] == sorted(drawn[0], key=lambda name: int(name.split(".")[0])) != split["image_id"][:10]
    assert sample_rows(split, 100) is split and sample_of_captions(split) is split

    def sampled(most: int) -> Any:
        monkeypatch.setattr(row_blocks, "MOST_CAPTIONS", most)
        return len(sample_of_captions(split))

    assert [sampled(most) for most in (200, 199, 40, 1)] == [100, 99, 20, 1]
    assert len(sample_of_captions(split, 10)) == 5
