"""Recall, median rank and loss of a split, bootstrap intervals, and the metric for `evaluate`."""

import math
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch

from modeling_miniclip import retrieval_metrics, symmetric_contrastive_loss
from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.evaluation import metrics
from modeling_miniclip.evaluation.metrics import (
    METRIC_NAMES,
    RECALL_AT,
    dataset_loss,
    is_better,
    ranks,
    recall_intervals,
    student_interval,
    student_quantile,
    validation_metrics,
)
from modeling_miniclip.retrieval_metric import RetrievalMetric
from modeling_miniclip.utils.resources import PACKAGE


def unit(rows: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def split_of(
    images: int, captions: int, seed: int = 0, noise: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image embeddings, noisy caption embeddings, and for each caption the row of its image, in random order."""
    generator = torch.Generator().manual_seed(seed)
    image = unit(images, seed=seed)
    text_image_id = torch.arange(images).repeat(captions)[torch.randperm(images * captions, generator=generator)]
    text = image[text_image_id] + noise * torch.randn(len(text_image_id), 16, generator=generator)
    return image, torch.nn.functional.normalize(text, dim=1), text_image_id


# --- ranks and recall -----------------------------------------------------------------------------------------------

# Similarities of three images (rows) and five captions (columns). Captions 0 and 1 belong to image 0, caption 2 to
# image 1, captions 3 and 4 to image 2. Worked by hand:
#   text to image, rank of the right image in each column: caption 0: 0.9 is first; 1: 0.2 after 0.8 and 0.3;
#   2: 0.5 after 0.6; 3: 0.7 is first; 4: 0.1 after 0.4 and 0.2.                         -> 1, 3, 2, 1, 3
#   image to text, best right caption in each row: image 0: 0.9 is first; 1: 0.5 after 0.8; 2: 0.7 is first.
SIMILARITY = torch.tensor([[0.9, 0.2, 0.6, 0.1, 0.4], [0.3, 0.8, 0.5, 0.4, 0.2], [0.0, 0.3, 0.1, 0.7, 0.1]])
TEXT_IMAGE_ID = [0, 0, 1, 2, 2]


def test_ranks_and_metrics_worked_by_hand() -> None:
    ids, texts = torch.arange(3), torch.tensor(TEXT_IMAGE_ID)
    assert ranks(SIMILARITY.T, torch.eye(3), texts, ids).tolist() == [1, 3, 2, 1, 3]
    assert ranks(SIMILARITY, torch.eye(5), ids, texts).tolist() == [1, 2, 1]
    found = retrieval_metrics(SIMILARITY, torch.eye(5), TEXT_IMAGE_ID)
    assert found == pytest.approx(
        {
            "text_to_image_R@1": 40, "text_to_image_R@5": 100, "text_to_image_R@10": 100,
            "text_to_image_median_rank": 2,
            "image_to_text_R@1": 200 / 3, "image_to_text_R@5": 100, "image_to_text_R@10": 100,
            "image_to_text_median_rank": 1,
            "rsum": 40 + 200 / 3 + 400,
        }
    )  # fmt: skip
    assert set(found) == set(METRIC_NAMES)


FORMS = {
    "float32": lambda x: np.asarray(x, np.float32),
    "float64": lambda x: np.asarray(x, np.float64),
    "float16": lambda x: np.asarray(x, np.float16),
    "list": lambda x: x.tolist(),
    "list_of_arrays": lambda x: list(x.numpy()),
    "list_of_tensors": lambda x: list(x.clone().requires_grad_()),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_metrics_and_losses_take_arrays_and_lists(form: str, tmp_path: Path) -> None:
    images, texts = SIMILARITY.round(decimals=1), torch.eye(5)
    expected = retrieval_metrics(images, texts, TEXT_IMAGE_ID)
    for ids in (np.array(TEXT_IMAGE_ID), torch.tensor(TEXT_IMAGE_ID), tuple(TEXT_IMAGE_ID)):
        assert retrieval_metrics(FORMS[form](images), texts, ids) == expected
        assert retrieval_metrics(images, FORMS[form](texts), ids) == expected
    np.save(tmp_path / "images.npy", images.numpy())
    with warnings.catch_warnings(action="error"):
        read_only = np.load(tmp_path / "images.npy", mmap_mode="r")
        assert retrieval_metrics(read_only, texts.numpy(), TEXT_IMAGE_ID) == expected
    ids = torch.arange(3)
    loss = symmetric_contrastive_loss(torch.eye(3), torch.eye(3), 2.0, ids, ids)
    arrays = [np.eye(3, dtype=np.float32), torch.eye(3).tolist(), 2.0, ids.numpy(), ids.tolist()]
    assert symmetric_contrastive_loss(*arrays).item() == pytest.approx(loss.item())


def test_even_median_is_mean_of_middle_two() -> None:
    # ranks of the four texts: 1, 1, 2, 4
    similarity = torch.tensor([[9.0, 0, 9, 4], [0, 9, 0, 5], [0, 0, 8, 6], [0, 0, 0, 3]])
    assert ranks(similarity.T, torch.eye(4), torch.arange(4), torch.arange(4)).tolist() == [1, 1, 2, 4]
    assert retrieval_metrics(similarity, torch.eye(4))["text_to_image_median_rank"] == 1.5


def brute_force(image: np.ndarray, text: np.ndarray, text_image_id: np.ndarray) -> dict[str, float]:
    """Reference in loops: sort all candidates, wrong ones first among equals, and find the first right one."""
    similarity = text.astype(np.float64) @ image.astype(np.float64).T  # [N, B]
    found = {"text_to_image": [], "image_to_text": []}
    for i, scores in enumerate(similarity):
        order = sorted(range(len(image)), key=lambda j: (-scores[j], j == text_image_id[i]))  # noqa: B023
        found["text_to_image"].append(1 + order.index(text_image_id[i]))
    for j, scores in enumerate(similarity.T):
        order = sorted(range(len(text)), key=lambda i: (-scores[i], text_image_id[i] == j))  # noqa: B023
        found["image_to_text"].append(1 + next(k for k, i in enumerate(order) if text_image_id[i] == j))
    metrics = {}
    for name, rank in found.items():
        metrics |= {f"{name}_R@{k}": 100 * np.mean([r <= k for r in rank]) for k in RECALL_AT}
        metrics[f"{name}_median_rank"] = np.median(rank)
    return metrics | {"rsum": sum(value for name, value in metrics.items() if "R@" in name)}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_brute_force(seed: int) -> None:
    image, text, text_image_id = split_of(40, 3, seed)
    text_image_id[:7] = 5  # images differ in their number of captions
    text_image_id = torch.cat([text_image_id, torch.arange(40)])
    text = torch.cat([text, unit(40, seed=9)])
    found = retrieval_metrics(image, text, text_image_id)
    assert found == pytest.approx(brute_force(image.numpy(), text.numpy(), text_image_id.numpy()))
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@10"] < 100


def test_metrics_equal_brute_force_with_many_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (30, 3), generator=generator).float()
    text = torch.randint(-1, 2, (90, 3), generator=generator).float()
    text_image_id = torch.arange(30).repeat(3)
    expected = brute_force(image.numpy(), text.numpy(), text_image_id.numpy())
    assert retrieval_metrics(image, text, text_image_id) == pytest.approx(expected)


def clip_benchmark(image: torch.Tensor, text: torch.Tensor, text_image_id: list[int], k: int) -> tuple[float, float]:
    """Recall as in CLIP_benchmark's zeroshot_retrieval: a hit if any positive is among the top k scores."""
    scores = text @ image.t()  # [N, B]
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), text_image_id] = True

    def recall(scores: torch.Tensor, positive: torch.Tensor) -> float:
        top = torch.topk(scores, min(k, scores.shape[1]), dim=1).indices
        hits = torch.zeros_like(scores).scatter_(1, top, 1.0).bool() & positive  # [queries, keys]
        return 100 * (hits.sum(dim=1) > 0).float().mean().item()

    return recall(scores, positive), recall(scores.T, positive.T)


def test_recall_matches_clip_benchmark() -> None:
    image, text, text_image_id = split_of(60, 5)
    found = retrieval_metrics(image, text, text_image_id)
    for k in RECALL_AT:
        expected = clip_benchmark(image, text, text_image_id.tolist(), k)
        assert (found[f"text_to_image_R@{k}"], found[f"image_to_text_R@{k}"]) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.25, math.nan, math.inf])
def test_equal_or_nan_embeddings_get_no_credit(value: float) -> None:
    image, text = torch.full((50, 8), value), torch.full((250, 8), value)
    found = retrieval_metrics(image, text, torch.arange(50).repeat(5))
    assert found["rsum"] == 0
    assert found["text_to_image_median_rank"] == 50 and found["image_to_text_median_rank"] == 246


def test_single_image_and_text_are_found() -> None:
    assert retrieval_metrics(unit(1), unit(1))["rsum"] == 600


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_size_does_not_change_metrics(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    # whole numbers, so that similarities do not depend on the order of summation
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-3, 4, (50, 6), generator=generator).float()
    text = torch.randint(-3, 4, (150, 6), generator=generator).float()
    text_image_id = torch.arange(50).repeat(3)
    whole = retrieval_metrics(image, text, text_image_id)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert retrieval_metrics(image, text, text_image_id) == whole


def test_row_order_does_not_matter() -> None:
    image, text, text_image_id = split_of(30, 2)
    order, image_order = torch.randperm(60), torch.randperm(30)
    place = image_order.argsort()  # new row of each image
    shuffled = retrieval_metrics(image[image_order], text[order], place[text_image_id[order]])
    assert shuffled == pytest.approx(retrieval_metrics(image, text, text_image_id))


@pytest.mark.parametrize(
    ("images", "texts", "text_image_id", "message"),
    [
        ((3, 4), (3, 4), [0, 1], "2 entries for 3"),
        ((3, 4), (3, 4), [0, 1, 1], "3 images needs at least one text"),
        ((2, 4), (3, 4), [0, 1, 2], "each text one of these images"),
        ((2, 4), (3, 4), [0, 1, -1], "each text one of these images"),
        ((2, 4), (3, 4), None, "each text one of these images"),
        ((0, 4), (0, 4), [], "at least one text"),
        ((2, 4), (2, 5), None, r"\(2, 4\).*\(2, 5\)"),
        ((4,), (4,), None, r"\[images, dim\]"),
    ],
)
def test_mismatched_embeddings_are_rejected(images: Any, texts: Any, text_image_id: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(torch.zeros(images), torch.zeros(texts), text_image_id)


# --- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("block", [1, 13, 1024])
def test_dataset_loss_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch, block: int, loss_type: str) -> None:
    image, text, text_image_id = split_of(40, 3)
    arguments = (20.0, torch.arange(40), text_image_id, loss_type, -7.0)
    expected = symmetric_contrastive_loss(image.double(), text.double(), *arguments).item()
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert dataset_loss(image, text, 20.0, text_image_id, loss_type, -7.0) == pytest.approx(expected, rel=1e-6)


def test_loss_of_equal_embeddings_is_log_of_candidates() -> None:
    image, text = torch.ones(8, 4) / 2, torch.ones(24, 4) / 2
    loss = dataset_loss(image, text, 50.0, torch.arange(8).repeat(3))
    assert loss == pytest.approx(math.log(8), rel=1e-6)


def test_validation_metrics_are_loss_and_retrieval() -> None:
    image, text, text_image_id = split_of(12, 2)
    found = validation_metrics(image, text, text_image_id, 10.0, "sigmoid", -5.0)
    assert list(found) == ["loss", *retrieval_metrics(image, text, text_image_id)]
    assert found["loss"] == dataset_loss(image, text, 10.0, text_image_id, "sigmoid", -5.0)


@pytest.mark.parametrize(
    ("name", "smaller_is_better"),
    [("loss", True), ("rsum", False)]
    + [(name, name.endswith("median_rank")) for name in METRIC_NAMES if name != "rsum"],
)
def test_is_better_knows_each_direction(name: str, smaller_is_better: bool) -> None:
    assert is_better(name, 1.0, 2.0) is smaller_is_better
    assert is_better(name, 2.0, 1.0) is not smaller_is_better
    assert not is_better(name, 1.0, 1.0) and not is_better(name, math.nan, 1.0)


# --- the `evaluate` metric ------------------------------------------------------------------------------------------


@pytest.fixture
def metric(tmp_path: Path) -> RetrievalMetric:
    return RetrievalMetric(cache_dir=str(tmp_path))


def ragged(seed: int = 0) -> tuple[list, list, dict[str, float]]:
    """Predictions and references of four images with 2, 1, 3 and 2 captions, and the expected result."""
    image, text = unit(4, seed=seed), unit(8, seed=seed + 1)
    text_image_id = [0, 0, 1, 2, 2, 2, 3, 3]
    references = [[text[i].tolist() for i in range(8) if text_image_id[i] == j] for j in range(4)]
    return image.tolist(), references, retrieval_metrics(image, text, text_image_id)


def test_metric_accepts_any_number_of_captions(metric: RetrievalMetric) -> None:
    predictions, references, expected = ragged()
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_metric_accumulates_images_and_batches(metric: RetrievalMetric) -> None:
    predictions, references, expected = ragged()
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == pytest.approx(expected)
    predictions, references, expected = ragged(seed=5)  # and from the start again
    metric.add_batch(predictions=np.array(predictions), references=references)
    assert metric.compute() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [[[1.0, 0.0]], []], "2 images needs at least one text"),
        ([[1.0, 0.0]], [[]], "embeddings|at least one text"),
        ([[1.0, 0.0], [1.0]], [[[1.0, 0.0]], [[1.0, 0.0]]], "differ in width"),
        ([[1.0, 0.0]], [[[1.0, 0.0, 0.0]]], r"\(1, 2\).*\(1, 3\)"),
    ],
)
def test_metric_rejects_mismatched_input(
    metric: RetrievalMetric, predictions: list, references: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_metric_loads_from_its_path_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, references, expected = ragged()
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # evaluate adds the folder of its copies
    monkeypatch.setattr(socket.socket, "connect", None)
    metric = evaluate.load(str(PACKAGE / "retrieval_metric.py"), cache_dir=str(tmp_path))
    assert type(metric) is not RetrievalMetric  # but the class of the copy
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)


# --- confidence intervals --------------------------------------------------------------------------------------------


def noisy(images: int, captions: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of images and of `captions` captions each, less similar with more noise."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, 8, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(captions)
    text_embeds = image_embeds[owner] + noise * torch.randn(len(owner), 8, generator=generator)
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=1), owner


def test_intervals_equal_a_bootstrap_in_loops() -> None:
    image_embeds, text_embeds, owner = noisy(12, 3, 0.4)
    found = recall_intervals(image_embeds, text_embeds, owner, samples=40, seed=5)
    text_ranks = ranks(text_embeds, image_embeds, owner, torch.arange(12)).tolist()
    image_ranks = ranks(image_embeds, text_embeds, torch.arange(12), owner).tolist()
    generator = torch.Generator().manual_seed(5)
    drawn: dict[str, list[float]] = {"text_to_image_R@5": [], "image_to_text_R@1": []}
    for _ in range(40):
        sample = torch.randint(12, (12,), generator=generator).tolist()
        texts = [text_ranks[3 * image + caption] for image in sample for caption in range(3)]
        drawn["text_to_image_R@5"].append(100 * sum(rank <= 5 for rank in texts) / len(texts))
        drawn["image_to_text_R@1"].append(100 * sum(image_ranks[image] <= 1 for image in sample) / 12)
    for name, values in drawn.items():
        assert found[name] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_single_caption_intervals_match_the_binomial_ones() -> None:
    image_embeds, text_embeds, owner = noisy(600, 1, 0.2)
    metrics = retrieval_metrics(image_embeds, text_embeds, owner)
    share = metrics["text_to_image_R@1"] / 100
    assert 0.2 < share < 0.8
    low, high = recall_intervals(image_embeds, text_embeds, owner, samples=2000)["text_to_image_R@1"]
    half = 100 * 1.96 * (share * (1 - share) / 600) ** 0.5
    assert (low, high) == pytest.approx((100 * share - half, 100 * share + half), abs=0.15 * half)


def test_repeated_captions_do_not_narrow_intervals() -> None:
    image_embeds, text_embeds, owner = noisy(200, 1, 0.5)
    one = recall_intervals(image_embeds, text_embeds, owner)["text_to_image_R@1"]
    five = owner.repeat_interleave(5)  # repeating each caption five times adds no evidence
    repeated = recall_intervals(image_embeds, text_embeds[five], five)["text_to_image_R@1"]
    assert repeated == pytest.approx(one)


def test_intervals_enclose_metrics_and_vanish_at_perfection() -> None:
    assert set(recall_intervals(torch.eye(4), torch.eye(4)).values()) == {(100.0, 100.0), (600.0, 600.0)}
    embeddings = noisy(50, 2, 0.5)
    metrics, intervals = retrieval_metrics(*embeddings), recall_intervals(*embeddings)
    assert set(intervals) == {name for name in metrics if "R@" in name or name == "rsum"}
    assert all(low <= metrics[name] <= high and low < high for name, (low, high) in intervals.items())


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (200, 1.972)]
)
def test_quantiles_of_student_are_those_of_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)


def test_student_interval_worked_by_hand() -> None:
    assert student_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert student_interval([5.0, 5.0]) == (5.0, 5.0)
