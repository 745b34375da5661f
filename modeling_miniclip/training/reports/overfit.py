"""`--overfit_batch`: check that the model can learn one batch, as it must before it can learn anything else."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor
from tqdm.auto import trange

from ...data.loading.batches import GlobalBatches
from ...errors import DataError, MiniClipError
from .. import setup
from ..command_line.arguments import TrainingArguments
from ..command_line.check_arguments import lora_details
from ..loss.pair_counts import plain_counts
from ..processes.distributed import gather_rows
from ..row_order import training_order
from ..run import TrainingRun
from ..settings import choose_settings
from ..towers.layers import set_training_mode
from .diagnostics import chance_loss

STEPS = 300
EM_STEPS = 200  # more than enough for the few equal rows of a batch
REACHED = 0.05  # nats above the least possible loss: the right pairs have 95 % of the probability


def check_overfitting(
    arguments: TrainingArguments, train_step: Callable[[TrainingRun, dict[str, Any], int], None]
) -> Path:
    """Train on the first batch only and report whether its loss reaches zero; nothing is written.

    Args:
        arguments: flags of the run.
        train_step: function of the run, this process's share of a batch and its number of images over all processes;
            it takes one optimizer step.

    Returns:
        `--output_dir`, in which nothing was written.

    Raises:
        MiniClipError: the loss does not reach zero; with the likely cause.
    """
    run = prepare_one_batch(arguments)
    batch = next(iter(run.train_loader))
    skipped = run.bad_images.record_undecodable("train", batch.pop("undecodable", []))
    images = run.train_batches.images_in(0) - skipped
    if images == 0:
        raise DataError(f"none of the {skipped} images of the first batch can be decoded; `miniclip check` lists them")
    least, chance = batch_bounds(batch, run.unwrapped_model.config.loss_type, run.accelerator.device)
    steps = run.arguments.max_steps or STEPS
    run.say(f"one batch of {images} images, at most {steps} steps")
    losses = overfit(run, batch, images, steps, least, train_step)
    reached, verdict = judge_overfit(losses, least, chance)
    if not reached:
        raise MiniClipError(verdict)
    run.say(verdict)
    return run.output_dir


def without_randomness(arguments: TrainingArguments) -> TrainingArguments:
    """Arguments with which every step is the same and has the contrastive loss alone, and nothing is written."""
    return replace(
        arguments,
        augmentation="[]",
        num_views=None,
        hard_negatives=["none"],
        teacher=None,
        teacher_kwargs=None,
        dropout=0.0,
        projection_dropout=None,
        lora_kwargs=json.dumps(lora_details(arguments) | {"dropout": 0.0}) if arguments.lora_rank else None,
        ema_decay=0.0,
        lr_scheduler_type="plateau",
        num_workers=0,
        report_to="none",
    )


def prepare_one_batch(arguments: TrainingArguments) -> TrainingRun:
    """Like `prepare` of `train_miniclip.py`, but with only the images of the first batch, and no output folder.

    Settings are derived as for the whole run, which the batch stands for; then what is random in them is left out.
    """
    launched = replace(arguments, report_to="none", ema_decay=0.0)
    accelerator = setup.build_accelerator(launched, setup.check_launch(launched))
    splits = setup.load_splits(arguments)
    arguments = without_randomness(choose_settings(splits, None, arguments, accelerator))
    setup.report_splits(splits, arguments, accelerator)
    model, processor = setup.build_model(splits, arguments, accelerator)
    batch = first_batch(splits, arguments)
    features = setup.compute_frozen_features(model, processor, batch, arguments, accelerator)
    loaders = setup.build_loaders(batch, features, processor, arguments, accelerator)
    return setup.build_run(model, processor, splits, features, loaders, arguments, accelerator)


def first_batch(splits: DatasetDict, arguments: TrainingArguments) -> DatasetDict:
    """The splits with only the training images of the first step, and one validation image, which is not used."""
    batch = next(iter(GlobalBatches(training_order(splits, arguments), arguments.batch_size)))
    rows = {"train": [row for _, row in batch], "validation": [0]}
    return DatasetDict({name: splits[name].select(indices) for name, indices in rows.items()})


def overfit(
    run: TrainingRun,
    batch: dict[str, Any],
    images: int,
    steps: int,
    least: float,
    train_step: Callable[[TrainingRun, dict[str, Any], int], None],
) -> list[float]:
    """Repeat a batch until its loss is close to the least possible one.

    Args:
        run: the run, whose model is trained.
        batch: this process's share of the batch.
        images: number of images in the batch, over all processes.
        steps: largest number of steps.
        least: least possible loss of the batch, in nats.
        train_step: function that takes one optimizer step.

    Returns:
        The loss before each step.
    """
    set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
    losses: list[float] = []
    for _ in trange(steps, desc="one batch", unit="step", leave=False, disable=not run.accelerator.is_main_process):
        train_step(run, dict(batch), images)  # a step in chunks takes the pixels out of it
        losses.append(run.meter.read()["loss"])  # the same in every process
        if losses[-1] < least + REACHED:
            break
    return losses


def batch_bounds(batch: dict[str, Tensor], loss_type: str, device: torch.device) -> tuple[float, float]:
    """[`least_loss`] and [`chance_loss`] of the global batch; every process passes its share of it, and gets both."""
    whole = {}
    images = batch["pixel_values" if "pixel_values" in batch else "vision_pooler_output"]
    if "text_pooler_output" in batch:
        texts = list(batch["text_pooler_output"])
    else:  # without padding, which differs between processes
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        texts = [ids[mask.bool()] for ids, mask in pairs]
    for side, rows in (("image_id", list(images)), ("text_image_id", texts)):
        keep = batch[side] >= 0  # no fillers
        ids_and_keys = torch.stack([batch[side], row_keys(rows)], dim=1)[keep]
        whole[side] = gather_rows(ids_and_keys.to(device)).t().tolist()
    (image_id, image_key), (text_image_id, text_key) = whole["image_id"], whole["text_image_id"]
    least = least_loss(image_id, text_image_id, image_key, text_key, loss_type)
    return least, chance_loss(plain_counts(len(image_id), len(text_image_id)), loss_type)


def row_keys(rows: Iterable[Tensor]) -> Tensor:
    """`[rows]` int64 keys, equal for equal rows; two different rows have the same key with probability 2^-64."""
    digests = [hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.long)


def least_loss(
    image_id: Sequence[Hashable],
    text_image_id: Sequence[Hashable],
    image_key: Sequence[Hashable],
    text_key: Sequence[Hashable],
    loss_type: str = "softmax_sum",
) -> float:
    """The lowest loss that any model can have on a batch, in nats.

    Equal images or texts get equal similarities: the queries of a group share one distribution, in which the keys of
    a group have the same probability. In `softmax_mean`, an image with p captions gives each at most 1/p: ln p.

    Args:
        image_id: `[B]` ids of the images.
        text_image_id: `[N]`, id of each text's image.
        image_key: `[B]` keys, the same for equal images.
        text_key: `[N]` keys, the same for equal texts.
        loss_type: loss type of the model's configuration.
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
    # Of `among` equal pairs, `right` are right: their best common probability is that fraction.
    return sum(n * math.log(among / n) for n in (right, among - right) if n)


def _least_of_mean(queries: list[Counter[Hashable]], copies: Counter[Hashable]) -> float:
    # Cross-entropy of the best distribution: the mean of the targets, each spread over its copies.
    targets: dict[Hashable, float] = defaultdict(float)
    for right in queries:
        for key, number in right.items():
            targets[key] += number / right.total()
    return sum(weight * math.log(len(queries) / weight * copies[key]) for key, weight in targets.items())


def _least_of_sum(queries: list[Counter[Hashable]], copies: Counter[Hashable]) -> float:
    # Minus the log-likelihood of the best weights of a mixture, found by expectation-maximisation.
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


def judge_overfit(losses: list[float], least: float, chance: float) -> tuple[bool, str]:
    """Whether the loss of a repeated batch came down to zero, and the likely cause if it did not.

    Args:
        losses: loss of each step, in nats.
        least: [`least_loss`] of the batch.
        chance: [`chance_loss`] of the batch.

    Returns:
        Whether it did, and a line with the result and the likely cause.
    """
    result = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps on one batch"
    if least > 0.001:
        result += f" (no model can be below {least:.4f} if images have several captions or some rows are equal)"
    learnable = chance - least >= REACHED
    if learnable and losses[-1] - least < REACHED:
        return True, f"{result}: it reaches zero; model, gradients and optimizer work"
    if not learnable:
        cause = "this batch cannot be learned: its images, or its captions, are all the same"
    elif max(losses) > losses[0] + 0.2 * chance or _ended_at(chance, losses):
        cause = "likely the learning rates are too high and all embeddings became the same; divide the rates by ten"
    elif losses[-1] >= 0.9 * chance:
        cause = "it barely learned anything: likely the learning rates are too low, or too much is frozen"
    elif losses[-1] > min(losses) + 0.1 * chance:
        cause = "the loss rises again: likely the learning rates are too high; divide them by ten"
    else:
        cause = "it came down part of the way: likely it needs more --max_steps or higher learning rates"
    return False, f"{result}: it does not reach zero; {cause}"


def _ended_at(chance: float, losses: list[float]) -> bool:
    return abs(losses[-1] - chance) < 0.02 * chance < max(losses) - min(losses)
