"""The folders that tests share are built once per session, and nobody may change them."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.session import shared_once


def request_of(base: Path) -> Any:
    """As the request of a worker of xdist whose session has this folder."""
    factory = SimpleNamespace(getbasetemp=lambda: base / "worker")
    return SimpleNamespace(config=SimpleNamespace(workerinput={}), getfixturevalue=lambda _: factory)


def test_shared_folder_is_built_once_and_changes_are_reported(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        random.seed(0)
        (folder / "file").write_text("content")

    state = random.getstate()
    fixtures = [shared_once(request_of(tmp_path), "tiny", build) for _ in range(2)]
    folders = [next(fixture) for fixture in fixtures]
    assert folders == [tmp_path / "shared" / "tiny"] * 2 and built == folders[:1]
    assert random.getstate() == state
    with pytest.raises(StopIteration):
        next(fixtures[0])
    (folders[0] / "file").write_text("changed")
    with pytest.raises(AssertionError, match=r"copy it first: \['file'\]"):
        next(fixtures[1])


def test_shared_folder_is_built_again_after_a_failure(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError):
        next(shared_once(request_of(tmp_path), "tiny", fail))
    folder = next(shared_once(request_of(tmp_path), "tiny", lambda folder: (folder / "whole").touch()))
    assert [path.name for path in folder.iterdir()] == ["whole"]
