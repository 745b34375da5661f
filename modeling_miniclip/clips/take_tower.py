"""One tower of a CLIP, for `--vision_model` and `--text_model`."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.encoders import OPEN_CLIP, OPEN_CLIP_FILE
from .families import FAMILIES
from .from_clip import load_clip
from .source import Source, read_json


class TakenTower(NamedTuple):
    """A tower that was taken out of a CLIP.

    Args:
        folder: where it is saved as a tower of transformers, with its image processor or tokenizer.
        fields: fields of the `MiniClipConfig` that it needs, such as its pooling.
    """

    folder: Path
    fields: dict[str, Any]


def take_tower(name: str, flag: str, folder: Path) -> TakenTower | None:
    """Save one tower of a CLIP on its own. None if the name is not that of a CLIP.

    Args:
        name: value of the flag.
        flag: `"--vision_model"` or `"--text_model"`.
        folder: folder to write to.

    Raises:
        ModelError: the CLIP cannot be loaded, or its image tower is one of timm.
    """
    source = Source(name, flag, "", {})
    if not _is_clip(source):
        return None
    model, processor = load_clip(name, flag)
    if flag == "--text_model":
        model.text_model.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        return TakenTower(folder, {name: getattr(model.config, name) for name in ("text_pooling", "text_length")})
    if model.config.vision_config.model_type == "timm_wrapper":
        raise source.error(f"its image tower is timm's {model.config.vision_config.architecture}; name one of timm")
    model.vision_model.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return TakenTower(folder, {"vision_pooling": model.config.vision_pooling})


def _is_clip(source: Source) -> bool:
    """Whether a name is that of a CLIP of transformers or open_clip."""
    if source.name.startswith(OPEN_CLIP):
        return True
    if not os.path.isdir(source.name) and "/" not in source.name:
        return False
    config = read_json(source, "config.json")
    if config is None:
        return read_json(source, OPEN_CLIP_FILE) is not None
    return config.get("model_type") in FAMILIES
