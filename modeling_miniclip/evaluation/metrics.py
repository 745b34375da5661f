"""Retrieval metrics: recall@K and median rank in both directions, and the loss over a whole split."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.loading.pairs import Pairs
from ..loss_miniclip import symmetric_contrastive_loss
from ..utils.arrays import as_embeddings, as_tensor

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
# Values of --best_metric, in addition to loss.
METRIC_NAMES = tuple(
    f"{direction}_{name}" for direction in DIRECTIONS for name in (*(f"R@{k}" for k in RECALL_AT), "median_rank")
) + ("rsum",)
# The same with --zero_shot_dataset.
ZERO_SHOT_METRICS = ("zero_shot_top-1", "zero_shot_top-5")
# Queries and keys whose similarities are computed at a time: 16 MB, so that a split of any size fits in memory.
BLOCK = 1024
KEY_BLOCK = 4096
PAIRS_OF = 128  # queries of a block whose right keys are listed at a time, with several ids for each


@dataclass(frozen=True)
class Ranking:
    """Result of [`rank_keys`] for Q queries.

    Args:
        rank: `[Q]` int64, rank of the best right key, from 1.
        right_score: `[Q]`, similarity of that key.
        scores: `[Q, top]`, largest similarities, descending.
        indices: `[Q, top]` int64, keys with these similarities.
    """

    rank: Tensor
    right_score: Tensor
    scores: Tensor
    indices: Tensor


def rank_keys(queries: Tensor, keys: Tensor, query_id: Tensor, key_id: Tensor, top: int = 0) -> Ranking:
    """Rank each query's best right key among all keys, and find the first keys.

    A wrong key ranks before the right one if its similarity is equal or NaN, so a model gets no credit for identical
    embeddings or for NaN.

    At most `BLOCK` x `KEY_BLOCK` similarities are in memory at a time. Blocks with right keys are computed twice;
    there are few of them if equal ids are adjacent, as for the captions of an image.

    Args:
        queries: `[Q, dim]` embeddings.
        keys: `[K, dim]` embeddings.
        query_id: `[Q]` integers; or `[Q, L]` int64, several ids of each query, with `NO_KEY` in shorter rows.
        key_id: `[K]`, or `[K, M]`, filled in the same way; a key that has an id of the query is right.
        top: number of first keys to return; all keys if there are fewer.
    """
    rows, top = len(queries), min(top, len(keys))
    rank = torch.empty(rows, dtype=torch.long, device=queries.device)
    # Filled in place: collecting the blocks in lists would fragment the memory.
    found = Ranking(rank, queries.new_empty(rows), queries.new_empty(rows, top), rank.new_empty(rows, top))
    columns = _blocks(len(keys), KEY_BLOCK)
    wrong_in = _wrong_by_id(query_id, key_id) if query_id.ndim == 1 else _wrong_by_keys(query_id, key_id, columns)
    for here in _blocks(rows, BLOCK):
        parts = _rank_block(queries[here], keys, columns, partial(wrong_in, here), top)
        for whole, part in zip((found.rank, found.right_score, found.scores, found.indices), parts, strict=True):
            whole[here] = part
    return found


# Which pairs of a block of queries and a block of keys, `[q, k]` booleans, are wrong; None if all are.
WrongPairs = Callable[[slice, slice], Tensor | None]


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _wrong_by_id(query_id: Tensor, key_id: Tensor) -> WrongPairs:
    def wrong_in(rows: slice, columns: slice) -> Tensor | None:
        ids, key_ids = query_id[rows], key_id[columns]
        if key_ids.max() < ids.min() or key_ids.min() > ids.max():
            return None
        return ids.unsqueeze(1) != key_ids.unsqueeze(0)

    return wrong_in


def _wrong_by_keys(query_id: Tensor, key_id: Tensor, columns: list[slice]) -> WrongPairs:
    pairs = Pairs(query_id, key_id, columns)

    def wrong_in(rows: slice, columns: slice) -> Tensor | None:
        height, width, found = rows.stop - rows.start, columns.stop - columns.start, 0
        wrong = torch.ones(height, width, dtype=torch.bool, device=query_id.device)
        for some in _blocks(height, PAIRS_OF):  # in a tile, all may be pairs
            places = pairs.in_tile(slice(rows.start + some.start, rows.start + some.stop), columns)
            wrong[some].view(-1)[places] = False
            found += len(places)
        return wrong if found else None

    return wrong_in


def _rank_block(
    block: Tensor, keys: Tensor, columns: list[slice], wrong_in: Callable[[slice], Tensor | None], top: int
) -> tuple[Tensor, ...]:
    """The fields of a [`Ranking`] for a block of queries."""
    best = block.new_full((len(block), 1), -torch.inf)
    for part in columns:
        if (wrong := wrong_in(part)) is not None:
            similarity = block @ keys[part].t()  # [block, key block]
            best = torch.maximum(best, similarity.masked_fill_(wrong, -torch.inf).amax(dim=1, keepdim=True))
    rank = torch.ones(len(block), dtype=torch.long, device=block.device)
    scores, indices = block.new_empty(len(block), 0), rank.new_empty(len(block), 0)
    for part in columns:
        similarity = block @ keys[part].t()
        before = ~(similarity < best)
        if (wrong := wrong_in(part)) is not None:
            before &= wrong
        rank += before.view(torch.uint8).sum(dim=1, dtype=torch.int32)  # summing booleans is four times slower
        if top:
            found = similarity.topk(min(top, similarity.shape[1]))
            scores = torch.cat([scores, found.values], dim=1)
            indices = torch.cat([indices, found.indices + part.start], dim=1)
            scores, order = scores.topk(min(top, scores.shape[1]))
            indices = indices.gather(1, order)
    return rank, best.squeeze(1), scores, indices


def ranks(queries: Tensor, keys: Tensor, query_id: Tensor, key_id: Tensor) -> Tensor:
    """`[Q]` int64, rank of each query's best right key, from 1; arguments as in [`rank_keys`]."""
    return rank_keys(queries, keys, query_id, key_id).rank


def retrieval_metrics(image_embeds: Any, text_embeds: Any, text_image_id: Any = None) -> dict[str, float]:
    """Recall@1, 5 and 10 in percent, median rank in both directions, and rsum, the sum of the six recalls.

    As defined by CLIP_benchmark: text-to-image counts each text with its one image; image-to-text counts an image as
    found if any of its texts is among the first K. Ties count against the model.

    Args:
        image_embeds: `[B, dim]` tensor, array or nested list, one row per image, unit norm; similarity is the dot
            product.
        text_embeds: `[N, dim]`, all captions of all images, unit norm.
        text_image_id: `[N]` integers, for each text the row of its image; None if text i belongs to image i.

    Returns:
        `text_to_image_R@1`, ..., `image_to_text_median_rank`, `rsum`.

    Raises:
        ValueError: there are no embeddings, widths differ, or an image has no text, or a text no image.

    Examples:
        >>> import torch
        >>> from modeling_miniclip import retrieval_metrics
        >>> metrics = retrieval_metrics(torch.eye(3), torch.eye(3)[[0, 1, 1]], [0, 1, 2])
        >>> round(metrics["text_to_image_R@1"], 2)
        66.67
    """
    return metrics_of_ranks(_ranks_both_ways(image_embeds, text_embeds, text_image_id)[0])


def _ranks_both_ways(image_embeds: Any, text_embeds: Any, text_image_id: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Check the shapes. Returns the [`ranks`] of the queries, by direction, and for each text the row of its image."""
    image_embeds, text_embeds = as_embeddings(image_embeds, text_embeds)
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"expected embeddings [images, dim] and [texts, dim], got {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}"
        )
    image_id = torch.arange(len(image_embeds), device=image_embeds.device)
    if text_image_id is None:
        text_image_id = torch.arange(len(text_embeds))
    text_image_id = as_tensor(text_image_id).to(image_embeds.device)
    if len(text_image_id) != len(text_embeds):
        raise ValueError(f"text_image_id has {len(text_image_id)} entries for {len(text_embeds)} text embeddings")
    if not torch.equal(text_image_id.unique(), image_id) or len(image_id) == 0:
        raise ValueError(
            f"each of the {len(image_embeds)} images needs at least one text, and each text one of these images, "
            f"but text_image_id names {len(text_image_id.unique())} images"
        )
    rank_of = {
        "text_to_image": ranks(text_embeds, image_embeds, text_image_id, image_id),
        "image_to_text": ranks(image_embeds, text_embeds, image_id, text_image_id),
    }
    return rank_of, text_image_id


def metrics_of_ranks(rank_of: Mapping[str, Tensor]) -> dict[str, float]:
    """[`retrieval_metrics`] from the ranks of the queries, by direction."""
    metrics: dict[str, float] = {}
    for direction, rank in rank_of.items():
        rank = rank.cpu().double()  # some devices have no float64
        for k in RECALL_AT:
            metrics[f"{direction}_R@{k}"] = 100 * (rank <= k).double().mean().item()
        metrics[f"{direction}_median_rank"] = rank.quantile(0.5).item()
    metrics["rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    return metrics


def recall_intervals(
    image_embeds: Any,
    text_embeds: Any,
    text_image_id: Any = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the recalls and of rsum, by the percentile bootstrap over images.

    Images are drawn with replacement, each with all its captions, because captions of an image succeed and fail
    together. Ranks are those among the whole split; otherwise a candidate that is drawn twice would tie with itself.
    So the intervals show how much the metrics depend on the queries, not on the set that is searched. See Efron &
    Tibshirani (1993), "An Introduction to the Bootstrap".

    Args:
        image_embeds: `[B, dim]`, as for [`retrieval_metrics`].
        text_embeds: `[N, dim]`, as for [`retrieval_metrics`].
        text_image_id: `[N]` or None, as for [`retrieval_metrics`].
        samples: number of bootstrap samples.
        seed: random seed of the samples.

    Returns:
        `(low, high)` in percent for `text_to_image_R@1`, ..., in points for `rsum`.

    Raises:
        ValueError: the shapes are wrong, as for [`retrieval_metrics`].
    """
    rank_of, text_image_id = _ranks_both_ways(image_embeds, text_embeds, text_image_id)
    image_of = {"text_to_image": text_image_id, "image_to_text": torch.arange(len(image_embeds))}
    recalls = resampled_recalls(rank_of, image_of, len(image_embeds), samples=samples, seed=seed)
    return named_intervals([f"{direction}_R@{k}" for direction in DIRECTIONS for k in RECALL_AT], recalls)


def resampled_recalls(
    rank_of: Mapping[str, Tensor],
    image_of: Mapping[str, Tensor],
    images: int,
    at: Sequence[int] = RECALL_AT,
    samples: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Recalls of bootstrap samples of the images, each with all its queries; see [`recall_intervals`].

    The samples depend only on the number of images and the seed. So those of two models on the same split are paired,
    and their difference row by row is the paired bootstrap of the difference.

    Args:
        rank_of: `[Q]` ranks of the queries, by direction.
        image_of: `[Q]`, for each query the row of its image, by direction.
        images: number of images.
        at: values of K.
        samples: number of bootstrap samples.
        seed: random seed of the samples.

    Returns:
        `[samples, directions * len(at)]` recalls in percent.
    """
    hits, queries = [], []  # [images] tensors: what each image adds to numerator and denominator of a recall
    for direction, rank in rank_of.items():
        for k in at:
            found = (rank.cpu() <= k).double()
            empty = found.new_zeros(images)
            hits.append(empty.index_add(0, image_of[direction].cpu(), found))
            queries.append(empty.index_add(0, image_of[direction].cpu(), torch.ones_like(found)))
    parts = torch.stack(hits + queries, dim=1)  # [images, 2 * directions * K]
    generator = torch.Generator().manual_seed(seed)
    drawn = [parts[torch.randint(images, (images,), generator=generator)].sum(dim=0) for _ in range(samples)]
    sums = torch.stack(drawn)
    return 100 * sums[:, : len(hits)] / sums[:, len(hits) :]


def named_intervals(
    names: Sequence[str], samples: Tensor, total: str | None = "rsum"
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of bootstrap samples.

    Args:
        names: names of the columns.
        samples: `[samples, names]` values.
        total: name under which the sum of all columns is added, or None.
    """
    if total is not None:
        names, samples = [*names, total], torch.cat([samples, samples.sum(dim=1, keepdim=True)], dim=1)
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype), dim=0).tolist()
    return {name: (low[i], high[i]) for i, name in enumerate(names)}


def student_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of a few independent values (Student 1908), for differences a paired one.

    Args:
        values: at least two values.
        confidence: probability that an interval made like this has the true mean.
    """
    freedom, mean = len(values) - 1, math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / freedom / len(values))
    half = error * student_quantile((1 + confidence) / 2, freedom)
    return mean - half, mean + half


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t above its median, found by bisection of its exact distribution."""

    def below(t: float) -> float:  # Abramowitz & Stegun (1964), 26.7.3 and 26.7.4
        angle = math.atan(t / math.sqrt(freedom))
        term = total = 1.0 if freedom % 2 == 0 else math.cos(angle)
        for k in range(2 if freedom % 2 == 0 else 3, freedom - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        if freedom % 2 == 0:
            return 0.5 + math.sin(angle) * total / 2
        return 0.5 + (angle + (math.sin(angle) * total if freedom > 1 else 0.0)) / math.pi

    low, high = 0.0, 1.0
    while below(high) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return high


def dataset_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: float,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: float | None = None,
) -> float:
    """[`symmetric_contrastive_loss`] over a whole split, with all captions and all images as candidates.

    Unlike a mean over batches, it does not depend on batch size, order or number of processes.

    Args:
        image_embeds: `[B, dim]`, unit norm.
        text_embeds: `[N, dim]`, unit norm.
        logit_scale: inverse temperature.
        text_image_id: `[N]`, for each text the row of its image.
        loss_type: loss type of the model's configuration.
        logit_bias: bias of the sigmoid loss, otherwise None.

    Returns:
        The loss in nats.
    """
    image_id = torch.arange(len(image_embeds), device=image_embeds.device)
    whole = (image_embeds, text_embeds, image_id, text_image_id)
    shares = -(-max(len(image_embeds), len(text_embeds)) // BLOCK)
    total = 0.0
    for images, texts, ids, text_ids in zip(*(tensor.tensor_split(shares) for tensor in whole), strict=True):
        share = symmetric_contrastive_loss(images, texts, logit_scale, ids, text_ids, loss_type, logit_bias, whole)
        total += share.item()
    return total


def validation_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_id: Tensor,
    logit_scale: float,
    loss_type: str = "softmax_sum",
    logit_bias: float | None = None,
) -> dict[str, float]:
    """All metrics of a validation: [`dataset_loss`] as `loss`, and [`retrieval_metrics`]; arguments as there."""
    loss = dataset_loss(image_embeds, text_embeds, logit_scale, text_image_id, loss_type, logit_bias)
    return {"loss": loss, **retrieval_metrics(image_embeds, text_embeds, text_image_id)}


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a value improves on the best one so far. NaN never does, unless there is nothing to improve on.

    Args:
        name: `loss`, or one of [`METRIC_NAMES`] and [`ZERO_SHOT_METRICS`].
        value: new value.
        best: best value so far; None or NaN if there is none.
    """
    if best is None or math.isnan(best):
        return True
    smaller_is_better = name == "loss" or name.endswith("median_rank")
    return value < best if smaller_is_better else value > best
