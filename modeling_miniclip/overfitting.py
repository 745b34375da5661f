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


def batch_bounds(batch: dict[str, Tensor], device: torch.device) -> tuple[float, float]:
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
    least = least_loss(image_id, text_image_id, image_key, text_key)
    return least, chance_loss(len(image_id), len(text_image_id))


def row_keys(rows: Iterable[Tensor]) -> Tensor:
    """One int64 a row, equal for equal rows and, but for a chance of 2^-64, for these alone."""
    digests = [hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.long)


def least_loss(
    image_id: Sequence[Hashable], text_image_id: Sequence[Hashable], image_key: Sequence[Hashable],
    text_key: Sequence[Hashable],
) -> float:  # fmt: skip
    """The least symmetric loss that any model can have on a batch, in nats.

    An image with p captions gives each at most 1/p of its probability: ln p. Images or texts that are equal get equal
    similarities, so that their queries share one distribution, and the keys of a group share its probability equally.

    Args:
        image_id: `[B]`.
        text_image_id: `[N]`, for each text the id of its image.
        image_key: `[B]`, equal for images that are equal.
        text_key: `[N]`, equal for texts that are equal.
    """
    image_of = dict(zip(image_id, image_key, strict=True))
    pairs = [(image_of[i], i, text) for i, text in zip(text_image_id, text_key, strict=True)]
    captions = Counter(text_image_id)
    copies_of_image, copies_of_text = Counter(image_key), Counter(text_key)
    from_image: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    from_text: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for image, i, text in pairs:
        from_image[image][text] += 1 / captions[i]  # type: ignore[assignment]
        from_text[text][image] += 1
    image_loss = sum(_least(targets, copies_of_text) for targets in from_image.values()) / len(image_key)
    text_loss = sum(_least(targets, copies_of_image) for targets in from_text.values()) / len(text_key)
    return (image_loss + text_loss) / 2


def _least(targets: Counter[Hashable], copies: Counter[Hashable]) -> float:
    # Cross-entropy of the best distribution, which is that of the targets, each spread over its copies.
    total = sum(targets.values())
    return sum(weight * math.log(total / weight * copies[key]) for key, weight in targets.items())


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
