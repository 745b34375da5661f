"""The layers of a tower, from its input to its output: freezing, learning rates and training mode."""

from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import UsageError
from ...modeling_miniclip import MiniClipModel
from ..command_line.arguments import TrainingArguments


def vision_layers(vision_model: Any) -> list[list[nn.Parameter]]:
    """Parameters of each layer of an image tower, starting with the stem.

    The layers of a timm model are those of its layer-wise learning-rate decay (`group_matcher`); those of a tower of
    transformers are found as for a text tower, so a Swin or ResNet has one for each stage.

    Args:
        vision_model: the tower of a `MiniClipModel`.

    Raises:
        UsageError: timm does not know the layers of this architecture.
    """
    if not hasattr(vision_model, "timm_model"):
        return text_layers(vision_model)
    tower = vision_model.timm_model
    try:
        layer_of = group_parameters(tower, tower.group_matcher(coarse=False), reverse=True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"timm does not know the layers of {type(tower).__name__}: leave out --layer_decay and "
            "--frozen_vision_fraction, or choose another --vision_model"
        ) from error
    layers: list[list[nn.Parameter]] = [[] for _ in range(max(layer_of.values()) + 1)]
    for name, parameter in tower.named_parameters():
        layers[layer_of[name]].append(parameter)
    return [layer for layer in layers if layer]


def knows_layers(vision_model: Any) -> bool:
    """Whether the layers of an image tower are known; timm does not know those of all its models."""
    try:
        vision_layers(vision_model)
    except UsageError:
        return False
    return True


def text_layers(text_model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each layer of a text tower, starting with the embeddings.

    The layers are the items of the `ModuleList` with the most parameters. Parameters registered after it, such as
    those of a final norm, belong to the last layer.
    """
    lists = [module for module in text_model.modules() if isinstance(module, nn.ModuleList)]
    stack = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=nn.ModuleList())
    layers: list[list[nn.Parameter]] = [[], *(list(block.parameters()) for block in stack)]
    known = {id(parameter) for layer in layers for parameter in layer}
    place = 0
    for parameter in text_model.parameters():
        if id(parameter) in known:
            place = -1
        else:
            layers[place].append(parameter)
    return [layer for layer in layers if layer]


def freeze_layers(model: MiniClipModel, arguments: TrainingArguments) -> None:
    """Freeze the weights of whole towers and of first layers, as the flags say, and weights that are never used.

    Raises:
        UsageError: timm does not know the layers of the image tower.
    """
    for name, parameter in model.vision_model.named_parameters():
        if name.endswith("mask_token"):  # of DINOv2 and others, for their pretraining; DDP would wait for its gradient
            parameter.requires_grad_(False)
    for tower in frozen_towers(model, arguments.freeze):
        tower.requires_grad_(False)
    if arguments.frozen_vision_fraction:
        freeze_first_layers(vision_layers(model.vision_model), arguments.frozen_vision_fraction)
    if arguments.frozen_text_fraction:
        freeze_first_layers(text_layers(model.text_model), arguments.frozen_text_fraction)


def frozen_towers(model: MiniClipModel, freeze: str) -> list[nn.Module]:
    """The towers that `--freeze` freezes."""
    towers = {"none": [], "vision": ["vision_model"], "text": ["text_model"], "both": ["vision_model", "text_model"]}
    return [getattr(model, name) for name in towers[freeze]]


def freeze_first_layers(layers: list[list[nn.Parameter]], fraction: float) -> None:
    """Freeze the first layers, so that no gradient is computed for them.

    Args:
        layers: parameters of each layer of a tower, from its input to its output.
        fraction: fraction of the layers to freeze, in [0, 1); rounded to whole layers; the last layer is never frozen.
    """
    for layer in layers[: min(round(fraction * len(layers)), len(layers) - 1)]:
        for parameter in layer:
            parameter.requires_grad_(False)


def rate_multipliers(layers: list[list[nn.Parameter]], decay: float) -> dict[nn.Parameter, float]:
    """Factor of the tower's learning rate for each parameter: 1 in the last layer, times `decay` for each layer below.

    Layer-wise learning-rate decay, as in ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2021).

    Args:
        layers: parameters of each layer of a tower, from its input to its output.
        decay: factor between neighbouring layers, in (0, 1].
    """
    return {parameter: decay ** (len(layers) - 1 - i) for i, layer in enumerate(layers) for parameter in layer}


def set_training_mode(model: MiniClipModel, freeze: str, freeze_batch_norm: bool) -> None:
    """Put the model into training mode, but frozen towers and, if asked for, batch norms into evaluation mode."""
    model.train()
    for tower in frozen_towers(model, freeze):
        tower.eval()
    if freeze_batch_norm:
        for module in model.vision_model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
