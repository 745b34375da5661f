"""Tables are built once, read by everybody, and never half-written."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from modeling_miniclip.data.tables.table_cache import cached_table, content_of, stat_of
from modeling_miniclip.errors import MiniClipError


def test_equal_keys_are_built_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "x").write_text("whole")

    first = cached_table(["a", 1], tmp_path, build)
    assert cached_table(["a", 1], tmp_path, build) == first
    assert cached_table(["a", 2], tmp_path, build) != first
    assert len(built) == 2
    assert (first / "x").read_text() == "whole"


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_table(["a"], tmp_path, fail)
    folder = cached_table(["a"], tmp_path, lambda folder: (folder / "y").write_text("whole"))
    assert [path.name for path in folder.iterdir()] == ["y"]


def test_half_written_table_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    name = cached_table(["a"], tmp_path, lambda folder: (folder / "y").write_text("whole")).name
    (tmp_path / name).rename(tmp_path / f".{name}.new")
    folder = cached_table(["a"], tmp_path, lambda folder: (folder / "z").write_text("again"))
    assert [path.name for path in folder.iterdir()] == ["z"]


def test_half_written_tables_of_killed_processes_are_removed(tmp_path: Path) -> None:
    from huggingface_hub.utils import WeakFileLock

    dead, alive = tmp_path / ".dead.new", tmp_path / ".alive.new"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "x").write_text("half")
    with WeakFileLock(alive.with_suffix(".lock")):
        cached_table(["a"], tmp_path, lambda folder: (folder / "y").write_text("whole"))
        assert (dead.exists(), alive.exists()) == (False, True)
    cached_table(["a"], tmp_path, lambda folder: (folder / "y").write_text("whole"))
    assert alive.exists(), "nothing was built"
    cached_table(["b"], tmp_path, lambda folder: (folder / "y").write_text("whole"))
    assert not alive.exists()


def test_two_builders_at_once_build_it_once(tmp_path: Path) -> None:
    built: list[int] = []

    def build(folder: Path) -> None:
        built.append(1)
        time.sleep(0.2)
        (folder / "x").write_text("whole")

    threads = [threading.Thread(target=cached_table, args=(["a"], tmp_path, build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_full_disk_names_the_flag(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MiniClipError, match="No space left on device.*--dataset_cache_dir"):
        cached_table(["a"], tmp_path, fill)


def test_edited_file_has_another_key(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("one")
    before, about = content_of(path), stat_of(path)
    path.write_text("two")
    os.utime(path, ns=(about[2], about[2]))  # an edit that keeps the size and the time
    assert content_of(path) != before
    assert stat_of(path) == about
