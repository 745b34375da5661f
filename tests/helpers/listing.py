"""Folders that cannot be listed, for tests that run as root, who can list every folder."""

import os
from pathlib import Path
from typing import Any

import pytest


def unlistable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let every attempt to list these folders fail."""
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def denied(path: Any = ".", real: Any = real) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path) in folders:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path)

        monkeypatch.setattr(os, name, denied)
