"""`--overfit_batch`: whether a model can learn one batch by heart, which it must before it can learn anything else."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .diagnostics import chance_loss
from .distributed import gather_rows

STEPS = 300
EM_STEPS = 200  # more than enough for the few equal rows of a batch
REACHED = 0.05  # nats above the least possible loss: the right pairs have 95 % of the probability


class RepeatedBatch:
    """A loader that gives one and the same batch, until that is enough.

    Args:
        batch: of this process.
        images: of the global batch.
        steps: how often at most.
        enough: asked before each step; every process has to give the same answer.
    """

    def __init__(self, batch: dict[str, Tensor], images: int, steps: int, enough: Callable[[], bool]):
        self.batch, self.images, self.steps, self.enough = batch, images, steps, enough
        self.batch_sampler = self
        self.epoch = self.first_batch = 0  # set for an epoch, as with `GlobalBatches`

    def images_in(self, batch: int) -> int:
        """Images of a step, over all processes."""
        return self.images

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.steps):
            if self.enough():
                return
            yield self.batch


class KeptLog:
    """Takes the place of `MetricsLog` and keeps the lines to itself."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Keep a line."""
        self.lines.append(dict(values))


def batch_bounds(batch: dict[str, Tensor], loss_type: str, device: torch.device) -> tuple[float, float]:
    """[`least_loss`] and [`chance_loss`] of the global batch; every process gives its share of it, and gets both."""
    whole = {}
    images = batch["pixel_values" if "pixel_values" in batch else "vision_pooler_output"]
    if "text_pooler_output" in batch:
        texts = list(batch["text_pooler_output"])
    else:  # without the padding, which differs from process to process
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        texts = [ids[mask.bool()] for ids, mask in pairs]
    for side, rows in (("image_id", list(images)), ("text_image_id", texts)):
        keep = batch[side] >= 0  # no fillers
        ids_and_keys = torch.stack([batch[side], row_keys(rows)], dim=1)[keep]
        whole[side] = gather_rows(ids_and_keys.to(device)).t().tolist()
    (image_id, image_key), (text_image_id, text_key) = whole["image_id"], whole["text_image_id"]
    least = least_loss(image_id, text_image_id, image_key, text_key, loss_type)
    return least, chance_loss(len(image_id), len(text_image_id), loss_type)


def row_keys(rows: Iterable[Tensor]) -> Tensor:
    """One int64 a row, equal for equal rows and, but for a chance of 2^-64, for these alone."""
    digests = [hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.long)


def least_loss(
    image_id: Sequence[Hashable],
    text_image_id: Sequence[Hashable],
    image_key: Sequence[Hashable],
    text_key: Sequence[Hashable],
    loss_type: str = "softmax_sum",
) -> float:
    """The least loss that any model can have on a batch, in nats.

    Images or texts that are equal get equal similarities: the queries of a group share one distribution, in which the
    keys of a group have the same probability. In `softmax_mean` an image with p captions gives each 1/p at most: ln p.

    Args:
        image_id: `[B]`.
        text_image_id: `[N]`, for each text the id of its image.
        image_key: `[B]`, equal for images that are equal.
        text_key: `[N]`, equal for texts that are equal.
        loss_type: of the model's configuration.
    """
    key_of = dict(zip(image_id, image_key, strict=True))
    copies_of_image, copies_of_text = Counter(image_key), Counter(text_key)
    texts_of: dict[Hashable, Counter[Hashable]] = {i: Counter() for i in image_id}
    for i, text in zip(text_image_id, text_key, strict=True):
        texts_of[i][text] += 1
    if loss_type == "sigmoid":
        pairs = Counter((key_of[i], text) for i, text in zip(text_image_id, text_key, strict=True))
        sizes = ((right, copies_of_image[image] * copies_of_text[text]) for (image, text), right in pairs.items())
        return sum(_entropy(right, among) for right, among in sizes) / len(text_key)
    from_image: dict[Hashable, list[Counter[Hashable]]] = defaultdict(list)
    from_text: dict[Hashable, list[Counter[Hashable]]] = defaultdict(list)
    for i, texts in texts_of.items():
        from_image[key_of[i]].append(texts)
    for i, text in zip(text_image_id, text_key, strict=True):
        from_text[text].append(Counter([key_of[i]]))
    least = _least_of_mean if loss_type == "softmax_mean" else _least_of_sum
    image_loss = sum(least(queries, copies_of_text) for queries in from_image.values()) / len(image_key)
    text_loss = sum(least(queries, copies_of_image) for queries in from_text.values()) / len(text_key)
    return (image_loss + text_loss) / 2


def _entropy(right: int, among: int) -> float:
    # Of so many equal pairs some are right: their common probability is best that share.
    return sum(n * math.log(among / n) for n in (right, among - right) if n)


def _least_of_mean(queries: list[Counter[Hashable]], copies: Counter[Hashable]) -> float:
    # Cross-entropy of the best distribution, which is the mean of the targets, each spread over its copies.
    targets: dict[Hashable, float] = defaultdict(float)
    for right in queries:
        for key, number in right.items():
            targets[key] += number / right.total()
    return sum(weight * math.log(len(queries) / weight * copies[key]) for key, weight in targets.items())


def _least_of_sum(queries: list[Counter[Hashable]], copies: Counter[Hashable]) -> float:
    # Minus the log-likelihood of the best weights of a mixture, which expectation-maximisation comes to.
    hits = [{key: number / copies[key] for key, number in right.items()} for right in queries]
    weights = dict.fromkeys((key for hit in hits for key in hit), 1.0)
    for _ in range(EM_STEPS):
        shares: dict[Hashable, float] = defaultdict(float)
        for hit in hits:
            whole = sum(weights[key] * value for key, value in hit.items())
            for key, value in hit.items():
                shares[key] += weights[key] * value / whole / len(hits)
        weights = dict(shares)
    return -sum(math.log(sum(weights[key] * value for key, value in hit.items())) for hit in hits)


def judge_overfit(lines: list[dict[str, float]], least: float, chance: float) -> tuple[bool, str]:
    """Whether the loss of a repeated batch came down to zero, and what is likely the cause if not.

    Args:
        lines: of [`KeptLog`], one a step.
        least: of [`least_loss`].
        chance: [`chance_loss`] of the batch.

    Returns:
        Whether it did, and a line that says so.
    """
    losses = [line["loss"] for line in lines]
    told = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps on one batch"
    if least > 0.001:
        told += f" (no model can be below {least:.4f} where images have several captions or some rows are equal)"
    learnable = chance - least >= REACHED
    if learnable and losses[-1] - least < REACHED:
        return True, f"{told}: it reaches zero; model, gradients and optimiser work"
    if not learnable:
        cause = "this batch cannot be learned: its pictures, or its captions, are all alike"
    elif max(losses) > losses[0] + 0.2 * chance or _ended_at(chance, losses):
        cause = "likely the learning rates are too high, and all embeddings became alike; divide them by ten"
    elif losses[-1] >= 0.9 * chance:
        cause = "hardly anything was learned: likely the learning rates are too low, or too much is frozen"
    elif losses[-1] > min(losses) + 0.1 * chance:
        cause = "the loss goes up again: likely the learning rates are too high; divide them by ten"
    else:
        cause = "it came down part of the way: likely it needs more --max_steps or higher learning rates"
    return False, f"{told}: it does not reach zero; {cause}"


def _ended_at(chance: float, losses: list[float]) -> bool:
    return abs(losses[-1] - chance) < 0.02 * chance < max(losses) - min(losses)
