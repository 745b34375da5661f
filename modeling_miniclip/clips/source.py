"""Find out what a CLIP is: a model of transformers, one in open_clip's layout, or an export of this package."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from transformers import CONFIG_MAPPING, MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import cached_file

from ..configuration_miniclip import MiniClipConfig
from ..errors import ModelError, one_line
from ..evaluation.encoders import OPEN_CLIP, OPEN_CLIP_FILE
from ..inference.loading import export_hint
from .families import FAMILIES

QUIET = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_gated_repo"), False)


@dataclass(frozen=True)
class Source:
    """A CLIP to convert.

    Args:
        name: folder, repository on the Hub or `open_clip:ARCHITECTURE/CHECKPOINT`, as the user wrote it.
        flag: flag or argument that named it, for error messages.
        kind: `"miniclip"`, `"open_clip"` or a key of `FAMILIES`.
        config: content of its `config.json` or `open_clip_config.json`; empty for `open_clip:`.
    """

    name: str
    flag: str
    kind: str
    config: dict[str, Any]

    def error(self, text: str) -> ModelError:
        """The error that says what is wrong with this source."""
        return ModelError(f"{self.flag} {self.name}: {text}")


def read_source(name: str, flag: str) -> Source:
    """Read the configuration of a CLIP. Code in its repository is never run.

    Args:
        name: folder, repository on the Hub or `open_clip:ARCHITECTURE/CHECKPOINT`.
        flag: flag or argument that named it, for error messages.

    Raises:
        ModelError: there is no such folder or repository, or it is no CLIP that can be converted.
    """
    if name.startswith(OPEN_CLIP):
        return Source(name, flag, "open_clip", {})
    source = Source(name, flag, "", {})
    if os.path.isfile(name):
        raise source.error("a file; expected the folder of a model, or its repository on the Hub")
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise source.error("no such folder")
    config, layout = read_json(source, "config.json"), None
    kind = config.get("model_type") if config else None
    if kind != MiniClipConfig.model_type and kind not in FAMILIES:
        layout = read_json(source, OPEN_CLIP_FILE)
    if layout is not None:
        return Source(name, flag, "open_clip", layout)
    if config is None:
        if os.path.isdir(name):
            raise source.error(f"this folder has no config.json{export_hint(name)}")
        raise source.error("no such folder, and no such model on the Hub, as far as it can be reached")
    if kind != MiniClipConfig.model_type and kind not in FAMILIES:
        raise source.error(_why_not(config))
    return Source(name, flag, str(kind), config)


def file_of(source: Source, name: str) -> Path | None:
    """Local path of a file of the source, downloaded if need be; None if the source has no such file."""
    try:
        path = cached_file(source.name, name, **QUIET)
    except (HTTPError, OSError, ValueError) as error:
        raise source.error(f"neither a folder nor a model on the Hub: {one_line(error)}") from error
    return Path(path) if path else None


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """Content of a JSON file of the source; None if it has no such file."""
    path = file_of(source, name)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise source.error(f"{name} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise source.error(f"{name} holds {type(content).__name__}, expected an object")
    return content


def _why_not(config: dict[str, Any]) -> str:
    kind, known = config.get("model_type"), ", ".join(FAMILIES)
    if config.get("auto_map"):
        return (
            f"a model of type {kind!r} with code of its own (auto_map in config.json), which is never run here; "
            f"expected one of transformers' own types {known}, or a model in open_clip's layout"
        )
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
        what = f"of type {kind!r}" if kind else "of timm" if "architecture" in config else "without a model_type"
        return (
            f"a model {what}, which is a single tower or no CLIP at all; combine towers by --vision_model and "
            f"--text_model, or choose a whole CLIP: {known}, or a model in open_clip's layout"
        )
    return f"a model of type {kind!r} cannot be converted; expected {known}, or a model in open_clip's layout"
