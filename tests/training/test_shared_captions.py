"""Recall of a validation with shared captions counted as right."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from modeling_miniclip.training.reports.shared_captions import recall_with_shared

# Similarities of three images (rows) and five texts, of images 0, 0, 1, 2 and 2.
SIMILARITY = torch.tensor([[0.9, 0.2, 0.6, 0.1, 0.4], [0.3, 0.8, 0.5, 0.4, 0.2], [0.0, 0.3, 0.1, 0.7, 0.1]])
EMBEDDINGS = SIMILARITY, torch.eye(5), torch.tensor([0, 0, 1, 2, 2])


def run_with(captions: list[list[str]], groups: list[str | None] | None = None) -> Any:
    """A run with four validation images, the second of which cannot be decoded."""
    columns: dict[str, Any] = {"captions": [captions[0], ["a cat", "a boat"], *captions[1:]]}
    if groups is not None:
        columns["group"] = [groups[0], "mug", *groups[1:]]
    lines: list[str] = []
    bad_images = SimpleNamespace(good_rows=lambda split: [0, 2, 3])
    return SimpleNamespace(
        validation_split=Dataset.from_dict(columns), bad_images=bad_images, say=lines.append, lines=lines
    )


@pytest.mark.parametrize(
    ("third", "groups", "texts", "found"),
    [
        ("A  cat.", None, 2, 3),  # texts 0 and 2 belong to images 0 and 1: ranks 1, 3, 1, 1, 3
        ("a bird", [None, "mug", "mug"], 3, 2),  # texts 2, 3 and 4 belong to images 1 and 2: ranks 1, 3, 2, 1, 2
    ],
)
def test_shared_captions_of_a_validation(third: str, groups: list[str | None] | None, texts: int, found: int) -> None:
    run = run_with([["a cat", "a dog"], [third], ["a boat", "a ship"]], groups)
    shared = recall_with_shared(run, EMBEDDINGS)
    assert shared is not None and shared["texts"] == texts
    assert shared["metrics"]["text_to_image_R@1"] == pytest.approx(20 * found)
    assert shared["metrics"]["image_to_text_median_rank"] == 1
    (line,) = run.lines
    assert f"the {texts} captions" in line and line.endswith(f"rsum {shared['metrics']['rsum']:.1f}")


def test_validation_without_shared_captions_has_no_second_recall() -> None:
    run = run_with([["a cat", "a dog"], ["a bird"], ["a boat", "a ship"]], [None, "mug", "cup"])
    assert recall_with_shared(run, EMBEDDINGS) is None and run.lines == []
