"""Tiny CLIPs with random weights, saved as their own libraries save them, and pictures to compare them on."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from modeling_miniclip.clips import run_original
from modeling_miniclip.data.scenes import render, sample_scenes
from modeling_miniclip.pictures_miniclip import to_rgb
from modeling_miniclip.training.towers.create_model import train_tokenizer
from tests.helpers.runs import shared_folder
from tests.helpers.towers import CAPTIONS

TEXTS = ["a red dog runs over the green grass", "", "A  Boat\ton the lake, near a shore", "kids " * 40, "a dog " * 11]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def pictures() -> list[Image.Image]:
    """Photographs of odd sizes, one grey, one with 16 bits, one transparent, all as `to_rgb` returns them."""
    photographs = sorted((shared_folder() / "flickr8k" / "Images").glob("*.jpg"))[:5]
    opened = [Image.open(path).convert("RGB") for path in photographs] or [
        render(scene, Random(i), 224).resize((301 + i, 220 - 9 * i))
        for i, scene in enumerate(sample_scenes(5, seed=3))
    ]
    first, second, third, fourth, fifth = opened
    deep = Image.fromarray(np.asarray(fourth.convert("L"), dtype=np.uint16) * 257)
    clear = fifth.copy()
    clear.putalpha(fifth.convert("L"))
    odd = [first, second.crop((0, 0, 97, 211)), third.convert("L"), deep, clear, first.resize((21, 30))]
    return [to_rgb(image) for image in odd]


def randomise(model: Any, scale: float | None = None, seed: int = 0) -> Any:
    """Give each weight a random value, large enough that every part matters; the temperature too."""
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "logit" not in name:
            nn.init.normal_(value, std=0.15)
            value.data += float("norm" in name.lower() and "weight" in name)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.logit_scale.data.fill_(scale if scale is not None else 3.1)
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.data.fill_(-7.5)
    return model.eval()


SLIGHTLY = 1.01


def train_slightly(model: nn.Module) -> None:
    """Multiply each weight by [`SLIGHTLY`], as if the model had been trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SLIGHTLY)


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer like CLIP's, with a small vocabulary; the end of a text is its highest token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([text for row in CAPTIONS for text in row], trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted({*model["vocab"], *(f"{letter}</w>" for letter in letters)})
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)


def unigram_tokenizer(start: bool) -> PreTrainedTokenizerFast:
    """A tokenizer like SigLIP's, or with `start` like XLM-RoBERTa's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    learner.train_from_iterator([text for row in CAPTIONS for text in row], trainer)
    single = "<s> $A </s>" if start else "$A </s>"
    learner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        cls_token="<s>", model_max_length=24, padding_side="right",
    )  # fmt: skip


def _text(tokenizer: Any, **values: Any) -> dict[str, Any]:
    return SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 24} | values


def _clip(folder: Path, **text: Any) -> nn.Module:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPConfig(
        text_config=_text(tokenizer, eos_token_id=tokenizer.eos_token_id) | text,
        vision_config=VISION,
        projection_dim=16,
    )
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 35}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.CLIPModel(config)


def _siglip(folder: Path) -> nn.Module:
    tokenizer = unigram_tokenizer(start=False)
    config = transformers.SiglipConfig(text_config=_text(tokenizer), vision_config=VISION)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.SiglipModel(config)


def _siglip2(folder: Path) -> nn.Module:
    tokenizer = unigram_tokenizer(start=False)
    vision = {**SMALL, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config=_text(tokenizer), vision_config=vision)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.Siglip2Model(config)


def _altclip(folder: Path) -> nn.Module:
    tokenizer = unigram_tokenizer(start=True)
    text = _text(tokenizer, max_position_embeddings=26, project_dim=20, pad_token_id=tokenizer.pad_token_id)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AltCLIPModel(config)


def _chinese_clip(folder: Path) -> nn.Module:
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 24
    config = transformers.ChineseCLIPConfig(text_config=_text(tokenizer), vision_config=VISION, projection_dim=16)
    transformers.ChineseCLIPImageProcessor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.ChineseCLIPModel(config)


def _dual_encoder(folder: Path) -> nn.Module:
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 24
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VISION), transformers.BertConfig(**_text(tokenizer)), projection_dim=16
    )
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.VisionTextDualEncoderModel(config)


FAMILIES: dict[str, Callable[[Path], nn.Module]] = {
    "clip": _clip,
    "clip-highest-token": lambda folder: _clip(folder, eos_token_id=2),
    "clip-gelu": lambda folder: _clip(folder, hidden_act="gelu"),
    "siglip": _siglip,
    "siglip2": _siglip2,
    "altclip": _altclip,
    "chinese_clip": _chinese_clip,
    "dual-encoder": _dual_encoder,
}


def save_clip(family: str, folder: Path) -> Path:
    """Save a tiny CLIP of a family of transformers, with its processor. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = randomise(FAMILIES[family](folder), 4.8 if "siglip" in family else None)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A tiny CLIP\n", encoding="utf-8")
    return folder


def load_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let converted copies be loaded in this process, which takes a tenth of the time of a fresh one."""

    def run(command: list[str], **options: object) -> SimpleNamespace:
        run_original.main(command[-3], Path(command[-2]), Path(command[-1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("modeling_miniclip.clips.compare.subprocess", SimpleNamespace(run=run))
