"""Half a model: of the two towers only the one that a search or an index needs is read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from ..configuration_miniclip import MiniClipConfig
from ..errors import ModelError, one_line
from ..modeling_miniclip import MiniClipModel, without_pooler
from ..processing_miniclip import MiniClipProcessor
from ..utils.checksums import check_weights

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


def load_export(source: str, flag: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Model and processor of an export.

    Args:
        source: folder, or repository on the Hub.
        flag: that named it, for the errors.

    Returns:
        The model in evaluation mode and float32, and its processor.

    Raises:
        ValueError: no such folder, one without a model or with another model, or weights that are not complete.
        OSError: it cannot be read.
    """
    from .. import auto  # noqa: F401  (or transformers would ask whether to trust the code in the folder)

    _check_folder(flag, source)
    weights = Path(source, "model.safetensors")
    if weights.is_file():
        check_weights(weights)
    try:
        return _load_export(source, flag)
    except (HTTPError, OSError, ValueError, StrictDataclassError):
        raise
    except Exception as error:  # whatever the libraries raise at files that no library wrote
        raise ValueError(f"{flag} {source}: damaged, or not what MiniCLIP exports: {one_line(error)}") from error


def _load_export(source: str, flag: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    model_type = MiniClipConfig.get_config_dict(source)[0].get("model_type")
    if model_type != MiniClipConfig.model_type:
        raise ValueError(f"{flag} {source}: a model of type {model_type!r}, not one that MiniCLIP exported")
    model, info = MiniClipModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks weights: {', '.join(sorted(info['missing_keys']))}")
    return model, MiniClipProcessor.from_pretrained(source, revision=model.loaded_revision or "main")


def _check_folder(flag: str, source: str) -> None:
    """Tell a missing folder from a missing repository, and find the export within a run's folder."""
    if os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
        if not os.path.isdir(source):
            raise ValueError(f"{flag} {source}: no such folder")
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        inner = os.path.join(source, "export")
        hint = f"; did you mean {inner}?" if os.path.isfile(os.path.join(inner, "config.json")) else ""
        raise ValueError(f"{flag} {source}: this folder has no config.json{hint}")


def model_folder(model: str | os.PathLike) -> Path:
    """The folder with the files of a model: an export, or the local copy of a repository on the Hub.

    Raises:
        ModelError: neither is there.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

        try:
            path = Path(snapshot_download(os.fspath(model), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, HTTPError, OSError, ValueError) as error:
            raise ModelError(
                f"{model}: neither the folder of an export nor a model that the Hub gives: {one_line(error)}"
            ) from error
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        inner = path / "export"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise ModelError(f"{model} is not an export: it has no config.json and weights (*.safetensors){hint}")
    return path
