"""Any published CLIP as a `MiniClipModel`, with its own logits."""

import os

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from transformers.utils import logging

from ..errors import MiniClipError, ModelError, one_line
from ..inference.loading import load_export, no_progress_bar
from ..inference.pickled import reject_pickled
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .families import load_original, miniclip_config, miniclip_weights
from .from_open_clip import convert_open_clip
from .preprocessing import processor_from
from .source import Source, read_source


def from_clip(source: str | os.PathLike) -> MiniClipModel:
    """A CLIP of transformers or open_clip, or an export, as a model of this package. Nothing is trained.

    Its features, logits, preprocessing and tokens are those of the original. [`encode_images`], [`encode_texts`] and
    the others find the processor; `model.processor` is that processor.

    Args:
        source: folder of a model, or its repository on the Hub: a `CLIPModel`, `SiglipModel`, `Siglip2Model` (for
            pictures of one size), `AltCLIPModel`, `ChineseCLIPModel` or `VisionTextDualEncoderModel` of transformers,
            a model in open_clip's layout, or an export; or `open_clip:ARCHITECTURE/CHECKPOINT`.

    Returns:
        The model in evaluation mode and float32.

    Raises:
        ModelError: there is no such model, it lacks weights, or it is of a kind that cannot be converted.

    Examples:
        >>> from modeling_miniclip import encode_images, from_clip
        >>> model = from_clip("openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> encode_images(model, ["photo.jpg"])  # doctest: +SKIP
    """
    model, processor = load_clip(os.fspath(source), "from_clip")
    model.processor = processor
    return model


def load_clip(name: str, flag: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Model and processor for [`from_clip`] and the flags that name a model.

    Args:
        name: as `source` of [`from_clip`].
        flag: flag or argument that named it, for error messages.

    Raises:
        ModelError: as [`from_clip`].
    """
    source = read_source(name, flag)
    if source.kind == "miniclip":
        try:
            return load_export(name, flag)
        except MiniClipError:
            raise
        except (HTTPError, OSError, ValueError, StrictDataclassError) as error:
            raise ModelError(f"{one_line(error)}") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar():
            return _convert(source)
    except MiniClipError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError, KeyError, ImportError, StrictDataclassError) as error:
        if isinstance(error, OSError):
            reject_pickled(flag, name)
        raise source.error(f"cannot be converted: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _convert(source: Source) -> tuple[MiniClipModel, MiniClipProcessor]:
    if source.kind == "open_clip":
        return convert_open_clip(source)
    original, missing = load_original(source.kind, source.name)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise source.error(f"lacks weights: {shown}; choose a complete model")
    processor = processor_from(source.name, original.config)
    tokenizer = processor.tokenizer
    config = miniclip_config(original, tokenizer.pad_token_id, tokenizer.model_max_length)
    model = MiniClipModel(config)
    model.load_state_dict(miniclip_weights(original))
    _check_size(model.eval(), processor)
    return model, processor


def _check_size(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    """Raise ValueError if the image tower does not take the images that the processor makes."""
    size = processor.image_processor.crop_size
    height, width = size["height"], size["width"]
    try:
        with torch.no_grad():
            model.pool_images(torch.zeros(1, 3, height, width))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"its image processor makes images of {height}x{width} pixels, which its image tower does not take "
            f"({one_line(error)}); correct crop_size in preprocessor_config.json"
        ) from error
