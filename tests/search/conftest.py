"""Towers are loaded once per worker, not by every run of a command."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

# The package is not imported here: if these tests are named on the command line, this file is loaded before a worker
# forks its warm process, which does not have the package.


@cache
def load_tower_once(load_tower: Any, folder: Path, side: Any, saved: int) -> Any:
    """A tower with the weights that were saved in a folder at a time (in ns)."""
    return load_tower(folder, side)


@pytest.fixture(autouse=True)
def towers_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_miniclip.inference import loading
    from modeling_miniclip.search.building import shards

    load_tower = loading.load_tower

    def load(folder: Path, side: Any) -> Any:
        return load_tower_once(load_tower, folder, side, max(path.stat().st_mtime_ns for path in folder.iterdir()))

    for module in (loading, shards):
        monkeypatch.setattr(module, "load_tower", load)
