"""Tar archives made in memory."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.helpers.trees import picture

Members = Iterable[tuple[str, bytes]]


def tar_bytes(members: Members, archive_format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive with these members in this order; names may hold bytes that are not UTF-8, as surrogates."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=archive_format, errors="surrogateescape") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, members: Members, archive_format: int = tarfile.PAX_FORMAT) -> str:
    """Write an archive; returns its path as text."""
    path.write_bytes(tar_bytes(members, archive_format))
    return str(path)


def pairs(keys: Iterable[str], start: int = 0) -> list[tuple[str, bytes]]:
    """A picture and a text for each key; the text is `caption of KEY`."""
    members = []
    for i, key in enumerate(keys, start):
        members += [(f"{key}.png", picture(i)), (f"{key}.txt", f"caption of {key}".encode())]
    return members


def as_json(value: Mapping[str, Any] | list[Any]) -> bytes:
    """A JSON member."""
    return json.dumps(value).encode()
