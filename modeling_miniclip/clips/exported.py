"""Any CLIP as the folder of an export, for commands that work with files.

A CLIP of another library is converted once. The export is kept in `HF_HOME/miniclip/models`, in a folder named by what
the CLIP's files are; it may be deleted at any time.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration_miniclip import MiniClipConfig
from ..errors import MiniClipError, ModelError
from ..inference.loading import model_folder

if TYPE_CHECKING:
    from .source import Source

FORMAT = 1  # part of every name: increase it when conversions change


def export_folder(model: str | os.PathLike) -> Path:
    """The folder of an export: of the model itself, or of its conversion.

    Args:
        model: as for [`from_clip`][modeling_miniclip.clips.from_clip.from_clip].

    Raises:
        ModelError: there is no such model, or it cannot be converted.
    """
    return model_folder(as_export(model, "model"))


def as_export(model: str | os.PathLike, flag: str) -> str:
    """The name of a model; for a CLIP of another library, the folder of its conversion, made now if need be.

    Args:
        model: as for [`from_clip`][modeling_miniclip.clips.from_clip.from_clip]. A name of something else is returned
            as it is, so that each command reports what it expects.
        flag: flag or argument that named the model, for error messages.

    Raises:
        ModelError: the CLIP cannot be converted.
        MiniClipError: the disk is full.
    """
    name = os.fspath(model)
    place = os.path.expanduser(name)
    if os.path.isdir(place) and _type_in(Path(place, "config.json")) == MiniClipConfig.model_type:
        return name
    from .source import read_source  # loads transformers' lists of models

    try:
        source = read_source(place if os.path.isdir(place) else name, flag)
    except ModelError:
        return name
    return name if source.kind == MiniClipConfig.model_type else str(_converted(source))


def _converted(source: "Source") -> Path:
    from huggingface_hub.utils import WeakFileLock

    from ..hub.export import export
    from .convert import license_of, warn_without_licence
    from .from_clip import load_clip

    last = re.sub(r"[^\w.-]", "-", os.path.basename(os.path.normpath(source.name)))[-60:]
    folder = _models_dir() / f"{last}-{_digest_of(source)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f"{folder.name}.lock")):  # other processes wait for the first one
            if not (folder / "config.json").is_file():
                print(f"{source.name} is converted once, into {folder}", file=sys.stderr)
                model, processor = load_clip(source.name, source.flag)
                license_name = license_of(source.name)
                if license_name is None:
                    warn_without_licence(source.name)
                export(model, processor, folder, {"name": last} | ({"license": license_name} if license_name else {}))
    except OSError as error:
        raise MiniClipError(
            f"{folder} cannot be written: {error.strerror or error}; free some space, or set HF_HOME to another disk"
        ) from error
    return folder


def _models_dir() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "miniclip" / "models"


def _digest_of(source: "Source") -> str:
    """A hash of what the files of a CLIP are."""
    from ..evaluation.encoders import OPEN_CLIP, OPEN_CLIP_FILE
    from .source import file_of

    if source.name.startswith(OPEN_CLIP):
        checkpoint = Path(source.name.partition("/")[2])
        files = _states([checkpoint]) if checkpoint.is_file() else []
    elif os.path.isdir(source.name):
        files = _states(sorted(Path(source.name).iterdir()))
    else:  # the commit, which the Hub's cache has in each path
        path = file_of(source, OPEN_CLIP_FILE if source.kind == "open_clip" else "config.json")
        files = [path.parent.name if path is not None else ""]
    name = os.path.abspath(source.name) if os.path.isdir(source.name) else source.name
    text = json.dumps([FORMAT, name, files])
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _states(paths: list[Path]) -> list[Any]:
    return [[os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]


def _type_in(path: Path) -> Any:
    """The `model_type` in a configuration; None without one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None
