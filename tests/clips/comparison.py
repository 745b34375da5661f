"""Compare a converted model with what its original's own library computes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import PILImageResampling

from modeling_miniclip import MiniClipModel, MiniClipProcessor
from tests.helpers.clips import TEXTS, pictures

LARGEST_DIFFERENCE = 1e-5  # relative to the largest absolute value


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest absolute value."""
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def transformers_results(folder: Path) -> dict[str, Tensor]:
    """Pixels, tokens, features and logits of a CLIP of transformers, with its own processor and Pillow."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind, text = model.config.model_type, model.config.text_config
    inputs = images([_same_shape(image, kind) for image in pictures()], return_tensors="pt")
    padding: Any = "max_length" if "siglip" in kind else True
    limit = min(tokenizer.model_max_length, text.max_position_embeddings)
    tokens = tokenizer(TEXTS, padding=padding, truncation=True, max_length=limit, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", *([] if "siglip" in kind else ["attention_mask"]))}
    with torch.no_grad():
        output = model(**inputs, **tokens)
        results = {
            "image features": model.get_image_features(**inputs).pooler_output,
            "text features": model.get_text_features(**tokens).pooler_output,
            "logits": output.logits_per_image,
            "temperature": model.logit_scale.exp().reshape(1),
            "tokens": tokens["input_ids"],
        }
    if "siglip2" not in kind:
        results["pixels"] = inputs["pixel_values"]
    return results | ({"bias": model.logit_bias.reshape(1)} if "siglip" in kind else {})


def our_results(model: MiniClipModel, processor: MiniClipProcessor, square: bool = False) -> dict[str, Tensor]:
    """The same of a model of this package."""
    images = [_same_shape(image, "siglip2" if square else "") for image in pictures()]
    inputs, tokens = processor(images=images, return_tensors="pt"), processor(text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, **tokens)
        results = {
            "image features": model.get_image_features(**inputs).pooler_output,
            "text features": model.get_text_features(**tokens).pooler_output,
            "logits": output.logits_per_image,
            "temperature": output.logit_scale,
            "tokens": tokens["input_ids"],
            "pixels": inputs["pixel_values"],
        }
    cropped = [processor.normalize(torch.from_numpy(processor.crop(image))[None]) for image in images]
    assert torch.equal(torch.cat(cropped), results["pixels"]) or apart(torch.cat(cropped), results["pixels"]) < 1e-6
    return results | ({"bias": output.logit_bias} if output.logit_bias is not None else {})


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """What differs by more than the bound; see [`all_differences`]."""
    return {name: value for name, value in all_differences(ours, theirs).items() if not value <= LARGEST_DIFFERENCE}


def all_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The relative difference of everything in `theirs`; infinity for other tokens."""
    return {
        name: apart(ours[name], value) if name != "tokens" else 0.0 if torch.equal(ours[name], value) else math.inf
        for name, value in theirs.items()
    }


def change_activation(model: MiniClipModel) -> None:
    """Another activation in the first layer of the image tower."""
    names = ("activation_fn", "intermediate_act_fn")
    found = [(module, name) for module in model.vision_model.modules() for name in names if hasattr(module, name)]
    setattr(*found[0], torch.nn.ReLU())


def change_pooling(model: MiniClipModel) -> None:
    """Another pooling of the text tower."""
    model.config.text_pooling = "mean"


def change_images(**settings: Any) -> Callable[[MiniClipModel], None]:
    """Other settings of the image processor."""

    def change(model: MiniClipModel) -> None:
        for name, value in settings.items():
            setattr(model.processor.image_processor, name, value)

    return change


# What a conversion could get wrong, and a comparison must notice.
FAULTS: dict[str, Callable[[MiniClipModel], None]] = {
    "activation": change_activation,
    "pooling": change_pooling,
    "mean": change_images(image_mean=[0.5, 0.4, 0.31]),
    "interpolation": change_images(resample=PILImageResampling.BOX),
    "crop": change_images(size={"shortest_edge": 41}),
}


def _same_shape(image: Any, kind: str) -> Any:
    # SigLIP 2 keeps the shape of pictures; at a fixed size they are squares.
    return image.resize((75, 75)) if kind == "siglip2" else image
