"""Load an exported model: all of it, or only the tower that a search or an index needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from ..configuration_miniclip import MiniClipConfig, Origin, pooler_switch
from ..errors import ModelError, one_line
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.checksums import check_weights
from ..utils.performance import hide_advice_for_gpus
from .pickled import reject_pickled

PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
SCALARS = ("logit_scale", "logit_bias")


def load_export(source: str, flag: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Load model and processor of an export.

    Args:
        source: folder of the export, or its repository on the Hub.
        flag: flag or argument that named the source, for error messages.

    Returns:
        The model in evaluation mode and float32, and its processor.

    Raises:
        ValueError: the folder does not exist, holds no model or one of another type, or weights are missing.
        OSError: a file cannot be read.
    """
    from .. import auto  # noqa: F401  (otherwise transformers asks whether to trust the code in the folder)

    hide_advice_for_gpus()
    check_export_folder(flag, source)
    weights = Path(source, "model.safetensors")
    if weights.is_file():
        check_weights(weights)
    try:
        return _load_export(source, flag)
    except (HTTPError, OSError, ValueError, StrictDataclassError) as error:
        if isinstance(error, OSError):
            reject_pickled(flag, source)
        raise
    except Exception as error:  # the libraries raise errors of many classes for damaged files
        raise ValueError(f"{flag} {source}: damaged, or not an export of MiniCLIP: {one_line(error)}") from error


def check_export_folder(flag: str, source: str) -> None:
    """Check that a source exists if it can only be a local folder, and that a local folder holds an export.

    Args:
        flag: flag or argument that named the source, for error messages.
        source: folder of an export, or its repository on the Hub.

    Raises:
        ValueError: the folder does not exist or has no `config.json`.
    """
    if os.path.isfile(source):
        raise ValueError(f"{flag} {source}: a file; expected a folder with config.json and model.safetensors")
    if os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
        if not os.path.isdir(source):
            raise ValueError(f"{flag} {source}: no such folder")
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise ValueError(f"{flag} {source}: this folder has no config.json{export_hint(source)}")


def export_hint(folder: str | os.PathLike) -> str:
    """`; did you mean <folder>/export?` if the folder is that of a run, with the export inside; otherwise empty."""
    inner = Path(folder, "export")
    return f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""


def _load_export(source: str, flag: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    model_type = MiniClipConfig.get_config_dict(source)[0].get("model_type")
    if model_type != MiniClipConfig.model_type:
        raise ValueError(f"{flag} {source}: a model of type {model_type!r}, not one that MiniCLIP exported")
    model = MiniClipModel.from_pretrained(source, dtype=torch.float32)
    return model, MiniClipProcessor.from_pretrained(**model.loaded_from)


def processor_of(model: MiniClipModel, processor: MiniClipProcessor | None = None) -> MiniClipProcessor:
    """The given processor, or the one that was saved with the model.

    Args:
        model: model loaded with `from_pretrained`, whose processor is in the same folder or repository, at the same
            revision and in the same subfolder; or made with `from_clip`.
        processor: processor to return; None to load it.

    Raises:
        ValueError: the model was built in memory, its folder has moved, or there was no processor next to it.
    """
    if processor is not None:
        return processor
    if getattr(model, "processor", None) is not None:  # of a model that `from_clip` made
        return model.processor
    origin = getattr(model, "loaded_from", None)
    if origin is None:
        raise ValueError("the model was not loaded with from_pretrained, so its processor is unknown: pass processor=")
    source, subfolder, revision = (origin[name] for name in ("pretrained_model_name_or_path", "subfolder", "revision"))
    if os.path.isabs(source):
        place = os.path.join(source, subfolder)
        if not os.path.isdir(place):  # transformers would look for a repository of this name
            raise ValueError(f"{place}, the folder of this model, has moved: pass processor=, or load the model again")
    else:
        place = f"{source} at revision {revision}" + (f", subfolder {subfolder}" if subfolder else "")
    try:
        return MiniClipProcessor.from_pretrained(**origin)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"found no processor with the model ({place}): pass processor=") from error


def model_folder(model: str | os.PathLike) -> Path:
    """The folder with the files of a model: an export, or the local copy of a repository on the Hub.

    Args:
        model: folder of the export, or its repository on the Hub, which is downloaded.

    Raises:
        ModelError: there is no such folder or repository, or it holds no model.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        try:
            path = Path(snapshot_download(os.fspath(model), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        except (HfHubHTTPError, HFValidationError, HTTPError, OSError, ValueError) as error:
            raise ModelError(
                f"{model}: neither the folder of an export nor a model on the Hub: {one_line(error)}"
            ) from error
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        if (path / "config.json").is_file():
            reject_pickled("model", os.fspath(path if Path(model).expanduser().is_dir() else model))
        raise ModelError(
            f"{model} is not an export: it has no config.json and weights (*.safetensors){export_hint(path)}"
        )
    return path


def load_tower(folder: Path, side: Literal["image", "text"]) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Load one tower of an export, with its head and the processor. The other tower is not read.

    Args:
        folder: folder of the export.
        side: `"image"` for a model that embeds images only, `"text"` for one that embeds texts only.

    Returns:
        The model in evaluation mode and float32, and its processor.

    Raises:
        ModelError: the folder holds no such model, or weights are missing.
    """
    from .. import auto  # noqa: F401  (otherwise transformers asks whether to trust the code in the folder)

    hide_advice_for_gpus()
    tower, head = PARTS[side]
    try:
        config = MiniClipConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = MiniClipModel(config)
        state = _read_weights(folder, (f"{tower}.", f"{head}.", *SCALARS))
        for part in (part for parts in PARTS.values() for part in parts if part not in PARTS[side]):
            setattr(model, part, nn.Identity())
        empty = getattr(model, tower)
        pooling = config.text_pooling if side == "text" else config.vision_pooling
        options: dict[str, Any] = pooler_switch(type(empty), pooling)
        setattr(model, tower, nn.Identity())
        own = {name.removeprefix(f"{tower}."): value for name, value in state.items() if name.startswith(f"{tower}.")}
        # from_pretrained, because transformers knows how to fill what a checkpoint lacks (tables of positions).
        with no_progress_bar():
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
    processor = MiniClipProcessor.from_pretrained(folder)
    model.loaded_from = Origin(pretrained_model_name_or_path=os.path.abspath(folder), subfolder="", revision="main")
    return model.eval(), processor


def _read_weights(folder: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
    return state


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide the progress bars of transformers within a block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
