"""CLIP models of transformers: for each family, where its parts go in a `MiniClipModel`. Weights move by name."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import SiglipVisionConfig

from ..configuration_miniclip import MiniClipConfig

LARGEST_SCALE = {False: 100.0, True: 1000.0}  # of the inverse temperature, for CLIP's loss and for SigLIP's


@dataclass(frozen=True)
class Family:
    """How the models of one type are built.

    Args:
        model_class: name of the class in transformers.
        text_pooling: value of `text_pooling` that gives the same text feature.
        has_heads: whether linear heads without bias follow the towers; the towers of SigLIP contain theirs.
        is_sigmoid: whether the loss is SigLIP's, the logits have a bias, and texts are padded to a fixed length that
            the text tower sees.
    """

    model_class: str
    text_pooling: str
    has_heads: bool = True
    is_sigmoid: bool = False


FAMILIES = {
    "clip": Family("CLIPModel", "eos"),
    "siglip": Family("SiglipModel", "pooler", has_heads=False, is_sigmoid=True),
    "siglip2": Family("Siglip2Model", "pooler", has_heads=False, is_sigmoid=True),
    "altclip": Family("AltCLIPModel", "pooler"),
    "chinese_clip": Family("ChineseCLIPModel", "cls"),
    "vision-text-dual-encoder": Family("VisionTextDualEncoderModel", "pooler"),
}


def load_original(kind: str, source: str) -> tuple[Any, list[str]]:
    """The original model in float32 and evaluation mode, and the names of the weights that its files lack.

    Args:
        kind: key of `FAMILIES`.
        source: folder of the model, or its repository on the Hub.

    Raises:
        OSError: the files cannot be read, or hold pickled weights only.
        RuntimeError: weights have other shapes than the configuration says.
    """
    model_class = getattr(transformers, FAMILIES[kind].model_class)
    model, info = model_class.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model.eval(), sorted(info["missing_keys"])


def miniclip_config(original: Any, pad_token_id: int, text_length: int) -> MiniClipConfig:
    """The configuration that computes what the original model computes.

    Args:
        original: model of one of the `FAMILIES`.
        pad_token_id: padding token of its tokenizer.
        text_length: longest text in tokens, to which a sigmoid model pads all texts.

    Raises:
        ValueError: a tower is of a kind that a `MiniClipModel` does not take.
    """
    config, family = original.config, FAMILIES[original.config.model_type]
    vision, text = config.vision_config, config.text_config.to_dict()
    if config.model_type == "siglip2":  # its towers are those of SigLIP but for the shapes of pictures
        vision, text["model_type"] = fixed_size_vision(vision), "siglip_text_model"
    if family.is_sigmoid:
        text["pad_token_id"] = pad_token_id
    return MiniClipConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        vision_pooling="pooler",
        text_pooling=family.text_pooling,
        text_length=text_length if family.is_sigmoid else None,
        projection_dim=config.projection_dim if family.has_heads else config.text_config.projection_size,
        projection_depth=int(family.has_heads),
        loss_type="sigmoid" if family.is_sigmoid else "softmax_sum",
        logit_scale_max=largest_scale(original.logit_scale, family.is_sigmoid),
    )


def largest_scale(logit_scale: Tensor, is_sigmoid: bool) -> float:
    """Bound of the inverse temperature: CLIP's 100, more for SigLIP, never less than the model already has."""
    return max(LARGEST_SCALE[is_sigmoid], math.exp(float(logit_scale.detach())) * (1 + 1e-6))


def miniclip_weights(original: Any) -> dict[str, Tensor]:
    """The weights of the original under the names of a `MiniClipModel`."""
    weights = {}
    for name, tensor in original.state_dict().items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            name = name.replace(".weight", ".linear.weight")
        elif name in ("logit_scale", "logit_bias"):
            tensor = tensor.reshape(1)
        elif name == "vision_model.embeddings.patch_embedding.weight" and tensor.ndim == 2:
            tensor = patches_to_convolution(tensor, original.config.vision_config.patch_size)
        weights[name] = tensor
    return weights


def fixed_size_vision(config: Any) -> SiglipVisionConfig:
    """SigLIP 2's image tower for pictures of any shape, at the square size of its table of positions."""
    side = math.isqrt(config.num_patches)
    if side**2 != config.num_patches:
        raise ValueError(f"its {config.num_patches} position embeddings are no square, so it has no fixed size")
    shared = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
              "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"}  # fmt: skip
    values = {name: value for name, value in config.to_dict().items() if name in shared}
    return SiglipVisionConfig(**values, image_size=side * config.patch_size)


def patches_to_convolution(weight: Tensor, patch_size: int) -> Tensor:
    """A linear layer over flattened patches `[width, rows * columns * channels]` as a convolution's weight."""
    return weight.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).contiguous()
