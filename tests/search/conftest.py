"""Towers are loaded, and unrelated captions embedded, once per worker, not by every run of a command."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

# The package is not imported here: if these tests are named on the command line, this file is loaded before a worker
# forks its warm process, which does not have the package.


CAPTIONS: dict[tuple[int, int | None], Any] = {}  # embeddings, by the model and their dimensions


@cache
def load_tower_once(load_tower: Any, folder: Path, side: Any, saved: int) -> Any:
    """A tower with the weights that were saved in a folder at a time (in ns)."""
    return load_tower(folder, side)


@pytest.fixture(autouse=True)
def work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_miniclip.inference import loading
    from modeling_miniclip.search.building import merge, shards

    load_tower = loading.load_tower

    def load(folder: Path, side: Any) -> Any:
        return load_tower_once(load_tower, folder, side, max(path.stat().st_mtime_ns for path in folder.iterdir()))

    for module in (loading, merge, shards):
        monkeypatch.setattr(module, "load_tower", load)
    encode_texts = merge.encode_texts

    def encode_once(model: Any, texts: Any, *arguments: Any, truncate_dim: Any = None, **options: Any) -> Any:
        key = (id(model), truncate_dim)  # the models stay in the cache of towers
        if key not in CAPTIONS:
            CAPTIONS[key] = encode_texts(model, texts, *arguments, truncate_dim=truncate_dim, **options)
        return CAPTIONS[key].clone()

    monkeypatch.setattr(merge, "encode_texts", encode_once)
