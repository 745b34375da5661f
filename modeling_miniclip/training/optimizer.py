"""What a step of training needs beside the loss: modes, parameter groups, schedule and the temperature's bound."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .arguments import TrainingArguments
from .diagnostics import not_finite
from .distributed import own_part
from .layers import freeze_first_layers, rate_multipliers, text_layers, vision_layers

# With four groups 256 captions of Flickr8k take 18 tokens each, with one 30: the longest of a batch sets the length.
TEXT_GROUPS = 4


def forward_inputs(batch: dict[str, Tensor], processor: MiniClipProcessor, device: torch.device) -> dict[str, Tensor]:
    """A collated batch on the device, as keyword arguments of the model: pixels normalised, ids left out."""
    names = ("pixel_values", "input_ids", "attention_mask", "vision_pooler_output", "text_pooler_output")
    inputs = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
    if "pixel_values" in inputs:
        pixels = processor.normalize(inputs["pixel_values"])
        inputs["pixel_values"] = pixels.contiguous(memory_format=torch.channels_last)
    return inputs


def set_training_mode(model: MiniClipModel, freeze: str, freeze_batch_norm: bool) -> None:
    """Training mode, but evaluation mode for what keeps its state: frozen towers and frozen batch-norm statistics."""
    model.train()
    for tower in frozen_towers(model, freeze):
        tower.eval()
    if freeze_batch_norm:
        for module in model.vision_model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def frozen_towers(model: MiniClipModel, freeze: str) -> list[nn.Module]:
    """The towers that `--freeze` names."""
    towers = {"none": [], "vision": ["vision_model"], "text": ["text_model"], "both": ["vision_model", "text_model"]}
    return [getattr(model, name) for name in towers[freeze]]


def freeze_layers(model: MiniClipModel, arguments: TrainingArguments) -> None:
    """Let the frozen towers and the first layers of the others keep their weights.

    Raises:
        UsageError: timm does not tell the layers of the image tower.
    """
    for tower in frozen_towers(model, arguments.freeze):
        tower.requires_grad_(False)
    if arguments.frozen_vision_layers:
        freeze_first_layers(vision_layers(model.vision_model), arguments.frozen_vision_layers)
    if arguments.frozen_text_layers:
        freeze_first_layers(text_layers(model.text_model), arguments.frozen_text_layers)


def parameter_groups(model: MiniClipModel, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """AdamW's groups: a learning rate a part and layer, weight decay for matrices only (no norm, bias or temperature).

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`: `heads`, `vision`, `text`, for the layers below a
        tower's last one with the multiplier of their rate (`vision*0.8`), and `_no_decay` where that is so. Groups
        without a trainable parameter are left out.

    Raises:
        UsageError: with `--layer_decay`, timm does not tell the layers of the image tower.
    """
    rates = {
        "vision": arguments.vision_learning_rate,
        "text": arguments.text_learning_rate,
        "heads": arguments.learning_rate,
    }
    parts = {"vision_model": "vision", "text_model": "text"}
    multipliers: dict[Parameter, float] = {}
    if arguments.layer_decay != 1:
        for layers in (vision_layers(model.vision_model), text_layers(model.text_model)):
            multipliers |= rate_multipliers(layers, arguments.layer_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.get(name.partition(".")[0], "heads")
        multiplier = multipliers.get(parameter, 1.0)
        decays = parameter.ndim > 1
        key = (part if multiplier == 1 else f"{part}*{multiplier:.4g}") + ("" if decays else "_no_decay")
        decay, rate = arguments.weight_decay if decays else 0.0, rates[part] * multiplier
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_scheduler(optimizer: torch.optim.Optimizer, arguments: TrainingArguments, total_steps: int) -> LRScheduler:
    """ReduceLROnPlateau, stepped by the validation loss each epoch, or cosine with warm-up, stepped each step.

    It is not given to `accelerator.prepare`, which would step it once per process.
    """
    if arguments.lr_scheduler_type == "plateau":
        patience, factor = arguments.lr_plateau_patience, arguments.lr_plateau_factor
        return ReduceLROnPlateau(optimizer, mode="min", patience=patience, factor=factor)

    def factor_at(step: int) -> float:
        if step < arguments.warmup_steps:
            return (step + 1) / arguments.warmup_steps
        progress = (step - arguments.warmup_steps) / max(1, total_steps - arguments.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor_at)


@torch.no_grad()
def clamp_temperature(model: MiniClipModel) -> None:
    """Bring the parameter back to its bound after a step, so that a later gradient finds it there."""
    model.logit_scale.clamp_(max=math.log(model.config.logit_scale_max))


@torch.no_grad()
def check_weights(model: MiniClipModel, accelerator: Any) -> None:
    """Make sure that what is going to be saved are numbers; every process has to ask, and gets the same answer.

    Raises:
        MiniClipError: a parameter holds NaN or infinity, in any process.
    """
    wrong = torch.stack([~own_part(parameter).isfinite().all() for parameter in model.parameters()]).any()
    if accelerator.reduce(wrong.int(), "sum").item():
        raise not_finite("weights", math.nan, accelerator.mixed_precision)
