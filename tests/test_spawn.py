"""Start method spawn, the default on macOS and Windows: processes get what they need, and start no program again."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from modeling_miniclip import load_captions, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.data.checking.check import check
from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION, build_augmentation
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.hard_negatives import HardNegatives
from modeling_miniclip.data.loading.loader import BatchLoader, _CollatedBatches
from modeling_miniclip.data.shards import tar_index
from modeling_miniclip.data.shards.tar_index import build_indexes
from modeling_miniclip.search.index import ImageIndex
from modeling_miniclip.search.page.app import IndexPage
from modeling_miniclip.training.towers.feature_cache import CaptionFeatures, FeatureRows, FeatureTable
from tests.helpers.runs import ROOT, assert_same_log, environment, flags
from tests.helpers.shards import pairs, write_tar
from tests.helpers.towers import PIXELS, tiny_processor

KEYS = [(0, 1), (0, 0), (1, 2)]
# `python -c SPAWN SCRIPT FLAG...` runs a script on a system that spawns processes.
SPAWN = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method("spawn")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def spawning() -> Iterator[None]:
    """This process spawns others."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def split(captioned_folder: Path) -> Dataset:
    return load_captions(captioned_folder / "captions.csv", validation_fraction=0.25)["train"]


def with_text_features(split: Dataset, folder: Path) -> CaptionRows:
    counts = [len(captions) for captions in split["captions"]]
    table = FeatureTable(folder / "features", {}, sum(counts), 4)
    table.write(range(sum(counts)), torch.arange(4.0 * sum(counts)).view(-1, 4))
    features = CaptionFeatures(FeatureRows.of_tables([table]), np.cumsum([0, *counts]))
    return CaptionRows(split, tiny_processor(), text_features=features)


def rows_of(kind: str, split: Dataset, folder: Path) -> CaptionRows:
    processor = tiny_processor()
    if kind == "augmented":
        augmentation = build_augmentation(DEFAULT_AUGMENTATION, (PIXELS, PIXELS))
        return CaptionRows(split, processor, augmentation, captions_per_image=1)
    if kind == "negatives and keys":
        negatives = HardNegatives.from_sources(["swap"])
        return CaptionRows(split, processor, hard_negatives=negatives, finds_pairs=True)
    return with_text_features(split, folder)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["augmented", "negatives and keys", "text features"])
def test_a_pickled_dataset_gives_the_same_batches(kind: str, split: Dataset, tmp_path: Path) -> None:
    batches = _CollatedBatches(rows_of(kind, split, tmp_path))
    copy = ForkingPickler.loads(ForkingPickler.dumps(batches))
    expected, found = batches.__getitems__(KEYS), copy.__getitems__(KEYS)
    assert isinstance(expected, dict) and isinstance(found, dict)
    assert_same(expected, found)


def test_features_are_mapped_again_instead_of_copied(split: Dataset, tmp_path: Path) -> None:
    features: Any = with_text_features(split, tmp_path).text_features
    pickled = bytes(ForkingPickler.dumps(features.features))
    assert features.features.parts[0].numpy().tobytes() not in pickled and b"torch" not in pickled
    assert torch.equal(ForkingPickler.loads(pickled).parts[0], features.features.parts[0])


def test_search_and_eval_start_no_process(
    tiny_export: Path, tiny_index: Path, captioned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseProcess, "start", lambda process: pytest.fail(f"{process} was started"))
    update_index(tmp_path / "index", [tiny_index.parent / "photos"], tiny_export, progress=False)
    IndexPage(ImageIndex.open(tmp_path / "index"), tmp_path).search("a dog", None)
    argv = ["eval", str(tiny_export), str(captioned_folder), "--split", "train"]
    assert cli([*argv, f"--output_dir={tmp_path / 'eval'}"]) == 0


@pytest.mark.slow
def test_spawned_loader_gives_the_same_batches(split: Dataset, tmp_path: Path, spawning: None) -> None:
    rows = rows_of("augmented", split, tmp_path)
    expected = list(BatchLoader(rows, [KEYS, KEYS[:2]], 0))
    loader = BatchLoader(rows, [KEYS, KEYS[:2]], num_workers=1)
    assert loader.memory is None  # forked processes share it
    for one, other in zip(expected, loader, strict=True):
        assert_same(one, other)


@pytest.mark.slow
def test_spawned_processes_check_and_index(
    captioned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawning: None
) -> None:
    source, options = str(captioned_folder / "captions.csv"), {"validation_fraction": 0.5, "batch_size": 2}
    alone, spawned = (check(source, num_workers=workers, **options).problems for workers in (0, 1))
    assert alone == spawned
    monkeypatch.setattr(tar_index, "SMALL", 0)
    paths = [str(write_tar(tmp_path / f"{i}.tar", pairs("ab"))) for i in range(2)]
    build_indexes(paths, tmp_path / "cache", num_workers=2)
    assert all(tar_index._is_current(path, tmp_path / "cache", "caption") for path in paths)


@pytest.mark.slow
def test_training_spawns_loaders_and_runs_once(tiny_run: Path, tmp_path: Path) -> None:
    argv = flags(tiny_run.parent, str(tmp_path / "run"), num_workers=1, feature_cache_dir=tmp_path / "features")
    command = [sys.executable, "-c", SPAWN, str(ROOT / "train_miniclip.py"), *argv]
    run = subprocess.run(command, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert_same_log(tiny_run, tmp_path / "run")
