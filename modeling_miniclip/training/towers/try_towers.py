"""Run both towers once before any long work, to find sizes, texts and poolings that they cannot take."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor

from ... import __version__
from ...configuration_miniclip import tower_name
from ...errors import ModelError, UsageError, one_line
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ..command_line.arguments import TrainingArguments
from .feature_cache import KeptValue, digest_of_tokenizer, digest_of_weights, image_tower_settings, text_tower_settings

LARGEST_SIDE = 1024  # pixels; larger images are not tried, as that could take minutes
LONGEST_TEXT = 512  # tokens; longer texts are not tried
STEPS = (32, 16, 14, 8)  # many towers take only multiples of one of these


def try_towers(
    model: MiniClipModel, processor: MiniClipProcessor, arguments: TrainingArguments, cache_dir: Path | None = None
) -> None:
    """Embed one image of each size, and texts up to the longest, as training will.

    Args:
        model: model in evaluation mode; it is not changed, and no random numbers of the run are drawn.
        processor: processor of the model.
        arguments: flags of the run.
        cache_dir: folder where success is kept, so that the same towers are tried once; None tries them each time.

    Raises:
        UsageError: the tower does not take the size, length or pooling that a flag asks for.
        ModelError: a tower cannot be used at all.
    """
    crop = processor.image_processor.crop_size
    sizes = {"image_size": (crop["height"], crop["width"])}
    if arguments.train_image_size is not None:
        sizes["train_image_size"] = (arguments.train_image_size, arguments.train_image_size)
    kept = None
    if cache_dir is not None:
        kept = KeptValue(cache_dir, "tried", _about_trial(model, processor, list(sizes.values())))
        if kept.read() is True:
            return
    for flag, size in sizes.items():
        _try_image(model, flag, size, arguments)
    _try_texts(model, processor.tokenizer)
    if kept is not None:
        kept.write(True)


def _about_trial(model: MiniClipModel, processor: MiniClipProcessor, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Everything that the result of a trial depends on."""
    libraries = {module.__name__: module.__version__ for module in (timm, torch, transformers)}
    return {
        "versions": libraries | {"modeling_miniclip": __version__},
        "sizes": sizes,
        "widths": [model.vision_width, model.text_width],
        "weights": [digest_of_weights(tower) for tower in (model.vision_model, model.text_model)],
        "vision": image_tower_settings(model),
        "text": text_tower_settings(model),
        "tokenizer": [digest_of_tokenizer(processor.tokenizer), processor.tokenizer.pad_token_id],
    }


def _try_image(model: MiniClipModel, flag: str, size: tuple[int, int], arguments: TrainingArguments) -> None:
    if max(size) > LARGEST_SIDE or (problem := image_problem(model, size)) is None:
        return
    name = tower_name(model.config.vision_config)
    near = {side for step in STEPS for side in (size[0] // step * step, -(-size[0] // step) * step) if side > 0}
    own = own_size(model.config.vision_config)
    taken = [side for side in sorted({*near, own}) if image_problem(model, (side, side)) is None]
    shape = f"{size[0]}x{size[1]}"
    if not taken:
        raise ModelError(f"{name} cannot embed an image of {shape} pixels: {problem}; choose another image tower")
    closest = sorted(sorted(taken, key=lambda side: abs(side - size[0]))[:3])
    given = "" if getattr(arguments, flag) is None else f" {getattr(arguments, flag)}"
    raise UsageError(
        f"--{flag}{given}: {name} takes no images of {shape} pixels ({problem}); sizes that it takes: "
        f"{', '.join(map(str, closest))}"
    )


def own_size(vision_config: Any) -> int:
    """Pixels per side of the images that an image tower was made for."""
    size = (getattr(vision_config, "pretrained_cfg", None) or {}).get("input_size", (3, 224))[1]
    if vision_config.model_type != "timm_wrapper":
        size = getattr(vision_config, "image_size", None) or size
    return int(size if isinstance(size, int) else size[0])


def image_problem(model: MiniClipModel, size: tuple[int, int]) -> str | None:
    """Why the image tower does not take images of a size `(height, width)`, or None if it does."""
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return _problem(lambda: model.pool_images(pixels).pooler_output, (1, model.vision_width))


def _try_texts(model: MiniClipModel, tokenizer: Any) -> None:
    tower, width = f"text tower {model.config.text_config.model_type}", model.text_width
    limit = min(tokenizer.model_max_length, LONGEST_TEXT)
    ids, other = (
        tokenizer(text * limit, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        for text in ("a photo of two dogs ", "red boats on some blue lake ")
    )
    length = max(1, min(8, limit - 2, ids.shape[1], other.shape[1]))
    alike = torch.cat([ids[:, :1], other[:, 1 : length - 1], ids[:, length - 1 : length]], dim=1)[:, :length]
    padding = torch.full((2, min(2, limit - length)), tokenizer.pad_token_id)
    rows = torch.cat([torch.cat([ids[:, :length], alike]), padding], dim=1)  # equal first and last tokens
    mask = (torch.arange(rows.shape[1]) < length).long().expand(2, -1)
    outputs: list[Any] = []

    def embed_short() -> Tensor:
        outputs.append(model.pool_texts(rows, mask))
        return outputs[0].pooler_output

    if (problem := _problem(embed_short, (2, width))) is not None:
        largest, table = int(rows.max()), getattr(model.get_input_embeddings(), "num_embeddings", None)
        beyond = (
            f" (token {largest} of its tokenizer, but a table of {table})" if largest >= (table or math.inf) else ""
        )
        raise ModelError(f"{tower} cannot embed a short text: {problem}{beyond}; choose another text tower")
    states, pooled = outputs[0].last_hidden_state[:, length - 1], outputs[0].pooler_output
    if torch.allclose(pooled[0], pooled[1], atol=1e-6) and not torch.allclose(states[0], states[1], atol=1e-6):
        raise UsageError(
            f"--text_pooling {model.config.text_pooling}: {tower} gives all texts that begin alike the same feature, "
            "as its first token sees no other one; choose last or mean"
        )

    def problem_of(tokens: int) -> str | None:
        part = ids[:, :tokens]
        return _problem(lambda: model.pool_texts(part, torch.ones_like(part)).pooler_output, (1, width))

    tokens = ids.shape[1]
    if (problem := problem_of(tokens)) is not None:
        taken = next((n for n in (256, 128, 77, 64, 32, 16) if n < tokens and problem_of(n) is None), None)
        remedy = f"set --max_length {taken}" if taken else "choose another text tower"
        raise UsageError(
            f"--max_length {tokenizer.model_max_length}: {tower} takes no texts of {tokens} tokens ({problem}); "
            f"{remedy}"
        )


@torch.no_grad()
def _problem(embed: Callable[[], Tensor], shape: tuple[int, int]) -> str | None:
    """Why a tower does not give features `[N, width]`, or None if it does."""
    try:
        pooled = embed()
    except Exception as error:  # the libraries raise errors of many classes for sizes that do not fit
        return one_line(error)[:200]
    if tuple(pooled.shape) != shape:
        return f"its features have the shape {list(pooled.shape)} instead of {list(shape)}"
    return None if pooled.isfinite().all() else "its features are NaN or infinite"
