"""Warn about a run that does not learn, with the likely cause, from values that training computes anyway.

The thresholds are far from the values of a healthy run, as nobody reads a warning that is often wrong.
"""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import MiniClipError
from ...evaluation.metrics import ranks
from ..loss.pair_counts import PairCounts
from .caption_probe import CaptionEvidence

# Steps after the warm-up before the first warning: until then a good model may look like one that learns nothing.
PATIENCE = 100
WINDOW = 50  # steps over which the loss is averaged, as single batches are easier or harder
MOST_ROWS = 2000  # validation images to look at, for a second or two
# With fewer images, the shuffled-caption probe cannot distinguish matching captions from others: with untrained towers
# on photographs its z is about 2 for 200 images and 14 for 1,000 (see `linear_alignment_z`).
FEWEST_ROWS, ENOUGH_ROWS = 64, 500
CLEAR = 3.0  # standard deviations above chance that are no accident
NO_EVIDENCE = CaptionEvidence()


def chance_loss(counts: PairCounts, loss_type: str) -> float:
    """The loss of a model that cannot distinguish the pairs of a batch; ln(batch) for the softmax losses.

    With several captions per image, or captions that belong to several images, their probabilities add up in
    `softmax_sum`; in `softmax_mean` the log-probability of each is that of any other text. For the sigmoid loss, it is
    the loss of the best constant logit.

    Args:
        counts: images, texts and pairs of the batch.
        loss_type: loss type of the model's configuration.
    """
    if loss_type == "sigmoid":
        wrong = counts.compared - counts.pairs
        of_wrong = wrong * math.log(counts.compared / wrong) if wrong > 0 else 0.0
        return (counts.pairs * math.log(counts.compared / counts.pairs) + of_wrong) / counts.texts
    candidates = (math.log(counts.images) + counts.log_candidates) / 2
    return candidates - ((counts.log_of_texts + counts.log_of_images) / 2 if loss_type == "softmax_sum" else 0.0)


def floor_loss(counts: PairCounts, loss_type: str) -> float:
    """What the loss of a batch cannot be below: in `softmax_mean`, several right answers share the probability."""
    return (counts.log_of_texts + counts.log_of_images) / 2 if loss_type == "softmax_mean" else 0.0


def diagnose_loss(
    loss: float, chance: float, gradient_norm: float, has_learned: bool = True, floor: float = 0.0
) -> str | None:
    """A warning if the loss stays at or above that of guessing after many steps, else None.

    Args:
        loss: mean loss over many steps, in nats.
        chance: [`chance_loss`] of the same steps.
        gradient_norm: gradient norm of the last step, before clipping.
        has_learned: whether training has changed anything.
        floor: [`floor_loss`] of the same steps.
    """
    if loss - floor < 0.98 * (chance - floor) or chance - floor < 0.5:
        return None
    found = f"the loss is stuck at that of guessing, {chance:.3f}"
    if loss > 1.1 * chance:
        found = f"the loss, {loss:.3f}, is above that of guessing, {chance:.3f}"
    cause = "the learning rates are too high (divide them by ten, those of the towers first)"
    if not has_learned:
        cause = "the learning rates are too low, or too much is frozen"
    return (
        f"{found}, at a gradient norm of {gradient_norm:.2g}: likely {cause}, or captions do not belong to their "
        "images; --overfit_batch true shows which"
    )


def diagnose_temperature(
    logit_scale: float, largest: float, loss: float, chance: float, floor: float = 0.0
) -> str | None:
    """A warning if the temperature is at one of its ends while the loss is high, else None.

    A good model also ends at the upper bound of the inverse temperature, but with a low loss.

    Args:
        logit_scale: inverse temperature.
        largest: upper bound of the inverse temperature.
        loss: mean loss over many steps, in nats.
        chance: [`chance_loss`] of the same steps.
        floor: [`floor_loss`] of the same steps.
    """
    if loss - floor < (chance - floor) / 2 or chance - floor < 0.5:
        return None
    if logit_scale > 0.99 * largest:
        return (
            f"the inverse temperature has reached its bound {largest:g} while the loss is {loss:.3f}: likely "
            "--head_learning_rate, which also applies to the temperature, is too high; divide it by ten"
        )
    if logit_scale < 2:
        return (
            f"the temperature has exploded (its inverse fell to {logit_scale:.2g}): the model gives all pairs the "
            "same probability; likely captions do not belong to their images, or --head_learning_rate is too high"
        )
    return None


def mean_cosine(embeds: Tensor) -> float:
    """Mean cosine between two different rows of `[n, dim]` unit-norm embeddings."""
    n = len(embeds)
    total = embeds.double().sum(dim=0).square().sum().item()
    return (total - n) / (n * (n - 1))


def diagnose_collapse(image_embeds: Tensor, text_embeds: Tensor, has_learned: bool = True) -> str | None:
    """A warning if the embeddings are almost all the same, else None.

    Args:
        image_embeds: `[B, dim]`, unit norm, images of a split.
        text_embeds: `[N, dim]`, unit norm, texts of the split.
        has_learned: whether training has changed anything, as untrained towers may start like that.
    """
    for name, embeds, flag in (("image", image_embeds, "vision"), ("text", text_embeds, "text")):
        cosine = mean_cosine(embeds) if len(embeds) > 1 else 0.0
        if cosine > 0.98:
            cause = "is too low: nothing has changed"
            if has_learned:
                cause = f"is too high; divide them by ten, or --freeze {flag}"
            return (
                f"the {name} embeddings have collapsed, their mean cosine is {cosine:.4f}: likely "
                f"--{flag}_learning_rate or --head_learning_rate {cause}"
            )
    return None


def diagnose_captions(
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_image_id: Tensor,
    share: float | None,
    evidence: CaptionEvidence = NO_EVIDENCE,
) -> str | None:
    """A warning if unseen images fit their own captions no better than shuffled ones, else None.

    It looks at the model's retrieval and, if that is no better than chance, at what a linear map finds in the
    embeddings. That does not depend on the optimizer's success, and so distinguishes wrong data from wrong learning
    rates.

    Args:
        image_embeds: `[B, dim]`, unit norm, images of the validation split.
        text_embeds: `[N, dim]`, unit norm, texts of the split.
        text_image_id: `[N]`, row of each text's image.
        share: last training loss divided by its [`chance_loss`], both above the [`floor_loss`]; None if unknown.
        evidence: what the probe of the captions found before the run.
    """
    images = len(image_embeds)
    if images < FEWEST_ROWS or above_chance(text_embeds, image_embeds, text_image_id) > CLEAR:
        return None
    learned = share is not None and share < 0.9
    z = evidence.z if evidence.related else linear_alignment_z(image_embeds, text_embeds, text_image_id)
    if z > CLEAR:
        if share is None or share < 0.98:
            return None
        return (
            f"the model finds no image by its caption, but the captions do fit the images (z = {z:.1f}): "
            "likely not the data but the learning rates are wrong; divide them by ten"
        )
    if evidence.enough or evidence.z > CLEAR / 2 or (images < ENOUGH_ROWS and not learned):
        return None  # it was said before the run, or it is not certain
    return (
        f"{images} validation images fit their own captions no better than shuffled ones (z = {z:.1f})"
        f"{' although the training loss fell' if learned else ''}: likely captions are unrelated to their images; "
        "look at some rows (a shifted column, a sorted list of files)"
    )


def above_chance(queries: Tensor, keys: Tensor, owner: Tensor) -> float:
    """How far the right keys rank above the middle, in standard deviations of a model that knows nothing.

    Its ranks of n keys are uniform, with variance n^2 / 12. Queries with the same key count as one.

    Args:
        queries: `[Q, dim]` embeddings.
        keys: `[n, dim]` embeddings.
        owner: `[Q]`, right key of each query; every key has at least one.
    """
    n = len(keys)
    place = (ranks(queries, keys, owner, torch.arange(n)).double() - 1) / max(1, n - 1)  # 0 the best, 1 the worst
    return (0.5 - mean_per_image(place[:, None], owner, n).mean().item()) * math.sqrt(12 * n)


def mean_per_image(rows: Tensor, owner: Tensor, images: int) -> Tensor:
    """Mean of the `[N, width]` rows of each image, as `[images, width]` float64."""
    total = torch.zeros(images, rows.shape[1], dtype=torch.double).index_add_(0, owner, rows.double())
    return total / torch.bincount(owner, minlength=images).unsqueeze(1)


def linear_alignment_z(image_embeds: Tensor, text_embeds: Tensor, text_image_id: Tensor) -> float:
    """How well a linear map, fitted on one half of the images, retrieves in the other half, and the other way round.

    The map is a regularised canonical correlation analysis (Vinod 1976). It finds the little that untrained or
    collapsed towers let through: with the untrained towers of the preset scenes_tiny, z is 50 for 1,000 of the
    built-in scenes and 14 for 1,000 photographs, and about 1 for shuffled captions.

    Args:
        image_embeds: `[B, dim]` embeddings.
        text_embeds: `[N, dim]` embeddings.
        text_image_id: `[N]`, row of each text's image.

    Returns:
        z in standard deviations, as from [`above_chance`].
    """
    images = len(image_embeds)
    sides = (image_embeds.double(), mean_per_image(text_embeds, text_image_id, images))
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    halves = order.tensor_split(2)
    found = []
    for seen, unseen in (halves, halves[::-1]):
        seen_white, unseen_white = zip(*(whiten(side[seen], side[unseen]) for side in sides), strict=True)
        u, strength, vh = torch.linalg.svd(seen_white[0].t() @ seen_white[1] / len(seen), full_matrices=False)
        keys, queries = (
            normalize(x @ directions * strength.sqrt(), dim=-1)
            for x, directions in zip(unseen_white, (u, vh.t()), strict=True)
        )
        found.append(above_chance(queries, keys, torch.arange(len(unseen))))
    return sum(found) / math.sqrt(2)


def whiten(seen: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Centre both and make the covariance of the first the identity, damped by its mean eigenvalue."""
    mean = seen.mean(dim=0)
    values, vectors = torch.linalg.eigh((seen - mean).t() @ (seen - mean) / len(seen))
    values = values.clamp(min=0)
    scaled = vectors * (values + values.mean() + 1e-30).rsqrt()
    return (seen - mean) @ scaled, (unseen - mean) @ scaled


def not_finite(what: str, value: float, mixed_precision: str) -> MiniClipError:
    """The error that ends a run with NaN or infinite values."""
    cause = "a learning rate is too high: lower --head_learning_rate, --vision_learning_rate and --text_learning_rate"
    if mixed_precision == "fp16":
        cause = f"a number is too large for fp16 (use --mixed_precision bf16 or no), or {cause}"
    return MiniClipError(
        f"the {what} became {value}, likely because {cause}; the last checkpoint and the export are untouched"
    )


class Diagnosis:
    """Watches a run and warns about each kind of problem once.

    Args:
        warn: function that prints a line.
        warmup_steps: warm-up steps of the schedule.
        largest_scale: upper bound of the inverse temperature.
        has_softmax: whether the loss is a softmax loss. The sigmoid loss can start anywhere, and may pass that of
            guessing while it falls.
        evidence: what the probe of the captions found before the run.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        warmup_steps: int,
        largest_scale: float,
        has_softmax: bool = True,
        evidence: CaptionEvidence = NO_EVIDENCE,
    ):
        self.warn, self.first_step, self.largest_scale = warn, warmup_steps + PATIENCE, largest_scale
        self.has_softmax, self.evidence = has_softmax, evidence
        self.finds_images = evidence.related  # whether anything shows that captions belong to their images
        self.reported: set[str] = set()
        self.windows: deque[tuple[int, float, float, float]] = deque()
        self.first: dict[str, float] | None = None
        self.share: float | None = None
        self.has_learned = True

    def after_steps(self, step: int, values: dict[str, float], steps: int, chance: float, floor: float = 0.0) -> None:
        """Check a logged line.

        Args:
            step: step of the run.
            values: `loss`, `gradient_norm` and `logit_scale`.
            steps: number of steps over which the loss is averaged.
            chance: [`chance_loss`] of these steps.
            floor: [`floor_loss`] of these steps.
        """
        self.windows.append((steps, values["loss"], chance, floor))
        while sum(n for n, *_ in self.windows) - self.windows[0][0] >= WINDOW:
            self.windows.popleft()
        total = sum(n for n, *_ in self.windows)
        loss, expected, least = (sum(w[0] * w[i] for w in self.windows) / total for i in (1, 2, 3))
        self.first = self.first or dict(values)
        # More than the differences between batches, or than a rate of 2e-5 changes the temperature in 100 steps.
        self.has_learned = abs(loss - self.first["loss"]) > 0.05 * expected or not math.isclose(
            values["logit_scale"], self.first["logit_scale"], rel_tol=0.002
        )
        self.share = (loss - least) / (expected - least) if expected > least and total >= WINDOW else None
        if self.has_softmax and step >= self.first_step and total >= WINDOW:
            norm, scale = values["gradient_norm"], values["logit_scale"]
            self._report("loss", diagnose_loss(loss, expected, norm, self.has_learned, least))
            self._report("temperature", diagnose_temperature(scale, self.largest_scale, loss, expected, least))

    def after_validation(self, step: int, image_embeds: Tensor, text_embeds: Tensor, text_image_id: Tensor) -> None:
        """Check the embeddings of the validation split, see [`diagnose_captions`]."""
        images, keep = image_embeds[:MOST_ROWS], text_image_id < MOST_ROWS
        if step >= self.first_step:
            self._report("collapse", diagnose_collapse(images, text_embeds[keep], self.has_learned))
        share = self.share if step >= self.first_step else None
        rows = images, text_embeds[keep], text_image_id[keep]
        self._report("captions", diagnose_captions(*rows, share, self.evidence))
        self.finds_images = self.finds_images or above_chance(rows[1], rows[0], rows[2]) > CLEAR

    def doubt(self) -> str | None:
        """What to say at the end if nothing showed whether the captions belong to their images; else None."""
        if self.finds_images or self.evidence.enough or "captions" in self.reported:
            return None
        return (
            f"{self.evidence.images} images are too few to see whether captions belong to their images: look at "
            "retrieval.png"
        )

    def _report(self, kind: str, line: str | None) -> None:
        if line is not None and kind not in self.reported:
            self.reported.add(kind)
            self.warn(line)
