"""Caches whose writer is killed at any moment, and which several processes write at once, have the right content."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import constants

from modeling_miniclip import load_captions
from modeling_miniclip.data import load_rows
from modeling_miniclip.data.shards.tar_index import open_index
from modeling_miniclip.training.towers.feature_cache import FeatureTable
from tests.helpers.forks import fork
from tests.helpers.kills import at_change, die_at_byte, die_at_each_change, gate, pass_gate
from tests.helpers.shards import pairs, write_tar
from tests.helpers.trees import picture

FEATURES = torch.arange(400.0).view(8, 50)


def read_table(source: Path, cache: Path) -> Any:
    """The rows of a source, through a table, and for archives their indexes, below a folder."""
    with patch.object(constants, "HF_HOME", str(cache)):
        splits = load_captions(source, validation_fraction=0.25, cache_dir=cache / "tables")
    return {split: rows.remove_columns("image")[:] for split, rows in splits.items()}


def read_index(source: Path, cache: Path) -> Any:
    """The images of an archive, through an index below a folder."""
    return [tuple(entry) for entry in open_index(str(source), cache)]


def read_features(source: Path, cache: Path) -> Any:
    """Cached features below a folder; what is not there yet is computed, what is there must be right."""
    table = FeatureTable(cache, {"tower": source.name}, *FEATURES.shape)
    done = table.done()
    assert torch.equal(table.read()[done], FEATURES[done])
    for rows in ([0, 1, 2, 6], [5, 4, 3, 7]):
        if not done[rows].all():
            table.write(rows, FEATURES[rows])
    assert table.done().all()
    return table.read().tolist()


def write_captions(folder: Path) -> Path:
    """A caption file with images in three splits of files, and rows that are to be joined."""
    for i in range(8):
        (folder / f"{i}.png").write_bytes(picture(i))
    rows = "".join(f"{i % 8}.png,caption {i}\n" for i in range(16))
    (folder / "captions.csv").write_text(f"image,caption\n{rows}", encoding="utf-8")
    for split, names in (("train", "0123"), ("validation", "45"), ("test", "67")):
        (folder / f"{split}.txt").write_text("".join(f"{name}.png\n" for name in names), encoding="utf-8")
    return folder / "captions.csv"


def write_archives(folder: Path) -> Path:
    """A folder of archives."""
    (folder / "shards").mkdir()
    for i in range(3):
        write_tar(folder / "shards" / f"{i}.tar", pairs([f"{i}{k}" for k in range(4)]))
    return folder / "shards"


def write_archive(folder: Path) -> Path:
    """An archive."""
    return Path(write_tar(folder / "a.tar", pairs("abcdef")))


# Each kind of cache: how to make a source, how to read it through the cache, and at how many changes it can be killed.
CACHES: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path], Any], int]] = {
    "table": (write_captions, read_table, 7),
    "table and indexes": (write_archives, read_table, 9),
    "index": (write_archive, read_index, 2),
    "features": (write_archive, read_features, 10),
}


@pytest.mark.parametrize(
    "kind", ["table", "index", "features", pytest.param("table and indexes", marks=pytest.mark.slow)]
)
def test_killed_writers_leave_nothing_half_written(tmp_path: Path, kind: str) -> None:
    write, read, fewest = CACHES[kind]
    source, killed = write(tmp_path), tmp_path / "killed"
    killed.mkdir()
    expected = read(source, tmp_path / "whole")
    process = fork(die_at_each_change, killed, partial(read, source))
    process.join()
    assert process.result >= fewest
    for number in range(process.result):
        assert read(source, killed / str(number)) == expected, f"killed before change {number}"


def read_until_byte(read: Callable[[Path, Path], Any], source: Path, cache: Path, size: int) -> None:
    die_at_byte(size)
    read(source, cache)


@pytest.mark.parametrize("kind", CACHES)
def test_writers_that_die_within_a_file(tmp_path: Path, kind: str) -> None:
    write, read, _ = CACHES[kind]
    source = write(tmp_path)
    process = fork(read_until_byte, read, source, tmp_path / "cache", 200)
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert read(source, tmp_path / "cache") == read(source, tmp_path / "whole")


# --- several processes ----------------------------------------------------------------------------------------------


def read_with_others(read: Callable[[Path, Path], Any], source: Path, cache: Path) -> tuple[Any, int]:
    """What is read once the gate is open, and how many tables this process built for it."""
    with patch.object(load_rows, "build_table", wraps=load_rows.build_table) as build:
        pass_gate(source.with_name("gate"))
        return read(source, cache), build.call_count


@pytest.mark.parametrize("kind", ["table and indexes", "features"])
def test_processes_that_need_the_same_cache_at_once(tmp_path: Path, kind: str) -> None:
    write, read, _ = CACHES[kind]
    source = write(tmp_path)
    with gate(tmp_path / "gate"):
        processes = [fork(read_with_others, read, source, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.result[0] for process in processes] == [read(source, tmp_path / "whole")] * 3
    assert sum(process.result[1] for process in processes) == ("table" in kind)


def read_after_others(read: Callable[[Path, Path], Any], source: Path, cache: Path) -> Any:
    """What is read by a process that stops before it gives the first file of a cache its name."""
    at_change(cache, 0, partial(pass_gate, source.with_name("gate")), frozenset({"os.rename"}))
    return read(source, cache)


@pytest.mark.parametrize("kind", ["index", "features"])
def test_the_slower_of_two_writers_changes_nothing(tmp_path: Path, kind: str) -> None:
    write, read, _ = CACHES[kind]
    source, cache = write(tmp_path), tmp_path / "cache"
    with gate(tmp_path / "gate"):
        process = fork(read_after_others, read, source, cache)
        expected = read(source, cache)
    process.join()
    assert process.result == expected == read(source, cache)
