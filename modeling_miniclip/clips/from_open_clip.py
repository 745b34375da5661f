"""A model in open_clip's layout, or of open_clip itself, as a `MiniClipModel` with its processor."""

import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.image_utils import PILImageResampling

from ..configuration_miniclip import MiniClipConfig
from ..evaluation.encoders import OPEN_CLIP, find_open_clip
from ..inference.pickled import reject_pickled
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor, PilImageProcessor, max_text_length
from .families import largest_scale
from .open_clip_tokenizer import tokenizer_of
from .open_clip_towers import Tower, hugging_face_tower, image_tower, square, text_tower
from .source import Source, file_of

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# Where the text tower's weights are in a model without a `text` part.
TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


class OpenClip(NamedTuple):
    """What open_clip knows of a model: how it is built, how pictures are prepared, and its weights."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: dict[str, Tensor]


def convert_open_clip(source: Source) -> tuple[MiniClipModel, MiniClipProcessor]:
    """The model and its processor.

    Args:
        source: a folder or repository with `open_clip_config.json`, or `open_clip:ARCHITECTURE/CHECKPOINT`.

    Raises:
        ModelError: weights are missing or left over.
        ValueError: a part of the model has no counterpart.
        MiniClipError: open_clip has to be installed for this source.
    """
    original = _from_package(source) if source.name.startswith(OPEN_CLIP) else _from_files(source)
    if "multimodal_cfg" in original.model_cfg:
        raise ValueError("a CoCa, whose text decoder has no counterpart")
    images = _image_processor(original)
    visual, text = split_weights(original.weights)
    text_cfg = original.model_cfg["text_cfg"]
    tokenizer = tokenizer_of(source, text_cfg)
    if text_cfg.get("hf_model_name"):
        text_config = AutoConfig.from_pretrained(text_cfg["hf_model_name"], trust_remote_code=False)
        tower = hugging_face_tower(original.model_cfg, text_config, text)
        limit = min(text_cfg.get("context_length", 77), max_text_length(text_config, tokenizer))
    else:
        tower = text_tower(original.model_cfg, text, tokenizer.pad_token_id, tokenizer.eos_token_id)
        limit = text_cfg.get("context_length", 77)
    tokenizer.model_max_length = limit
    model = build(source, original, image_tower(original.model_cfg, visual), tower)
    padding = "max_length" if tower.text_length else True
    return model, MiniClipProcessor(images, tokenizer, text_padding=padding)


def build(source: Source, original: OpenClip, image: Tower, text: Tower) -> MiniClipModel:
    """The model of two converted towers.

    Raises:
        ModelError: weights are missing or left over.
    """
    logit_scale, logit_bias = (original.weights.get(name) for name in ("logit_scale", "logit_bias"))
    if logit_scale is None:
        raise source.error("lacks weights: logit_scale; choose a complete model")
    is_sigmoid = logit_bias is not None
    hidden = [len(tower.head["hidden.weight"]) if "hidden.weight" in tower.head else None for tower in (image, text)]
    hidden_bias = _pair(*("hidden.bias" in tower.head for tower in (image, text)))
    config = MiniClipConfig(
        vision_config=image.config,
        text_config=text.config,
        vision_pooling=image.pooling,
        text_pooling=text.pooling,
        text_length=text.text_length,
        projection_dim=original.model_cfg["embed_dim"],
        projection_depth=_pair(*(int(bool(tower.head)) for tower in (image, text))),
        projection_bias=_pair(*("linear.bias" in tower.head for tower in (image, text))),
        projection_hidden=_pair(*hidden),
        projection_hidden_bias=hidden_bias if any(hidden) else None,
        loss_type="sigmoid" if is_sigmoid else "softmax_sum",
        logit_scale_max=largest_scale(logit_scale, is_sigmoid),
    )
    model = MiniClipModel(config)
    weights = {"logit_scale": logit_scale.reshape(1)}
    if logit_bias is not None:
        weights["logit_bias"] = logit_bias.reshape(1)
    prefix = "timm_model." if config.vision_config.model_type == "timm_wrapper" else ""
    weights |= {f"vision_model.{prefix}{name}": value for name, value in image.weights.items()}
    weights |= {f"text_model.{name}": value for name, value in text.weights.items()}
    for head, tower in (("visual_projection", image), ("text_projection", text)):
        weights |= {f"{head}.{name}": value for name, value in tower.head.items()}
    wrong = model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    for what, names in (("lacks weights", missing), ("weights of no known part", wrong.unexpected_keys)):
        if names:
            raise source.error(f"{what}: {', '.join(sorted(names)[:3])}")
    return model.eval()


def _pair(image: Any, text: Any) -> Any:
    # A value for both heads, or a list of two.
    return image if image == text else [image, text]


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the image tower and of the text tower, without the prefixes `visual` and `text`."""
    visual = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    text = {name.removeprefix("text."): value for name, value in weights.items() if name.startswith("text.")}
    return visual, text or {name: value for name, value in weights.items() if name.startswith(TEXT_PARTS)}


def _from_files(source: Source) -> OpenClip:
    if not isinstance(source.config.get("model_cfg"), dict):
        raise source.error("open_clip_config.json has no model_cfg")
    path = next((path for path in (file_of(source, name) for name in WEIGHTS) if path is not None), None)
    if path is None:
        reject_pickled(source.flag, source.name)
        raise source.error(f"no weights; expected {' or '.join(WEIGHTS)}")
    return OpenClip(source.config["model_cfg"], source.config.get("preprocess_cfg") or {}, load_file(path))


def _from_package(source: Source) -> OpenClip:
    open_clip, architecture, checkpoint = find_open_clip(source.name, source.flag)
    if os.path.isfile(checkpoint) and Path(checkpoint).suffix != ".safetensors":
        raise source.error(_pickled_checkpoint(checkpoint))
    model, _, _ = open_clip.create_model_and_transforms(architecture, pretrained=checkpoint)
    model_cfg = open_clip.get_model_config(architecture)
    return OpenClip(model_cfg, open_clip.get_model_preprocess_cfg(model), model.state_dict())


def _pickled_checkpoint(checkpoint: str) -> str:
    safe = str(Path(checkpoint).with_suffix(".safetensors"))
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "state = state.get('state_dict', state); "
        "save_file({name.removeprefix('module.'): t.clone().contiguous() for name, t in state.items()}, sys.argv[2])"
    )
    return (
        "pickled weights are not read, as a pickle can hold any program; convert them with "
        f'python -c "{code}" {shlex.quote(checkpoint)} {shlex.quote(safe)} and name {safe}'
    )


def _image_processor(original: OpenClip) -> Any:
    cfg, size = original.preprocess_cfg, square(original.model_cfg["vision_cfg"].get("image_size", 224))
    mode = cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize_mode {mode!r} pads pictures, which has no counterpart; expected shortest or squash")
    side = {"height": size, "width": size}
    mean, std = cfg.get("mean") or CLIP_MEAN, cfg.get("std") or CLIP_STD
    return PilImageProcessor(
        size=side if mode == "squash" else {"shortest_edge": size},
        crop_size=side,
        resample=PILImageResampling.BILINEAR if cfg.get("interpolation") == "bilinear" else PILImageResampling.BICUBIC,
        image_mean=[float(mean)] * 3 if isinstance(mean, int | float) else list(mean),
        image_std=[float(std)] * 3 if isinstance(std, int | float) else list(std),
        round_margins=True,
    )
