"""Which model made an embedding: a hash of its weights and settings, compared without reading them anew each time."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import ModelError, one_line

# What may change in config.json without changing an embedding.
VOLATILE = ("transformers_version", "_name_or_path", "auto_map", "architectures", "dtype", "torch_dtype")
IMAGE_SETTINGS = ("processor_config.json", "preprocessor_config.json")


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


def describe_files(folder: Path) -> list[list[Any]]:
    """`[name, size, mtime in ns]` of the files that [`fingerprint`] reads, which change when it may have changed."""
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in ("config.json", *IMAGE_SETTINGS))]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]


def fingerprint(folder: Path) -> str:
    """A hash of the weights, the image processor's settings, and what else an embedding depends on."""
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                whole.update(chunk)
    for name in ("config.json", *IMAGE_SETTINGS):
        if (folder / name).is_file():
            whole.update(json.dumps(_settled(json.loads((folder / name).read_text())), sort_keys=True).encode())
    return whole.hexdigest()


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _settled(v) for key, v in value.items() if key not in VOLATILE}
    return value
