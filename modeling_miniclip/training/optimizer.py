"""Parameter groups, schedule of the learning rates, and the bound of the temperature."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ..modeling_miniclip import MiniClipModel
from .command_line.arguments import TrainingArguments
from .command_line.check_arguments import schedule_details
from .processes.deepspeed import clamp_parameter
from .towers.layers import rate_multipliers, text_layers, vision_layers

NO_DECAY = "_no_decay"  # end of the name of a group without weight decay


def part_rates(arguments: TrainingArguments) -> dict[str, float]:
    """Learning rate of each part of a model."""
    return {
        "head": arguments.head_learning_rate,
        "vision": arguments.vision_learning_rate,
        "text": arguments.text_learning_rate,
    }


def parameter_groups(model: MiniClipModel, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """AdamW's groups: one learning rate per part and layer; weight decay for matrices only.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`. The name is `head`, `vision` or `text`, followed by the
        factor of the rate in layers below a tower's last one (`vision*0.8`), and by `_no_decay` if the group has no
        weight decay. Groups without a trainable parameter are left out.

    Raises:
        UsageError: with `--layer_decay`, timm does not know the layers of the image tower.
    """
    rates = part_rates(arguments)
    parts = {"vision_model": "vision", "text_model": "text"}
    multipliers: dict[Parameter, float] = {}
    if arguments.layer_decay != 1:
        for layers in (vision_layers(model.vision_model), text_layers(model.text_model)):
            multipliers |= rate_multipliers(layers, arguments.layer_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.get(name.partition(".")[0], "head")
        multiplier = multipliers.get(parameter, 1.0)
        decays = parameter.ndim > 1
        key = (part if multiplier == 1 else f"{part}*{multiplier:.4g}") + ("" if decays else NO_DECAY)
        decay, rate = arguments.weight_decay if decays else 0.0, rates[part] * multiplier
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_scheduler(optimizer: torch.optim.Optimizer, arguments: TrainingArguments, total_steps: int) -> LRScheduler:
    """ReduceLROnPlateau, stepped with the validation loss after each epoch, or [`cosine`], stepped each step.

    Do not pass it to `accelerator.prepare`, which would step it once per process.

    Args:
        optimizer: the optimizer, not wrapped by Accelerate.
        arguments: flags of the run.
        total_steps: step at which the cosine reaches 0.
    """
    if arguments.lr_scheduler_type == "plateau":
        return ReduceLROnPlateau(optimizer, mode="min", **schedule_details(arguments))
    return LambdaLR(optimizer, cosine(arguments, total_steps))


def cosine(arguments: TrainingArguments, total_steps: int) -> Callable[[int], float]:
    """Factor of the rates at each step: linear warm-up, then 1 for `hold_steps`, then a half-cosine to 0.

    Args:
        arguments: flags of the run.
        total_steps: step at which the factor reaches 0.
    """
    warm_up = arguments.warmup_steps
    start = warm_up + schedule_details(arguments)["hold_steps"]

    def factor_at(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - start) / max(1, total_steps - start)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    return factor_at


def set_length(scheduler: LRScheduler, arguments: TrainingArguments, total_steps: int) -> None:
    """Let a cosine schedule end at a step that was not known at its start; a plateau schedule has no end."""
    if isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [cosine(arguments, total_steps)] * len(scheduler.lr_lambdas)


def apply_flags(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, arguments: TrainingArguments, saved: dict[str, Any]
) -> None:
    """After a checkpoint is loaded, let the flags hold that its optimizer and schedule have overridden.

    A changed rate is applied as a factor, so that what a plateau has lowered stays lowered.

    Args:
        optimizer, scheduler: with the state of the checkpoint.
        arguments: flags of this start of the run.
        saved: flags in the checkpoint.
    """
    factors = {part: rate / saved[f"{part}_learning_rate"] for part, rate in part_rates(arguments).items()}
    parts = [re.split(r"[*_]", group["name"])[0] for group in optimizer.param_groups]
    for group, part in zip(optimizer.param_groups, parts, strict=True):
        group["lr"] *= factors[part]
        group["weight_decay"] = 0.0 if group["name"].endswith(NO_DECAY) else arguments.weight_decay
    if isinstance(scheduler, ReduceLROnPlateau):
        details = schedule_details(arguments)
        scheduler.patience, scheduler.factor = details["patience"], details["factor"]
        return
    scheduler.base_lrs = [rate * factors[part] for rate, part in zip(scheduler.base_lrs, parts, strict=True)]
    assert isinstance(scheduler, LambdaLR)
    now = scheduler.lr_lambdas[0](scheduler.last_epoch)  # its length or its warm-up may have changed
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = rate * now


@torch.no_grad()
def clamp_logit_scale(model: MiniClipModel) -> None:
    """After a step, bring the temperature's parameter back to its bound: beyond it, the gradient is zero."""
    clamp_parameter(model.logit_scale, math.log(model.config.logit_scale_max))
