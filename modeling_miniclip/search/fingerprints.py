"""Fingerprints of models: a hash of weights and settings, and file stats that show whether it must be recomputed."""

import hashlib
import json
from pathlib import Path
from typing import Any

# Keys of config.json that may change without changing an embedding.
VOLATILE = frozenset(
    "transformers_version _name_or_path auto_map architectures dtype torch_dtype matryoshka_dimensions".split()
)
IMAGE_SETTINGS = ("processor_config.json", "preprocessor_config.json")


def describe_files(folder: Path) -> list[list[Any]]:
    """`[name, size, mtime in ns]` of the files that [`fingerprint`] reads. If equal, so is the hash."""
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in ("config.json", *IMAGE_SETTINGS))]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]


def fingerprint(folder: Path) -> str:
    """Hash of the weights, the image processor's settings and everything else that an embedding depends on."""
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                whole.update(chunk)
    for name in ("config.json", *IMAGE_SETTINGS):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            whole.update(json.dumps(_without_volatile(settings), sort_keys=True).encode())
    return whole.hexdigest()


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(v) for key, v in value.items() if key not in VOLATILE}
    return value
