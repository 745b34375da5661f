"""A disk that fills up while a library writes is recognised; nothing is half-written, and with room it works."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from modeling_miniclip import MiniClipModel, MiniClipProcessor, export, load_captions, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.errors import MiniClipError, disk_error_message
from modeling_miniclip.search.approximate import build_neighbours
from modeling_miniclip.training.reports.figures import draw_curves
from modeling_miniclip.training.reports.reporting import MetricsLog
from modeling_miniclip.training.towers.feature_cache import FeatureTable
from modeling_miniclip.utils.files import replaced_folder
from tests.helpers.indexes import write_pictures
from tests.helpers.shards import pairs, write_tar
from tests.helpers.small_disks import BALLAST, fill, make_room, mounted_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    with mounted_disk(tmp_path / "disk") as mounted:
        yield mounted


def left_on(disk: Path) -> list[str]:
    """What is on the disk, without folders that a second start uses."""
    return sorted(path.name for path in disk.iterdir() if path.name not in (BALLAST, ".index.shards", "features"))


def assert_recovers(disk: Path, free: int, write: Callable[[], object]) -> None:
    """Writing fails with one line for lack of space, leaves nothing, and works as soon as there is room."""
    fill(disk, free)
    with pytest.raises((OSError, MiniClipError)) as raised:
        write()
    message = str(raised.value) if isinstance(raised.value, MiniClipError) else disk_error_message(raised.value)
    assert message is not None and "No space left on device" in message and "\n" not in message
    assert left_on(disk) == []
    make_room(disk)
    write()
    assert left_on(disk) != [] or (disk / "features").exists()


@pytest.mark.parametrize("free", [0, 100_000, 1_000_000])
def test_export_on_a_full_disk(disk: Path, tiny_export: Path, free: int) -> None:
    model, processor = MiniClipModel.from_pretrained(tiny_export), MiniClipProcessor.from_pretrained(tiny_export)
    assert_recovers(disk, free, lambda: export(model, processor, disk / "export"))


@pytest.mark.parametrize("free", [20_000, 300_000])
def test_file_of_pytorch_on_a_full_disk(disk: Path, free: int) -> None:
    def write() -> None:
        with replaced_folder(disk / "state") as fresh:
            torch.save({"a": torch.ones(50_000), "b": torch.ones(50_000)}, fresh / "state.bin")

    assert_recovers(disk, free, write)


def test_file_of_faiss_on_a_full_disk(disk: Path) -> None:
    pytest.importorskip("faiss")
    embeddings = np.random.default_rng(0).standard_normal((2_000, 64), dtype=np.float32)

    def write() -> None:
        with replaced_folder(disk / "neighbours") as fresh:
            build_neighbours(embeddings, fresh / "neighbours.faiss")

    assert_recovers(disk, 50_000, write)


@pytest.mark.parametrize("free", [12_288, 24_576])
def test_index_on_a_full_disk(disk: Path, tiny_export: Path, tmp_path: Path, free: int) -> None:
    write_pictures(tmp_path / "photos", "a.png b.png")
    assert_recovers(
        disk, free, lambda: update_index(disk / "index", [tmp_path / "photos"], tiny_export, progress=False)
    )


def test_cached_features_on_a_full_disk(disk: Path) -> None:
    def write() -> None:
        table = FeatureTable(disk / "features", {"tower": "a"}, 4, 100_000)
        for rows in (range(0, 2), range(2, 4)):
            if not table.done()[rows].all():
                table.write(rows, torch.ones(2, 100_000))
        assert torch.equal(table.read(), torch.ones(4, 100_000))

    assert_recovers(disk, 1_000_000, write)


@pytest.fixture
def shards(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an archive; HF_HOME is on the small disk."""
    monkeypatch.setattr(constants, "HF_HOME", str(disk / "hf"))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", pairs(map(str, range(100))))
    return tmp_path / "shards"


def assert_loads_with_room(disk: Path, free: int, source: str, cache: Path, message: str) -> None:
    """Loading fails with one line that names the folder and a way out, and works as soon as there is room."""
    fill(disk, free)
    with pytest.raises(MiniClipError, match=message) as raised:
        load_captions(source, cache_dir=cache)
    assert "No space left on device" in str(raised.value)
    make_room(disk)
    splits = load_captions(source, cache_dir=cache)
    assert sorted(caption for rows in splits.values() for (caption,) in rows["captions"]) == sorted(
        f"caption of {i}" for i in range(100)
    )


@pytest.mark.parametrize("free", [0, 8_192, 20_480])
def test_table_on_a_full_disk(disk: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(shards))
    message = f"table of the dataset cannot be stored in {disk}/tables: .*--dataset_cache_dir"
    assert_loads_with_room(disk, free, str(shards / "a.tar"), disk / "tables", message)
    assert len(list((disk / "tables").glob("[!.]*"))) == 1 and not list((disk / "tables").glob("*.new"))


@pytest.mark.parametrize("free", [0, 4_096])
def test_index_of_a_shard_on_a_full_disk(disk: Path, shards: Path, free: int) -> None:
    message = f"indexes of shards cannot be stored in {disk}/hf/miniclip/shards/indexes: .*HF_HOME"
    assert_loads_with_room(disk, free, str(shards), shards / "tables", message)
    assert len(list((disk / "hf/miniclip/shards/indexes").iterdir())) == 1


@pytest.mark.parametrize("free", [0, 20_480, 100_000])
def test_fetched_shard_on_a_full_disk(disk: Path, shards: Path, free: int) -> None:
    message = f"shards cannot be stored in {disk}/hf/miniclip/shards/fetched: .*HF_HOME"
    assert_loads_with_room(disk, free, f"file://{shards}/a.tar", shards / "tables", message)


def test_picture_on_a_full_disk(disk: Path) -> None:
    lines = [{"step": step, "epoch": step / 9, "split": "train", "loss": 1.0, "logit_scale": 1.0} for step in (1, 2)]
    assert_recovers(disk, 4_096, lambda: draw_curves(lines, disk / "curves.png"))


def test_log_on_a_full_disk(disk: Path) -> None:
    log = MetricsLog(disk / "metrics.jsonl", True)
    log.write(1, 0.5, "train", {"loss": 1.0})
    fill(disk, 0)
    with pytest.raises(OSError) as raised:
        for step in range(2, 200):
            log.write(step, 0.5, "train", {"loss": 1.0})
    assert "No space left on device" in str(disk_error_message(raised.value))
    make_room(disk)
    log.rewind()
    log.write(log.lines + 1, 0.5, "train", {"loss": 1.0})
    assert [line.startswith('{"step": ') for line in log.path.read_text().splitlines()] == [True] * log.lines


def test_corrected_copy_on_a_full_disk(disk: Path, captioned_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (captioned_folder / "captions.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([i, "0.png", f"{i} " + "long caption " * 70] for i in range(100, 140))
    command = ["check", str(captioned_folder / "captions.csv"), "--quick", "--fix", str(disk / "fixed.csv")]
    fill(disk, 8_192)
    assert cli(command) == 1 and left_on(disk) == []
    assert "No space left on device" in capsys.readouterr().err
    make_room(disk)
    cli(command)
    assert left_on(disk) == ["fixed.csv", "fixed.report.txt"]
