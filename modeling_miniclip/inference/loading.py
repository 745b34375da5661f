"""Half a model: of the two towers only the one that a search or an index needs is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from ..configuration_miniclip import MiniClipConfig
from ..errors import ModelError, one_line
from ..modeling_miniclip import MiniClipModel, without_pooler
from ..processing_miniclip import MiniClipProcessor

PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
SCALARS = ("logit_scale", "logit_bias")


def load_tower(folder: Path, side: Literal["image", "text"]) -> tuple[MiniClipModel, MiniClipProcessor]:
    """A model that embeds images only, or texts only, and its processor; the other tower is not there.

    Args:
        folder: of the export.
        side: which of them.

    Returns:
        The model in evaluation mode and float32.

    Raises:
        ModelError: the folder holds no such model, or not all of its weights.
    """
    from .. import auto  # noqa: F401  (or transformers would ask whether to trust the code in the folder)

    tower, head = PARTS[side]
    try:
        config = MiniClipConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = MiniClipModel(config)
        state = _read_weights(folder, (f"{tower}.", f"{head}.", *SCALARS))
        for part in (part for parts in PARTS.values() for part in parts if part not in PARTS[side]):
            setattr(model, part, nn.Identity())
        empty = getattr(model, tower)
        options: dict[str, Any] = without_pooler(type(empty)) if side == "text" else {}
        setattr(model, tower, nn.Identity())
        own = {name.removeprefix(f"{tower}."): value for name, value in state.items() if name.startswith(f"{tower}.")}
        # transformers' own way, for it knows how to fill what a checkpoint does not hold (tables of positions).
        with _no_progress_bar():
            loaded, info = type(empty).from_pretrained(
                None, config=empty.config, state_dict=own, output_loading_info=True, dtype=torch.float32, **options
            )
        rest = {name: value.float() for name, value in state.items() if not name.startswith(f"{tower}.")}
        missing = {*info["missing_keys"], *model.load_state_dict(rest, strict=False, assign=True).missing_keys}
        setattr(model, tower, loaded)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{folder}: no MiniCLIP model that can be loaded: {one_line(error)}") from error
    if missing:
        raise ModelError(f"{folder} lacks weights: {', '.join(sorted(missing))}; export the model again")
    return model.eval(), MiniClipProcessor.from_pretrained(folder)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read_weights(folder: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
    return state
