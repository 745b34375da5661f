"""A model in open_clip's layout: `miniclip convert --to open_clip`."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.image_utils import PILImageResampling

from ..errors import MiniClipError, ModelError
from ..evaluation.encoders import OPEN_CLIP_FILE
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .from_open_clip import WEIGHTS, split_weights
from .open_clip_towers import HF_POOLINGS, RESNETS, hugging_face_tower, image_tower, text_tower
from .to_transformers import bounded_weights

ACTIVATIONS: dict[str, dict[str, Any]] = {"gelu": {}, "quick_gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
WIDTHS = {"resnet50x4_clip": 1.25, "resnet50x16_clip": 1.5, "resnet50x64_clip": 2.0}  # relative to ResNet-50
CLIP_VOCABULARY = 49408
OWN_TOWERS = ("clip_vision_model", "clip_text_model", "siglip_text_model")  # as open_clip builds them itself
HF_TOWERS = ("bert", "roberta", "xlm-roberta")  # as open_clip builds them from their name on the Hub


def save_for_open_clip(model: MiniClipModel, processor: MiniClipProcessor, folder: Path) -> None:
    """Write a model that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

    Args:
        model: model whose towers and heads open_clip has.
        processor: its processor.
        folder: existing folder to write to.

    Raises:
        ModelError: open_clip has no model that computes what this one computes; the message says why.
        MiniClipError: open_clip is not installed, which is needed to compare the result.
    """
    if find_spec("open_clip") is None:
        raise MiniClipError("--to open_clip compares the result with open_clip: pip install open-clip-torch")
    cfg = {"model_cfg": model_cfg(model, processor), "preprocess_cfg": preprocess_cfg(processor)}
    (folder / OPEN_CLIP_FILE).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(folder)
    open_clip: Any = import_module("open_clip")
    original = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    weights = open_clip_weights(model, cfg["model_cfg"], original.state_dict())
    save_file(weights, folder / WEIGHTS[0], {"format": "pt"})


def open_clip_weights(model: MiniClipModel, cfg: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights by open_clip's names.

    The way here is known from the other direction: numbers that stand for single weights go through it, and where
    they arrive, the weights are taken.

    Args:
        model: model to convert.
        cfg: `model_cfg` of the result.
        like: weights of a model of open_clip of this configuration.

    Raises:
        ModelError: open_clip's model has other weights.
    """
    numbers, start = {}, 0
    for name, value in like.items():
        numbers[name] = torch.arange(start, start + value.numel(), dtype=torch.int32).reshape(value.shape)
        start += value.numel()
    visual, text = split_weights(numbers)
    prefix = "timm_model." if model.config.vision_config.model_type == "timm_wrapper" else ""
    places: dict[str, Tensor] = {
        name: numbers[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in numbers
    }
    if cfg["text_cfg"].get("hf_model_name"):
        text_side = hugging_face_tower(cfg, model.config.text_config, text)
    else:
        text_side = text_tower(cfg, text, 0, None)
    for side, head, tower in (
        (f"vision_model.{prefix}", "visual_projection", image_tower(cfg, visual)),
        ("text_model.", "text_projection", text_side),
    ):
        places |= {f"{side}{name}": value for name, value in tower.weights.items()}
        places |= {f"{head}.{name}": value for name, value in tower.head.items()}
    weights = bounded_weights(model)
    wrong = [name for name in {*places, *weights} if getattr(places.get(name), "shape", None) != getattr(
        weights.get(name), "shape", None)]  # fmt: skip
    if wrong:
        raise no_counterpart(f"its model of these towers has other weights: {', '.join(sorted(wrong)[:3])}")
    flat = torch.empty(start)
    for name, value in weights.items():
        flat[places[name].reshape(-1).long()] = value.detach().float().cpu().reshape(-1)
    return {
        name: flat[number.reshape(-1).long()].reshape(number.shape).to(like[name].dtype).contiguous()
        for name, number in numbers.items()
    }


def model_cfg(model: MiniClipModel, processor: MiniClipProcessor) -> dict[str, Any]:
    """`model_cfg` of a model.

    Raises:
        ModelError: open_clip has no such model; the message says why.
    """
    config = model.config
    cfg: dict[str, Any] = {"embed_dim": config.projection_dim}
    if model.logit_bias is not None:
        cfg["init_logit_bias"] = config.logit_bias_init_value
    towers = [tower for tower in (config.vision_config, config.text_config) if tower.model_type in OWN_TOWERS]
    quick = {tower.hidden_act == "quick_gelu" for tower in towers}
    if len(quick) > 1:
        raise no_counterpart("one tower has the activation quick_gelu and the other one has not")
    if True in quick:
        cfg["quick_gelu"] = True
    return cfg | {"vision_cfg": _vision_cfg(model), "text_cfg": _text_cfg(model, processor)} | (
        {"custom_text": True} if config.text_config.model_type == "siglip_text_model" else {}
    )  # fmt: skip


def preprocess_cfg(processor: MiniClipProcessor) -> dict[str, Any]:
    """`preprocess_cfg` of a processor.

    Raises:
        ModelError: open_clip has no such preprocessing.
    """
    images = processor.image_processor
    size = {key: value for key, value in dict(images.size).items() if value is not None}
    crop = {key: value for key, value in dict(images.crop_size).items() if value is not None}
    names = {PILImageResampling.BICUBIC: "bicubic", PILImageResampling.BILINEAR: "bilinear"}
    if size not in (crop, {"shortest_edge": crop["height"]}) or crop["height"] != crop["width"]:
        raise no_counterpart(f"it cannot resize pictures to {size} and crop them to {crop}")
    if images.resample not in names:
        raise no_counterpart(f"it does not resize pictures by {PILImageResampling(images.resample).name.lower()}")
    return {
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": names[images.resample],
        "resize_mode": "squash" if size == crop else "shortest",
    }


def no_counterpart(reason: str) -> ModelError:
    """The error that says why a model does not fit."""
    return ModelError(f"cannot be converted for open_clip: {reason}")


def _vision_cfg(model: MiniClipModel) -> dict[str, Any]:
    tower, head = model.config.vision_config, dict(model.visual_projection.named_parameters())
    if tower.model_type == "timm_wrapper":
        return _timm_cfg(model, head)
    if tower.model_type != "clip_vision_model" or model.config.vision_pooling not in (None, "pooler"):
        raise no_counterpart(f"it has no image tower of type {tower.model_type} with {model.config.vision_pooling!r}")
    if head.keys() != {"linear.weight"}:
        raise no_counterpart("its vision transformer ends in a linear head without bias, other than this one")
    return {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        **_transformer_cfg(tower),
        "head_width": tower.hidden_size // tower.num_attention_heads,
    }


def _timm_cfg(model: MiniClipModel, head: dict[str, Any]) -> dict[str, Any]:
    tower = model.config.vision_config
    size, args = tower.pretrained_cfg["input_size"][-1], dict(tower.model_args or {})
    layers = next((layers for layers, name in RESNETS.items() if name == tower.architecture), None)
    if layers is not None and head.keys() == {"linear.weight", "linear.bias"}:
        width = round(64 * args.get("width_factor", WIDTHS.get(tower.architecture, 1.0)))
        return {"image_size": size, "layers": list(layers), "width": width, "head_width": 64}
    if args.keys() - {"global_pool"}:
        raise no_counterpart(f"it builds image towers of timm by their name alone, without {', '.join(args)}")
    hidden = {"hidden.weight", "hidden.bias"} if "hidden.weight" in head else set()
    units = 2 * model.config.projection_dim
    if head.keys() - hidden - {"linear.weight", "linear.bias"} or (hidden and len(head["hidden.weight"]) != units):
        raise no_counterpart(f"its image heads are linear, or have a hidden layer of {units} units with bias")
    if hidden and not hidden <= head.keys():
        raise no_counterpart("the hidden layer of its image heads has a bias")
    return {
        "image_size": size,
        "timm_model_name": tower.architecture,
        "timm_model_pretrained": False,
        "timm_pool": args.get("global_pool", ""),
        "timm_proj": "mlp" if hidden else "linear" if head else "none",
        "timm_proj_bias": "linear.bias" in head,
    }


def _text_cfg(model: MiniClipModel, processor: MiniClipProcessor) -> dict[str, Any]:
    config, tower = model.config, model.config.text_config
    head = dict(model.text_projection.named_parameters())
    if tower.model_type not in OWN_TOWERS:
        return _hugging_face_cfg(model, processor, head)
    cfg = {"context_length": tower.max_position_embeddings, "vocab_size": tower.vocab_size}
    if tower.vocab_size != CLIP_VOCABULARY or type(processor.tokenizer).__name__ != "CLIPTokenizer":
        cfg["hf_tokenizer_name"] = "./"  # open_clip takes the files in the model's folder
    if tower.model_type == "siglip_text_model" and config.text_pooling == "pooler" and not head:
        rest = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    elif tower.model_type == "clip_text_model" and config.text_pooling in ("eos", "pooler"):
        if head.keys() not in ({"linear.weight"}, {"linear.weight", "linear.bias"}):
            raise no_counterpart("its text head is no single linear layer")
        is_highest = tower.eos_token_id in (2, tower.vocab_size - 1)
        rest = {"pool_type": "argmax"} if is_highest else {"pool_type": "eos", "eos_id": tower.eos_token_id}
        rest |= {"proj_bias": True} if "linear.bias" in head else {}
    else:
        raise no_counterpart(
            f"the text towers of CLIP and SigLIP can be written with their own pooling, not {tower.model_type} with "
            f"text_pooling {config.text_pooling!r}"
        )
    return cfg | _transformer_cfg(tower) | {"heads": tower.num_attention_heads} | rest


def _hugging_face_cfg(model: MiniClipModel, processor: MiniClipProcessor, head: dict[str, Any]) -> dict[str, Any]:
    tower, pooling = model.config.text_config, model.config.text_pooling
    poolers = {value: name for name, value in HF_POOLINGS.items()}
    if tower.model_type not in HF_TOWERS:
        raise no_counterpart(
            f"it has no text tower of type {tower.model_type}; expected {', '.join((*OWN_TOWERS[1:], *HF_TOWERS))}"
        )
    if not tower.name_or_path:
        raise no_counterpart(
            f"it builds a text tower such as {tower.model_type} by its name on the Hub, which this model does not have"
        )
    if pooling not in poolers or model.config.text_length is not None:
        raise no_counterpart(f"it pools the texts of {tower.model_type} by {', '.join(poolers)}, not by {pooling!r}")
    units = (model.text_width + model.config.projection_dim) // 2
    kinds = {(): None, ("linear.weight",): "linear", ("hidden.weight", "linear.weight"): "mlp"}
    names = tuple(sorted(head))
    if names not in kinds or ("hidden.weight" in head and len(head["hidden.weight"]) != units):
        raise no_counterpart(f"its text heads have no biases, and are linear or have a hidden layer of {units} units")
    return {
        "hf_model_name": tower.name_or_path,
        "hf_tokenizer_name": "./",
        "hf_proj_type": kinds[names],
        "hf_pooler_type": poolers[pooling],
        "context_length": processor.tokenizer.model_max_length,
    }


def _transformer_cfg(tower: Any) -> dict[str, Any]:
    if tower.hidden_act not in ACTIVATIONS:
        raise no_counterpart(f"it has no activation {tower.hidden_act}")
    cfg = {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
    }
    if ACTIVATIONS[tower.hidden_act]:
        cfg["act_kwargs"] = ACTIVATIONS[tower.hidden_act]
    if tower.layer_norm_eps != 1e-5:
        cfg["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return cfg
