"""A run uses the first training images, and validation images that the seed draws."""

from dataclasses import replace
from itertools import accumulate

import pytest
from datasets import Dataset

from modeling_miniclip.data.load_rows import Splits
from modeling_miniclip.errors import UsageError
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.limit_splits import limit_splits


def limited(arguments: TrainingArguments, sizes: list[int]) -> Splits:
    """Splits of several datasets with equal sizes for training and validation; rows are numbered."""
    splits = Splits({name: Dataset.from_dict({"row": list(range(sum(sizes)))}) for name in ("train", "validation")})
    splits.sizes, splits.samples = {name: list(sizes) for name in splits}, {}
    limit_splits(splits, arguments)
    return splits


def test_large_validation_splits_are_sampled_by_the_seed() -> None:
    arguments = replace(TrainingArguments(), max_train_images=70, max_validation_images=30)
    splits = limited(arguments, [40, 50, 10])
    assert splits["train"]["row"][:] == list(range(70)) and splits.sizes["train"] == [40, 30, 0]
    drawn = splits["validation"]["row"][:]
    assert drawn == sorted(set(drawn)) and len(drawn) == 30 and drawn != list(range(30))
    edges = [0, *accumulate([40, 50, 10])]
    assert splits.sizes["validation"] == [
        sum(low <= row < high for row in drawn) for low, high in zip(edges, edges[1:], strict=False)
    ]
    assert splits.samples == {"validation": (100, 0)}
    assert limited(arguments, [40, 50, 10])["validation"]["row"][:] == drawn
    assert limited(replace(arguments, seed=1), [40, 50, 10])["validation"]["row"][:] != drawn


@pytest.mark.parametrize(("limit", "images"), [(0, 6000), (None, 6000), (6000, 6000), (5000, 5000)])
def test_zero_validates_on_all_images(limit: int | None, images: int) -> None:
    splits = limited(replace(TrainingArguments(), max_validation_images=limit), [6000])
    assert len(splits["validation"]) == images and len(splits["train"]) == 6000
    assert bool(splits.samples) == (images < 6000)


def test_five_thousand_images_are_the_default() -> None:
    assert parse_arguments(["--dataset=scenes"]).max_validation_images == 5000
    assert parse_arguments(["--max_validation_images=0"]).max_validation_images == 0
    with pytest.raises(UsageError, match="--max_validation_images must be at least 0"):
        parse_arguments(["--max_validation_images=-1"])
