"""Tiny towers with random weights, one for each family that the tests go through. Nothing here needs a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, TimmWrapperConfig

from modeling_miniclip import MiniClipConfig, MiniClipModel, MiniClipProcessor
from modeling_miniclip.processing_miniclip import image_processor_from_timm
from modeling_miniclip.training.towers.create_model import train_tokenizer

PIXELS = 32

# timm's own miniatures of each family; vit and swin need their input size, the others take any.
VISION: dict[str, dict[str, Any]] = {
    "resnet": {"architecture": "test_resnet"},
    "efficientnet": {"architecture": "test_efficientnet"},
    "convnext": {"architecture": "test_convnext"},
    "vit": {"architecture": "test_vit", "model_args": {"img_size": PIXELS}},
    "swin": {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": {"img_size": PIXELS, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    },
}

# Image encoders of transformers. Each name is a `model_type`.
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": PIXELS, "patch_size": 8}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _ENCODER,
    "siglip_vision_model": _ENCODER,
    "vit": _ENCODER,
    "deit": _ENCODER,
    "dinov2": _ENCODER,
    "dinov3_vit": {**_ENCODER, "num_register_tokens": 2},
    "beit": _ENCODER,
    "swin": {"image_size": PIXELS, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
             "window_size": 4},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "resnet": {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "layer_type": "basic"},
    "chinese_clip_vision_model": _ENCODER,
    "aimv2_vision_model": _ENCODER,
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 256},
}  # fmt: skip

_SMALL = {"vocab_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, dict[str, Any]] = {
    "distilbert": {"vocab_size": 200, "n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 64,
                   "max_position_embeddings": 24},
    "bert": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 24},
    "roberta": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 26, "pad_token_id": 1},
    "mpnet": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 26, "pad_token_id": 1},
    "modernbert": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 24, "pad_token_id": 0, "cls_token_id": 2,
                   "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "gpt2": {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "pad_token_id": 0,
             "bos_token_id": 2, "eos_token_id": 3},
    "t5": {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}  # fmt: skip


# The text towers of CLIP and SigLIP, which no mapping of transformers lists or which need another pooling.
CLIP_TEXT: dict[str, dict[str, Any]] = {
    "clip_text_model": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 24, "pad_token_id": 0,
                        "bos_token_id": 2, "eos_token_id": 3},
    "siglip_text_model": {**_SMALL, "hidden_size": 32, "max_position_embeddings": 24, "projection_size": 32,
                          "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
}  # fmt: skip
# Towers and fields as in a CLIP and a SigLIP.
CLIP = ("clip_vision_model", "clip_text_model", {"text_pooling": "eos", "projection_depth": 1})
SIGLIP = ("siglip_vision_model", "siglip_text_model",
          {"projection_depth": 0, "projection_dim": 32, "text_length": 24, "loss_type": "sigmoid"})  # fmt: skip


def with_slow(fast: Sequence[Any], slow: Sequence[Any]) -> list[Any]:
    """Parameters of a test: the fast suite takes those of the first list, the slow suite the others."""
    return [*fast, *(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
                     for case in slow)]  # fmt: skip


# (image tower, text tower) of the fast suite: convolutions with an encoder that has absolute positions, a vision
# transformer with one that has offset positions, and shifted windows with the encoder of an encoder-decoder.
FAST_PAIRS = [("resnet", "distilbert"), ("vit", "roberta"), ("swin", "t5")]
SLOW_PAIRS = [("efficientnet", "bert"), ("convnext", "mpnet"), ("resnet", "modernbert")]
EVERY_PAIR = with_slow(FAST_PAIRS, SLOW_PAIRS)

CAPTIONS = [
    ["a red dog runs over the green grass", "a dog is running on grass"],
    ["two children play with a yellow ball", "children and a ball on the beach", "kids playing"],
    ["a man climbs a steep rock", "someone is climbing"],
    ["a white boat on a blue lake", "a small boat on the water near a shore"],
]


def vision_config(family: str = "resnet") -> Any:
    """Configuration of a tiny timm tower, or of CLIP's or SigLIP's, for images of `PIXELS` x `PIXELS`."""
    if family not in VISION:
        return encoder_config(family)
    preprocessing = {"input_size": [3, PIXELS, PIXELS], "crop_pct": 1.0, "interpolation": "bicubic"}
    return TimmWrapperConfig(**VISION[family], pretrained_cfg=preprocessing)


def encoder_config(family: str) -> Any:
    """Configuration of a tiny image encoder of transformers."""
    return AutoConfig.for_model(family, **ENCODERS[family])


def text_config(family: str = "distilbert") -> Any:
    """Configuration of a tiny text tower."""
    return AutoConfig.for_model(family, **(TEXT | CLIP_TEXT)[family])


def tiny_config(vision: str = "resnet", text: str = "distilbert", **fields: Any) -> MiniClipConfig:
    """Configuration of a tiny model, 16-d by default."""
    fields.setdefault("projection_dim", 16)
    return MiniClipConfig(vision_config=vision_config(vision), text_config=text_config(text), **fields)


def tiny_model(vision: str = "resnet", text: str = "distilbert", **fields: Any) -> MiniClipModel:
    """A tiny model with random weights, in evaluation mode."""
    return MiniClipModel(tiny_config(vision, text, **fields)).eval()


def tiny_processor() -> MiniClipProcessor:
    """A processor for the tiny resnet and DistilBERT, its vocabulary learnt from `CAPTIONS`."""
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 24
    return MiniClipProcessor(image_processor_from_timm(vision_config()), tokenizer)


def save_decoder(folder: Path, **tokens: str) -> Path:
    """A tiny GPT-2 with a byte-level tokenizer, which adds no special tokens; `tokens` are those it has."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer, learner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([text for row in CAPTIONS for text in row], trainer)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
    GPT2Model(GPT2Config(vocab_size=300, **small)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=learner, **tokens).save_pretrained(folder)
    return folder


def save_towers(folder: Path, vision: str = "resnet", text: str = "distilbert") -> tuple[Path, Path]:
    """Pretrained towers as they are stored on the Hub: a timm repository, and a text encoder with its tokenizer."""
    import json

    import timm
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    torch.manual_seed(0)
    vision_folder, text_folder = folder / f"vision-{vision}", folder / f"text-{text}"
    vision_folder.mkdir(parents=True)
    spec = VISION[vision]
    tower = timm.create_model(spec["architecture"], num_classes=10, **spec.get("model_args", {}))
    save_file(tower.state_dict(), vision_folder / "model.safetensors", metadata={"format": "pt"})
    cfg = {
        "input_size": [3, PIXELS, PIXELS],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    config = {
        "architecture": spec["architecture"],
        "num_classes": 10,
        "pretrained_cfg": cfg,
        "model_args": spec.get("model_args"),
    }
    (vision_folder / "config.json").write_text(json.dumps(config))
    AutoModel.from_config(text_config(text)).save_pretrained(text_folder)
    tiny_processor().tokenizer.save_pretrained(text_folder)
    return vision_folder, text_folder
