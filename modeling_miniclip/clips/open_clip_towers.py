"""The towers of open_clip as towers of timm and transformers: configuration, and names of the weights."""

import re
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Tower(NamedTuple):
    """One side of a model.

    Args:
        config: `vision_config` or `text_config` of the `MiniClipConfig`.
        pooling: value of `vision_pooling` or `text_pooling`.
        weights: weights of the tower by the names of the `MiniClipModel`'s tower.
        head: weights of the head by the names of a `ProjectionHead`; empty if there is no head.
        text_length: tokens to which all texts are padded, if the tower sees the padding.
    """

    config: dict[str, Any]
    pooling: str
    weights: Weights
    head: Weights
    text_length: int | None = None


# What these towers can do and CLIP's of transformers cannot; any other value of a switch is an error.
PLAIN = {
    "ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "final_ln_after_pool": False,
    "pos_embed_type": "learnable", "output_tokens": False, "block_type": None, "qk_norm": False,
    "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False,
    "scale_fc": False, "embed_cls": False,
}  # fmt: skip
RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}
RESNET_PARTS = {
    r"^(conv|bn)(\d)\.": lambda m: f"stem.conv{m[2]}.{m[1]}.",
    r"^layer(\d)\.(\d+)\.downsample\.0\.": lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.conv.conv.",
    r"^layer(\d)\.(\d+)\.downsample\.1\.": lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.conv.bn.",
    r"^layer(\d)\.(\d+)\.(conv|bn)(\d)\.": lambda m: (
        f"stages.{int(m[1]) - 1}.{m[2]}.{('conv1_1x1', 'conv2_kxk', 'conv3_1x1')[int(m[4]) - 1]}.{m[3]}."
    ),
    r"^attnpool\.positional_embedding$": lambda m: "head.pos_embed",
    r"^attnpool\.([qkv])_proj\.": lambda m: f"head.{m[1]}.",
}
BLOCK_PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
               "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
VISION_PARTS = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
                "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
TEXT_PARTS = {"token_embedding.weight": "embeddings.token_embedding.weight",
              "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
NORMS = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm"}
LINEAR = ("linear.weight",)
HEADS = {"linear": LINEAR, "mlp": ("hidden.weight", *LINEAR)}  # weights of a projection head, by its type
HF_POOLINGS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}


def image_tower(model_cfg: dict[str, Any], weights: Weights) -> Tower:
    """The image tower of a model of open_clip.

    Args:
        model_cfg: `model_cfg` of its `open_clip_config.json`.
        weights: weights of `visual`, without that prefix.

    Raises:
        ValueError: the tower does something that has no counterpart.
    """
    cfg = model_cfg["vision_cfg"]
    if cfg.get("timm_model_name"):
        return _timm_tower(cfg, weights)
    if isinstance(cfg.get("layers"), list | tuple):
        return _resnet(cfg, weights)
    _check_plain("vision_cfg", cfg)
    if cfg.get("pool_type", "tok") != "tok":
        raise ValueError(f"pool_type {cfg['pool_type']!r} of its image tower has no counterpart; expected 'tok'")
    width, layers = cfg.get("width", 768), cfg.get("layers", 12)
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // cfg.get("head_width", 64),
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "patch_size": cfg.get("patch_size", 16),
        "image_size": square(cfg.get("image_size", 224)),
        **_activation(model_cfg, cfg),
    }
    head = {"linear.weight": weights["proj"].t().contiguous()} if "proj" in weights else {}
    return Tower(config, "pooler", transformer_weights(weights, VISION_PARTS), _complete(head, "visual.proj"))


def text_tower(model_cfg: dict[str, Any], weights: Weights, pad_token_id: int, eos_token_id: int | None) -> Tower:
    """The text tower of a model of open_clip, without one of Hugging Face (see [`hugging_face_tower`]).

    Args:
        model_cfg: `model_cfg` of its `open_clip_config.json`.
        weights: weights of `text`, without that prefix.
        pad_token_id: padding token of the tokenizer.
        eos_token_id: token that ends each text.

    Raises:
        ValueError: the tower does something that has no counterpart.
    """
    cfg = model_cfg["text_cfg"]
    _check_plain("text_cfg", cfg)
    width, vocab_size = cfg.get("width", 512), cfg.get("vocab_size", 49408)
    config = {
        "hidden_size": width,
        "num_hidden_layers": cfg.get("layers", 12),
        "num_attention_heads": cfg.get("heads", 8),
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "vocab_size": vocab_size,
        "max_position_embeddings": cfg.get("context_length", 77),
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
        **_activation(model_cfg, cfg),
    }
    pooling, moved = cfg.get("pool_type", "argmax"), transformer_weights(weights, TEXT_PARTS)
    if cfg.get("no_causal_mask"):
        if pooling != "last" or not cfg.get("proj_bias"):
            raise ValueError("its text tower without a causal mask is not SigLIP's: expected pool_type 'last' and a "
                             "projection with bias")  # fmt: skip
        head = _complete(_head(weights, {"text_projection.": ""}), "text_projection", ("weight", "bias"))
        moved |= {f"head.{name}": value for name, value in head.items()}
        config |= {"model_type": "siglip_text_model", "projection_size": len(moved["head.bias"]), "eos_token_id": None}
        return Tower(config, "pooler", moved, {}, config["max_position_embeddings"])
    if pooling not in ("argmax", "eos"):
        raise ValueError(f"pool_type {pooling!r} of its text tower has no counterpart; expected 'argmax' or 'eos'")
    # CLIP's rule for the highest token goes by the name of an end token 2 in transformers.
    highest = eos_token_id if eos_token_id == vocab_size - 1 else 2
    config |= {"model_type": "clip_text_model", "eos_token_id": cfg.get("eos_id", 2) if pooling == "eos" else highest}
    is_bare = cfg.get("proj_type") == "none"
    return Tower(config, "eos", moved, {} if is_bare else _complete(_text_head(weights), "text_projection"))


def hugging_face_tower(model_cfg: dict[str, Any], text_config: Any, weights: Weights) -> Tower:
    """The text tower of a model of open_clip that comes from Hugging Face.

    Args:
        model_cfg: `model_cfg` of its `open_clip_config.json`.
        text_config: configuration of the text encoder.
        weights: weights of `text`, without that prefix.

    Raises:
        ValueError: the tower does something that has no counterpart.
    """
    cfg = model_cfg["text_cfg"]
    pooler = cfg.get("hf_pooler_type", "mean_pooler")
    if pooler not in HF_POOLINGS:
        raise ValueError(f"hf_pooler_type {pooler!r} has no counterpart; expected one of {', '.join(HF_POOLINGS)}")
    moved = {name.removeprefix("transformer."): value for name, value in weights.items() if "transformer." in name}
    moved = {name: value for name, value in moved.items() if not name.endswith("position_ids")}
    head = _head(weights, {"proj.": "linear.", "proj.0.": "hidden.", "proj.2.": "linear."})
    if (projection := cfg.get("hf_proj_type", "mlp")) is not None:
        head = _complete(head, "text.proj", HEADS[projection])
    has_pooler = any(name.startswith("pooler.") for name in moved)
    pooling = "cls" if pooler == "cls_pooler" and not has_pooler else HF_POOLINGS[pooler]
    return Tower(text_config.to_dict(), pooling, moved, head)


def transformer_weights(weights: Weights, parts: dict[str, str]) -> Weights:
    """Weights of open_clip's transformer by the names of CLIP's in transformers. Projections are left out."""
    moved = {}
    for name, value in weights.items():
        block = re.match(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$|"
                         r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", name)  # fmt: skip
        if name in parts:
            moved[parts[name]] = value
        elif name.split(".")[0] in NORMS:
            norm, part = name.split(".")
            moved[f"{NORMS[norm]}.{part}"] = value
        elif block and block[4]:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                moved[f"encoder.layers.{block[4]}.self_attn.{letter}_proj.{block[5]}"] = third.contiguous()
        elif block:
            moved[f"encoder.layers.{block[1]}.{BLOCK_PARTS.get(block[2], block[2])}.{block[3]}"] = value
        elif name not in ("proj", "text_projection", "text_projection.weight", "text_projection.bias"):
            moved[name] = value  # of a part that the tower lacks, which is reported when the weights are loaded
    return moved


def square(size: Any) -> int:
    """The side of a square image size.

    Raises:
        ValueError: height and width differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"images of {size} pixels are no squares, which is all that can be converted")
    return int(sides.pop())


def _resnet(cfg: dict[str, Any], weights: Weights) -> Tower:
    layers, width, size = tuple(cfg["layers"]), cfg.get("width", 64), square(cfg.get("image_size", 224))
    if layers not in RESNETS or cfg.get("head_width", 64) != 64 or size % 32:
        raise ValueError(f"timm has no ResNet of CLIP with layers {list(layers)} for images of {size} pixels")
    moved = {}
    for name, value in weights.items():
        if not name.startswith("attnpool.c_proj."):
            for pattern, new in RESNET_PARTS.items():
                name = re.sub(pattern, new, name)
            moved[name] = value
    factor = width / 64
    config = _timm_config(RESNETS[layers], size, {"img_size": size, "width_factor": factor})
    head = _complete(_head(weights, {"attnpool.c_proj.": "linear."}), "visual.attnpool.c_proj")
    return Tower(config, "pooler", moved, head)


def _timm_tower(cfg: dict[str, Any], weights: Weights) -> Tower:
    name, pool, projection = cfg["timm_model_name"], cfg.get("timm_pool", "avg"), cfg.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn"):
        raise ValueError(f"timm_pool {pool!r} of its image tower has no counterpart; expected timm's own pooling")
    trunk = _under("trunk.", weights)
    if projection in HEADS:
        head = _head(weights, {"head.proj.": "linear.", "head.mlp.fc1.": "hidden.", "head.mlp.fc2.": "linear."})
        head = _complete(head, "visual.head", HEADS[projection])
    elif projection == "none":
        head = {}
    else:  # timm's classifier is the projection
        classifier = timm.get_pretrained_cfg(name).classifier
        head = _complete(_head(trunk, {f"{classifier}.": "linear."}), f"visual.trunk.{classifier}")
        trunk = {key: value for key, value in trunk.items() if not key.startswith(f"{classifier}.")}
    size = square(cfg.get("image_size", 224))
    return Tower(_timm_config(name, size, {"global_pool": pool} if pool else {}), "pooler", trunk, head)


def _timm_config(name: str, size: int, model_args: dict[str, Any]) -> dict[str, Any]:
    preprocessing = {"input_size": [3, size, size], "fixed_input_size": True}
    known = timm.get_pretrained_cfg(name)
    if known is None:
        raise ValueError(f"timm has no image tower {name!r}")
    return {
        "model_type": "timm_wrapper",
        "architecture": name,
        "model_args": model_args,
        "pretrained_cfg": known.to_dict() | preprocessing,
    }


def _under(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _head(weights: Weights, parts: dict[str, str]) -> Weights:
    """Weights of a head by the names of a `ProjectionHead`: a weight and perhaps a bias of each of its layers."""
    return {
        new + name: weights[old + name] for old, new in parts.items() for name in ("weight", "bias")
        if old + name in weights
    }  # fmt: skip


def _complete(head: Weights, place: str, names: tuple[str, ...] = LINEAR) -> Weights:
    """The head, if it has these weights: a model without a head would load as well where both widths are equal.

    Raises:
        ValueError: a weight is missing.
    """
    if any(name not in head for name in names):
        raise ValueError(f"lacks the weights of the projection {place}; choose a complete model")
    return head


def _text_head(weights: Weights) -> Weights:
    if isinstance(weights.get("text_projection"), torch.Tensor):  # a matrix, which multiplies from the right
        return {"linear.weight": weights["text_projection"].t().contiguous()}
    return _head(weights, {"text_projection.": "linear."})


def _activation(model_cfg: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    # Activation and epsilon of the layer norms.
    options, norm = cfg.get("act_kwargs") or {}, cfg.get("norm_kwargs") or {}
    if options.keys() - {"approximate"} or norm.keys() - {"eps"}:
        raise ValueError(f"act_kwargs {options} or norm_kwargs {norm} have no counterpart")
    name = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    if options.get("approximate") == "tanh" and name == "gelu":
        name = "gelu_pytorch_tanh"
    return {"hidden_act": name, "layer_norm_eps": norm.get("eps", 1e-5)}


def _check_plain(part: str, cfg: dict[str, Any]) -> None:
    for name, value in PLAIN.items():
        if cfg.get(name, value) != value:
            raise ValueError(f"{name} {cfg[name]!r} in its {part} has no counterpart in transformers' CLIP")
