"""Checksums of weights and indexes, so that a bit flipped on disk raises an error instead of giving wrong results."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .files import replace_file

KEY = "miniclip_sha256"  # entry in the metadata of the safetensors file; other programs save without it
BLANK = "0" * 64  # placeholder of the checksum, as long as a SHA-256 in hexadecimal


def seal_weights(path: Path) -> None:
    """Store the SHA-256 of a safetensors file in its own metadata, computed with zeros in place of the checksum."""
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
    replace_file(sealed, path)


def check_weights(path: Path) -> None:
    """Compare a safetensors file with the checksum in its metadata, if there is one.

    Raises:
        ModelError: the checksums differ.
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
        raise ModelError(f"{path} is damaged: its checksum differs from the one it was saved with; copy it again")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_checksum(value: Any) -> str:
    """SHA-256 of a value that JSON can represent; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
