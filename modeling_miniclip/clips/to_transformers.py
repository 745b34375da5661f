"""A model as one of transformers' own CLIP classes, with its processor: `miniclip convert --to transformers`."""

import copy
import math
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from ..errors import ModelError
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .families import FAMILIES

# Types of the two towers in each family; any other pair of transformers' towers is a dual encoder.
PAIRS = {
    ("clip_vision_model", "clip_text_model"): "clip",
    ("siglip_vision_model", "siglip_text_model"): "siglip",
    ("altclip_vision_model", "altclip_text_model"): "altclip",
    ("chinese_clip_vision_model", "chinese_clip_text_model"): "chinese_clip",
}
DUAL_ENCODER = "vision-text-dual-encoder"
PROCESSORS = {
    "clip": ("CLIPImageProcessor", "CLIPProcessor"),
    "siglip": ("SiglipImageProcessor", "SiglipProcessor"),
    "altclip": ("CLIPImageProcessor", "AltCLIPProcessor"),
    "chinese_clip": ("ChineseCLIPImageProcessor", "ChineseCLIPProcessor"),
    DUAL_ENCODER: ("CLIPImageProcessor", "VisionTextDualEncoderProcessor"),
}


def save_for_transformers(model: MiniClipModel, processor: MiniClipProcessor, folder: Path) -> None:
    """Write a model that transformers loads without code of this package.

    Args:
        model: model whose towers and heads are those of one of the families.
        processor: its processor.
        folder: existing folder to write to.

    Raises:
        ModelError: no class of transformers computes what the model computes; the message says why.
    """
    family = family_of(model)
    config, values = model.config, {}
    if FAMILIES[family].has_heads:
        values["projection_dim"] = config.projection_dim
    config_class = getattr(transformers, FAMILIES[family].model_class.replace("Model", "Config"))
    towers = {name: getattr(config, name).to_dict() for name in ("text_config", "vision_config")}
    original = getattr(transformers, FAMILIES[family].model_class)(config_class(**towers, **values))
    expected = original.state_dict()
    weights = {}
    for name, value in bounded_weights(model).items():
        name = name.replace("_projection.linear.", "_projection.")
        weights[name] = value.reshape(expected[name].shape) if name in ("logit_scale", "logit_bias") else value
    wrong = original.load_state_dict(weights, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        names = ", ".join([*wrong.missing_keys, *wrong.unexpected_keys][:3])
        raise ModelError(
            f"not converted: expected the weights of {type(original).__name__}, but these differ: {names}"
        )
    original.save_pretrained(folder)
    _save_processor(processor, family, folder)


def family_of(model: MiniClipModel) -> str:
    """The family whose class computes what this model computes.

    Raises:
        ModelError: there is none; the message says why.
    """
    config = model.config
    if config.vision_config.model_type == "timm_wrapper":
        raise no_class(f"its image tower {config.vision_config.architecture} is one of timm")
    family = PAIRS.get((config.vision_config.model_type, config.text_config.model_type), DUAL_ENCODER)
    expected = FAMILIES[family]
    poolings = {expected.text_pooling} | ({"pooler"} if expected.text_pooling == "eos" else set())
    if config.text_pooling not in poolings or config.vision_pooling not in (None, "pooler"):
        raise no_class(
            f"its vision_pooling is {config.vision_pooling!r} and its text_pooling {config.text_pooling!r}; those of "
            f"{expected.model_class} are 'pooler' and {expected.text_pooling!r}"
        )
    depth = int(expected.has_heads)
    for name in ("visual_projection", "text_projection"):
        parts = dict(getattr(model, name).named_parameters())
        if parts.keys() != ({"linear.weight"} if depth else set()):
            heads = "linear heads without bias" if depth else "no heads after its towers"
            raise no_class(f"its {name} has {', '.join(parts) or 'no weights'}, and {expected.model_class} {heads}")
    if expected.is_sigmoid != (model.logit_bias is not None):
        bias = "a" if expected.is_sigmoid else "no"
        raise no_class(f"{expected.model_class} has {bias} bias of the logits, other than this model")
    return family


def no_class(reason: str) -> ModelError:
    """The error that says why a model does not fit."""
    return ModelError(f"cannot be converted for transformers: {reason}")


def bounded_weights(model: MiniClipModel) -> dict[str, Tensor]:
    """The weights, with the temperature that the model really uses: its own bound is unknown elsewhere."""
    weights = model.state_dict()
    bound = math.log(model.config.logit_scale_max)
    return weights | {"logit_scale": weights["logit_scale"].clamp(max=bound)}


def _save_processor(processor: MiniClipProcessor, family: str, folder: Path) -> None:
    images = processor.image_processor
    settings: dict[str, Any] = {
        name: copy.copy(getattr(images, name))
        for name in ("size", "resample", "rescale_factor", "image_mean", "image_std", "do_resize")
    }
    settings["size"] = {key: value for key, value in dict(images.size).items() if value is not None}
    image_class, processor_class = PROCESSORS[family]
    if family == "siglip":
        crop = {key: value for key, value in dict(images.crop_size).items() if value is not None}
        if settings["size"] != crop:
            raise no_class(f"SiglipImageProcessor does not crop pictures, as this one does to {crop}")
    else:
        settings["crop_size"] = {key: value for key, value in dict(images.crop_size).items() if value is not None}
    tokenizer = copy.deepcopy(processor.tokenizer)
    if family == "siglip":  # its text tower sees the padding
        tokenizer.model_input_names = ["input_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    image_processor = getattr(transformers, image_class)(**settings)
    getattr(transformers, processor_class)(image_processor, tokenizer).save_pretrained(folder)
