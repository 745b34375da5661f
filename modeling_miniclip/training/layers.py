"""The layers of a tower from its input to its output: which keep their weights, and which learn how fast."""

from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..modeling_miniclip import MiniClipModel
from .arguments import TrainingArguments


def vision_layers(vision_model: Any) -> list[list[nn.Parameter]]:
    """Parameters of each layer of an image tower, the first being its stem.

    The layers are those that timm's own layer-wise rate decay knows for the architecture (`group_matcher`).

    Args:
        vision_model: `MiniClipVisionModel`.

    Raises:
        UsageError: timm does not tell the layers of this architecture.
    """
    tower = vision_model.timm_model
    try:
        layer_of = group_parameters(tower, tower.group_matcher(coarse=False), reverse=True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"timm does not tell the layers of {type(tower).__name__}: leave out --layer_decay and "
            "--frozen_vision_fraction, or choose another --vision_model"
        ) from error
    layers: list[list[nn.Parameter]] = [[] for _ in range(max(layer_of.values()) + 1)]
    for name, parameter in tower.named_parameters():
        layers[layer_of[name]].append(parameter)
    return [layer for layer in layers if layer]


def text_layers(text_model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each layer of a text tower, the first being its embeddings.

    The layers are the items of the list of modules that holds most parameters; what is registered after it, such as a
    last norm, belongs to its last one.
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


def freeze_first_layers(layers: list[list[nn.Parameter]], share: float) -> None:
    """Let the first layers keep their weights, so that no gradient is computed for them.

    Args:
        layers: of a tower, from its input to its output.
        share: of the layers, in [0, 1); rounded to whole layers, of which the last always learns.
    """
    for layer in layers[: min(round(share * len(layers)), len(layers) - 1)]:
        for parameter in layer:
            parameter.requires_grad_(False)


def rate_multipliers(layers: list[list[nn.Parameter]], decay: float) -> dict[nn.Parameter, float]:
    """What the tower's rate is multiplied with for each parameter: 1 in the last layer, `decay` less in each below.

    Layer-wise rate decay, as in ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2021).
    """
    return {parameter: decay ** (len(layers) - 1 - i) for i, layer in enumerate(layers) for parameter in layer}


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
    if arguments.frozen_vision_fraction:
        freeze_first_layers(vision_layers(model.vision_model), arguments.frozen_vision_fraction)
    if arguments.frozen_text_fraction:
        freeze_first_layers(text_layers(model.text_model), arguments.frozen_text_fraction)
