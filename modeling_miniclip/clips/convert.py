"""`miniclip convert`: a published CLIP as an export, or a model as a CLIP of transformers or open_clip."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from ..errors import MiniClipError
from ..evaluation.encoders import OPEN_CLIP
from ..hub.export import export
from ..hub.model_card import is_hub_id
from ..processing_miniclip import MiniClipProcessor
from ..utils.files import check_new_folder, replaced_folder
from .compare import check_copy
from .from_clip import load_clip
from .source import Source, file_of
from .to_open_clip import save_for_open_clip
from .to_transformers import save_for_transformers

SAVE = {"transformers": save_for_transformers, "open_clip": save_for_open_clip}
CARD = """---
license: {license}
library_name: {library}
pipeline_tag: zero-shot-image-classification
---

# {name}

A CLIP, converted{source} by MiniCLIP for {library}.
"""


@dataclass(frozen=True)
class Converted:
    """What `miniclip convert` has written.

    Args:
        folder: path of the folder.
        difference: largest difference of the logits from those of the source, relative to the largest logit; None for
            an export, which was not loaded again.
        rounds: whether the target rounds the half pixel of an odd margin around a crop in another way.
    """

    folder: Path
    difference: float | None = None
    rounds: bool = False


def convert(source: str | os.PathLike, folder: str | os.PathLike, library: str | None = None) -> Converted:
    """Convert a model.

    Args:
        source: as for [`from_clip`][modeling_miniclip.clips.from_clip.from_clip].
        folder: folder to write; must not exist, or be empty.
        library: `"transformers"` or `"open_clip"`, whose own code loads the result; None for an export.

    Raises:
        UsageError: the folder is not empty.
        ModelError: the source cannot be loaded, does not fit the library, or the library computes other logits.
        MiniClipError: open_clip is needed and not installed.
    """
    target, name = Path(folder), os.fspath(source)
    check_new_folder(target, "convert ")
    model, processor = load_clip(name, "convert")
    license_name = license_of(name)
    if license_name is None and model.loaded_from is None:  # an export may be your own
        warn_without_licence(name)
    if library is None:
        card = {"name": target.name} | ({"license": license_name} if license_name else {})
        return Converted(export(model, processor, target, card=card))
    rounds = rounds_margins(processor, library)
    with replaced_folder(target) as fresh:
        SAVE[library](model, processor, fresh)
        origin = f" from `{name}`" if is_hub_id(name) or name.startswith(OPEN_CLIP) else ""
        text = CARD.format(license=license_name or "unknown", library=library, name=target.name, source=origin)
        (fresh / "README.md").write_text(text, encoding="utf-8")
        difference = check_copy(model, processor, fresh, library, squares=rounds)
    return Converted(target, difference, rounds)


def license_of(name: str) -> str | None:
    """The licence in the card of a model; None if it states none, or has no card."""
    if name.startswith(OPEN_CLIP):
        return None
    try:
        path = file_of(Source(name, "convert", "", {}), "README.md")
        stated = ModelCard.load(path).data.license if path else None
    except (MiniClipError, OSError, ValueError):
        return None
    return str(stated) if stated and stated != "unknown" else None


def warn_without_licence(name: str) -> None:
    """Warn that a model states no licence."""
    warnings.warn(f"{name} states no licence: ask its authors before you share what you make of it", stacklevel=3)


def rounds_margins(processor: MiniClipProcessor, library: str) -> bool:
    """Whether the library crops pictures with odd margins one pixel away from the processor's crop."""
    images = processor.image_processor
    crops = dict(images.size).get("shortest_edge") is not None
    return crops and bool(getattr(images, "round_margins", False)) != (library == "open_clip")
