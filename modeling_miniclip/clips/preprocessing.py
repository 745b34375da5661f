"""The processor of a CLIP of transformers: its preprocessing by the stock image processor, and its tokenizer."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import PILImageResampling

from ..processing_miniclip import MiniClipProcessor, PilImageProcessor, max_text_length, stock_image_processor
from .families import FAMILIES, fixed_size_vision

# Photographs lie, stand, are smaller than the crop or larger; an odd margin shows how a crop is rounded.
TRIAL_SIZES = ((301, 233), (64, 97), (517, 518))
LARGEST_DIFFERENCE = 1e-5  # of normalised pixels


def processor_from(source: str, config: Any) -> MiniClipProcessor:
    """The processor that prepares images and texts as the original's processor does with Pillow.

    Args:
        source: folder of the model, or its repository on the Hub.
        config: configuration of the model, of one of the `FAMILIES`.

    Raises:
        ValueError: the image processor does something that the stock image processor cannot do.
        OSError: the files of the processor cannot be read.
    """
    other = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    images = square_image_processor(other, config) if config.model_type == "siglip2" else equal_image_processor(other)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    is_sigmoid = FAMILIES[config.model_type].is_sigmoid
    if is_sigmoid and tokenizer.padding_side != "right":
        raise ValueError("its tokenizer pads texts on the left, where this package pads on the right")
    tokenizer.init_kwargs.pop("max_length", None)
    tokenizer.model_max_length = max_text_length(config.text_config, tokenizer)
    return MiniClipProcessor(images, tokenizer, text_padding="max_length" if is_sigmoid else True)


def equal_image_processor(other: Any) -> Any:
    """CLIP's image processor with the settings of another one.

    It is tried on pictures of several sizes, so that nothing that the other one does is left out.

    Raises:
        ValueError: the pixels differ.
    """
    stock = stock_image_processor(other)
    for picture in _trial_pictures():
        ours, theirs = (one(picture, return_tensors="np")["pixel_values"] for one in (stock, other))
        if ours.shape != np.shape(theirs) or np.abs(ours - theirs).max() > LARGEST_DIFFERENCE:
            raise ValueError(f"{type(other).__name__} gives other pixels than the stock image processor can give")
    return stock


def square_image_processor(other: Any, config: Any) -> Any:
    """The image processor for SigLIP 2 at a fixed size: its settings, with pictures resized to a square."""
    size = fixed_size_vision(config.vision_config).image_size
    square = {"height": size, "width": size}
    return PilImageProcessor(
        size=square,
        crop_size=square,
        resample=PILImageResampling(other.resample),
        image_mean=list(other.image_mean),
        image_std=list(other.image_std),
    )


def _trial_pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in TRIAL_SIZES]
