"""Checksums of weights and of indexes, so that a bit that flipped on some disk is told and not trained on or shown."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import ModelError

# In the metadata of the safetensors file. Whoever saves the model again, does so without it.
KEY = "miniclip_sha256"
BLANK = "0" * 64


def seal_weights(path: Path) -> None:
    """Enter into a safetensors file the SHA-256 of itself, taken while that entry holds zeros."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.setdefault("__metadata__", {})[KEY] = BLANK
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the tensors
        sealed = path.with_name(f"{path.name}.new")
        with sealed.open("w+b") as fresh:
            fresh.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, fresh, 1 << 22)
            place = 8 + text.index(f'"{KEY}":"'.encode()) + len(KEY) + 4
            fresh.seek(0)
            digest = hashlib.file_digest(fresh, "sha256").hexdigest()
            fresh.seek(place)
            fresh.write(digest.encode())
    sealed.replace(path)


def check_weights(path: Path) -> None:
    """Compare a file with the checksum in it, if there is one.

    Raises:
        ModelError: they differ.
    """
    with path.open("rb") as file:
        start = file.read(8)
        text = file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
        key = f'"{KEY}":"'.encode()
        place = text.find(key) + len(key)
        if place < len(key):
            return
        sha256 = hashlib.sha256(start + text[:place] + BLANK.encode() + text[place + len(BLANK) :])
        while block := file.read(1 << 22):
            sha256.update(block)
    if sha256.hexdigest().encode() != text[place : place + len(BLANK)]:
        raise ModelError(f"{path} is damaged: it does not have the checksum that it was saved with; copy it anew")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_checksum(value: Any) -> str:
    """SHA-256 of what JSON can hold, however it is written there."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
