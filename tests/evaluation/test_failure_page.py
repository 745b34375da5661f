"""The page of failures lists failed queries only, the worst first and one per image."""

import re

import torch
from PIL import Image

from modeling_miniclip.evaluation.eval_sets import EvalSet
from modeling_miniclip.evaluation.failure_page import failure_page
from modeling_miniclip.evaluation.metrics import Ranking


def eval_set() -> EvalSet:
    """Three images with two texts each, searched by text."""
    return EvalSet(
        name="data",
        split="test",
        images=[Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")],
        image_ids=["red.png", "green.png", "blue.png"],
        texts=["a red one", "red", "a green one", "green", "a blue one", "blue"],
        image_group=torch.arange(3),
        text_group=torch.tensor([0, 0, 1, 1, 2, 2]),
        directions=("text_to_image",),
        at=(1,),
    )


def ranking(ranks: list[int]) -> Ranking:
    """Ranks of the six texts' images, where a failed text finds the next image first."""
    rank = torch.tensor(ranks)
    first = torch.where(rank == 1, torch.arange(6) // 2, (torch.arange(6) // 2 + 1) % 3)
    return Ranking(
        rank, torch.full((6,), 0.25), torch.tensor([[0.5], [0.9], [0.6], [0.7], [0.8], [0.4]]), first[:, None]
    )


def shown(ranks: list[int]) -> list[list[str]]:
    """Queries of each list on the page."""
    report = {"dataset": "data", "split": "test", "images": 3, "texts": 6, "model": "m"}
    page = failure_page(report, eval_set(), {"text_to_image": ranking(ranks)}, "")
    return [re.findall(r"<h3>(.*?)</h3>", part) for part in page.split("<h2>")[1:]]


def test_only_failed_queries_are_shown_one_per_image() -> None:
    worst, surest = shown([1, 2, 3, 2, 1, 1])
    assert worst == ["a green one", "red"]  # ranks 3 and 2; "green" has the image of a worse one
    assert surest == ["red", "green"]  # first answers with 0.9 and 0.7


def test_model_without_failures_has_no_queries_to_show() -> None:
    assert shown([1] * 6) == [[]]
