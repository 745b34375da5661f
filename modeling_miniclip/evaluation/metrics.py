"""How good a model is at retrieval: recall at K and median rank both ways, and the loss over a whole split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling_miniclip import symmetric_contrastive_loss

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
# Values of --best_metric and whether a larger one is better.
METRIC_NAMES = tuple(
    f"{direction}_{name}" for direction in DIRECTIONS for name in (*(f"R@{k}" for k in RECALL_AT), "median_rank")
) + ("rsum",)
# Similarities are computed for this many queries and keys at a time, 16 MB of them: a split of any size fits.
BLOCK = 1024
KEY_BLOCK = 4096


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a value of `loss` or of one of [`METRIC_NAMES`] improves on the best so far (None or NaN: on nothing).

    NaN is never better than a number.
    """
    if best is None or math.isnan(best):
        return True
    smaller_is_better = name == "loss" or name.endswith("median_rank")
    return value < best if smaller_is_better else value > best


@dataclass(frozen=True)
class Ranking:
    """What [`rank_keys`] found for each of Q queries."""

    rank: Tensor  # [Q] int64, of the best right key, 1 being the first
    right_score: Tensor  # [Q], its similarity
    scores: Tensor  # [Q, top], the largest similarities, descending
    indices: Tensor  # [Q, top] int64, the keys that have them


def rank_keys(queries: Tensor, keys: Tensor, query_id: Tensor, key_id: Tensor, top: int = 0) -> Ranking:
    """Rank of each query's best right key among all keys, and the first keys themselves.

    A wrong key whose similarity equals that of the right one, or is no number, counts as being before it: a model
    that gives all embeddings alike gets no credit, nor does one that gives NaN.

    Never more than `BLOCK` x `KEY_BLOCK` similarities are held. Those of blocks with right keys are computed twice;
    where equal ids lie together, as the captions of an image do, these are few.

    Args:
        queries: `[Q, dim]`.
        keys: `[K, dim]`.
        query_id: `[Q]` integers.
        key_id: `[K]` integers; a key with the query's id is right.
        top: how many of the first keys to return; all of them where there are fewer.
    """
    rows, top = len(queries), min(top, len(keys))
    rank = torch.empty(rows, dtype=torch.long, device=queries.device)
    # Filled in place: parts that were kept from block to block would leave the memory between them unusable.
    found = Ranking(rank, queries.new_empty(rows), queries.new_empty(rows, top), rank.new_empty(rows, top))
    for start in range(0, rows, BLOCK):
        here = slice(start, start + BLOCK)
        parts = _rank_block(queries[here], keys, query_id[here], key_id, top)
        for whole, part in zip((found.rank, found.right_score, found.scores, found.indices), parts, strict=True):
            whole[here] = part
    return found


def _rank_block(block: Tensor, keys: Tensor, ids: Tensor, key_id: Tensor, top: int) -> tuple[Tensor, ...]:
    """The columns of a [`Ranking`] for a block of queries."""
    key_blocks = list(zip(keys.split(KEY_BLOCK), key_id.split(KEY_BLOCK), strict=True))
    low, high = ids.min(), ids.max()
    may_be_right = [bool((there.max() >= low) & (there.min() <= high)) for _, there in key_blocks]
    best = block.new_full((len(block), 1), -torch.inf)
    for (some, there), may_be in zip(key_blocks, may_be_right, strict=True):
        if may_be:
            wrong = ids.unsqueeze(1) != there.unsqueeze(0)
            best = torch.maximum(best, (block @ some.t()).masked_fill(wrong, -torch.inf).amax(dim=1, keepdim=True))
    rank = torch.ones(len(block), dtype=torch.long, device=block.device)
    scores, indices = block.new_empty(len(block), 0), rank.new_empty(len(block), 0)
    for i, ((some, there), may_be) in enumerate(zip(key_blocks, may_be_right, strict=True)):
        similarity = block @ some.t()  # [block, key block]
        before = ~(similarity < best)
        if may_be:
            before &= ids.unsqueeze(1) != there.unsqueeze(0)
        rank += before.view(torch.uint8).sum(dim=1, dtype=torch.int32)  # a sum of booleans is four times slower
        if top:
            found = similarity.topk(min(top, len(some)))
            scores = torch.cat([scores, found.values], dim=1)
            indices = torch.cat([indices, found.indices + i * KEY_BLOCK], dim=1)
            scores, order = scores.topk(min(top, scores.shape[1]))
            indices = indices.gather(1, order)
    return rank, best.squeeze(1), scores, indices


def ranks(queries: Tensor, keys: Tensor, query_id: Tensor, key_id: Tensor) -> Tensor:
    """`[Q]` int64, the ranks of [`rank_keys`]."""
    return rank_keys(queries, keys, query_id, key_id).rank


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, text_image_id: Tensor | Sequence[int] | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, median rank both ways, and rsum, the sum of the six recalls.

    The definition of CLIP_benchmark: text-to-image counts each text with its one image, image-to-text counts an image
    as found if any of its texts is among the first K. Ties are resolved against the model.

    Args:
        image_embeds: `[B, dim]`, one row an image, unit norm: similarity is the dot product.
        text_embeds: `[N, dim]`, every caption of every image, unit norm.
        text_image_id: `[N]`, for each text the row of its image; None where text i belongs to image i.

    Returns:
        `text_to_image_R@1`, ..., `image_to_text_median_rank`, `rsum`.

    Raises:
        ValueError: no embeddings, unequal widths, an image without a text, or a text whose image is not there.

    Example:
        >>> import torch
        >>> from modeling_miniclip import retrieval_metrics
        >>> metrics = retrieval_metrics(torch.eye(3), torch.eye(3)[[0, 1, 1]], [0, 1, 2])
        >>> round(metrics["text_to_image_R@1"], 2)
        66.67
    """
    return metrics_of_ranks(_ranks_both_ways(image_embeds, text_embeds, text_image_id)[0])


def metrics_of_ranks(rank_of: Mapping[str, Tensor]) -> dict[str, float]:
    """[`retrieval_metrics`] of the ranks of each direction's queries."""
    metrics: dict[str, float] = {}
    for direction, rank in rank_of.items():
        for k in RECALL_AT:
            metrics[f"{direction}_R@{k}"] = 100 * (rank <= k).double().mean().item()
        metrics[f"{direction}_median_rank"] = rank.double().quantile(0.5).item()
    metrics["rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    return metrics


def _ranks_both_ways(
    image_embeds: Tensor, text_embeds: Tensor, text_image_id: Tensor | Sequence[int] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """[`ranks`] of each direction's queries, and for each text the row of its image; the shapes checked."""
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"expected embeddings [images, dim] and [texts, dim], got {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}"
        )
    image_id = torch.arange(len(image_embeds), device=image_embeds.device)
    if text_image_id is None:
        text_image_id = torch.arange(len(text_embeds))
    text_image_id = torch.as_tensor(text_image_id, device=image_embeds.device)
    if len(text_image_id) != len(text_embeds):
        raise ValueError(f"text_image_id has {len(text_image_id)} entries for {len(text_embeds)} text embeddings")
    if not torch.equal(text_image_id.unique(), image_id) or len(image_id) == 0:
        raise ValueError(
            f"each of the {len(image_embeds)} images needs at least one text, and each text an image among them: "
            f"text_image_id names {len(text_image_id.unique())} of them"
        )
    rank_of = {
        "text_to_image": ranks(text_embeds, image_embeds, text_image_id, image_id),
        "image_to_text": ranks(image_embeds, text_embeds, image_id, text_image_id),
    }
    return rank_of, text_image_id


def recall_intervals(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_id: Tensor | Sequence[int] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the recalls of [`retrieval_metrics`] and of rsum: percentile bootstrap over images.

    Images are drawn with replacement, each with all its captions, for captions of one image succeed and fail together.
    The ranks stay those among the whole split: a candidate that was drawn twice would tie with itself. So the
    intervals tell how much the figures depend on the queries, not on the set that is searched (Efron & Tibshirani
    1993, "An Introduction to the Bootstrap").

    Args:
        image_embeds, text_embeds, text_image_id: as for [`retrieval_metrics`].
        samples: bootstrap samples.
        seed: of the draws.

    Returns:
        `(low, high)` in percent for `text_to_image_R@1`, ..., in points for `rsum`.

    Raises:
        ValueError: as [`retrieval_metrics`].
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
    """Recalls of bootstrap samples of the images, each drawn with all its queries; see [`recall_intervals`].

    The draws depend on the number of images and the seed only: those of two models on the same split are paired, and
    their difference row by row is the paired bootstrap of the difference.

    Args:
        rank_of: `[Q]` ranks of each direction's queries.
        image_of: `[Q]`, the row of the image that each of these queries belongs to.
        images: their number.
        at: the K.
        samples: bootstrap samples.
        seed: of the draws.

    Returns:
        `[samples, directions * K]` in percent.
    """
    hits, queries = [], []  # [images] each: what an image adds to numerator and denominator of each recall
    for direction, rank in rank_of.items():
        for k in at:
            found = (rank <= k).double().cpu()
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
    """95 % percentile intervals of each column of `[samples, names]`, and, as `total`, of their sum."""
    if total is not None:
        names, samples = [*names, total], torch.cat([samples, samples.sum(dim=1, keepdim=True)], dim=1)
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype), dim=0).tolist()
    return {name: (low[i], high[i]) for i, name in enumerate(names)}


def dataset_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: float,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: float | None = None,
) -> float:
    """[`symmetric_contrastive_loss`] over a whole split, every caption and every image being a candidate.

    Unlike a mean over batches it does not depend on batch size, order or number of processes.

    Args:
        image_embeds: `[B, dim]`, unit norm.
        text_embeds: `[N, dim]`, unit norm.
        logit_scale: inverse temperature.
        text_image_id: `[N]`, for each text the row of its image.
        loss_type: that of the model's configuration.
        logit_bias: of the sigmoid loss.

    Returns:
        Nats.
    """
    image_id = torch.arange(len(image_embeds), device=image_embeds.device)
    whole = (image_embeds, text_embeds, image_id, text_image_id)
    shares = -(-max(len(image_embeds), len(text_embeds)) // BLOCK)
    total = 0.0
    for images, texts, ids, text_ids in zip(*(tensor.tensor_split(shares) for tensor in whole), strict=True):
        share = symmetric_contrastive_loss(images, texts, logit_scale, ids, text_ids, loss_type, logit_bias, whole)
        total += share.double().item()
    return total


def validation_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_id: Tensor,
    logit_scale: float,
    loss_type: str = "softmax_sum",
    logit_bias: float | None = None,
) -> dict[str, float]:
    """[`dataset_loss`] as `loss`, then [`retrieval_metrics`]: all that a validation tells."""
    loss = dataset_loss(image_embeds, text_embeds, logit_scale, text_image_id, loss_type, logit_bias)
    return {"loss": loss, **retrieval_metrics(image_embeds, text_embeds, text_image_id)}
