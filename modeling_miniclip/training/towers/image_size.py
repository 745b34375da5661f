"""Give a trained model an image tower for images of another size, with position embeddings resized as timm does."""

import math
from copy import deepcopy
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ...modeling_miniclip import MiniClipModel


def with_image_size(model: MiniClipModel, size: int) -> MiniClipModel:
    """A model whose image tower takes square images of another size; all other weights stay as they are.

    Args:
        model: model whose image tower takes images of one size; it is not changed.
        size: pixels per side of the images.

    Returns:
        The model in evaluation mode; its configuration has the new size.

    Raises:
        ValueError: the tower has no position embeddings that can be resized, or the size is too small for it.
    """
    config = deepcopy(model.config)
    if config.vision_config.model_type == "timm_wrapper":
        tower = _resized_timm(model.vision_model.timm_model, config.vision_config, size)
        resized, weights = MiniClipModel(config), model.state_dict()
        weights |= {f"vision_model.timm_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    else:
        config.vision_config.image_size = size
        resized = MiniClipModel(config)
        weights = _resized_weights(model, resized)
    resized.load_state_dict(weights)
    return resized.eval()


def _resized_timm(tower: Any, config: Any, size: int) -> Any:
    """A copy of a timm tower for images of another size, which is entered into its configuration."""
    if not hasattr(tower, "set_input_size"):
        raise ValueError(f"timm cannot resize {config.architecture}")
    tower = deepcopy(tower)
    tower.set_input_size(img_size=(size, size))
    config.model_args = (config.model_args or {}) | {"img_size": size}
    if config.pretrained_cfg:
        config.pretrained_cfg = config.pretrained_cfg | {"input_size": [3, size, size]}
    return tower


def _resized_weights(model: MiniClipModel, resized: MiniClipModel) -> dict[str, Tensor]:
    """Weights for the resized model: those of the model, with its position embeddings resized."""
    old, new = (_grid(one.config.vision_config) for one in (model, resized))
    weights = model.state_dict()
    for name, expected in resized.state_dict().items():
        found = weights[name]
        if found.shape != expected.shape:
            weights[name] = _resized_positions(name, found, expected, old, new)
    return weights


def _grid(config: Any) -> int:
    """Number of patches along each side of an image."""
    sizes = (config.image_size, getattr(config, "patch_size", 1))
    image, patch = (size if isinstance(size, int) else size[0] for size in sizes)
    return int(image // patch)


def _resized_positions(name: str, found: Tensor, expected: Tensor, old: int, new: int) -> Tensor:
    """Position embeddings `[positions, width]` or `[1, positions, width]` for another number of patches.

    Those of other tokens, such as the class token, come first and stay as they are.
    """
    positions = found.shape[-2] if found.ndim > 1 else 0
    others = positions - old**2
    fits = found.ndim == expected.ndim and math.prod(found.shape[:-2]) == 1 and found.shape[-1] == expected.shape[-1]
    if "position_embedding" not in name or not fits or others < 0 or expected.shape[-2] != new**2 + others:
        raise ValueError(f"{name} cannot be resized")
    table = found.reshape(1, positions, -1)
    return resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=others).reshape(expected.shape)
