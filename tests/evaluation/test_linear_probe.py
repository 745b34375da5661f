"""Logistic regression on frozen image features."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_miniclip import DataError, MiniClipError
from modeling_miniclip.cli import cli
from modeling_miniclip.evaluation import linear_probe as probe
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import probe_sets
from modeling_miniclip.evaluation.linear_probe import ProbeSets, few_shot, search, split_features

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def colours(root: Path, count: int) -> Path:
    """Folders of pictures in shades of a colour. Returns the root."""
    rng = np.random.default_rng(count)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            shade = np.clip(np.array(colour) + rng.integers(-30, 30, 3), 0, 255).astype(np.uint8)
            Image.fromarray(np.full((40, 40, 3), shade)).save(root / name / f"{i}.png")
    return root


def test_search_halves_the_interval_around_the_best_value() -> None:
    asked = []

    def score(c: float) -> float:
        asked.append(c)
        return -abs(math.log10(c) - 1.7)

    found = search(score)
    assert abs(math.log10(found) - 1.7) < 1 / 16 + 1e-9, "eight values per power of ten"
    assert len(asked) <= 7 + 2 * 4
    assert search(lambda c: 1.0) == min(probe.COARSE), "of equals, the strongest regularisation"


def test_held_out_images_are_a_fifth_of_each_class() -> None:
    label = np.repeat([0, 1], [20, 10])
    features, test = np.arange(30.0)[:, None], (np.zeros((1, 1)), np.zeros(1))
    sets = split_features({"train": (features, label), "test": test}, seed=0)
    assert np.bincount(sets.chosen_by[1]).tolist() == [4, 2] and np.bincount(sets.train[1]).tolist() == [16, 8]
    assert sorted([*sets.chosen_by[0][:, 0], *sets.train[0][:, 0]]) == list(range(30))
    other = split_features({"train": (features, label), "test": test}, seed=1)
    assert other.chosen_by[0].tolist() != sets.chosen_by[0].tolist()
    named = split_features({"train": (features, label), "validation": test, "test": test}, seed=0)
    assert named.chosen_by is test and len(named.train[1]) == 30


def test_interval_of_draws_is_that_of_student(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.6] * 5)
    drawn = []

    class Classifier:
        def score(self, *test: Any) -> float:
            return next(scores)

    def fit(train: Any, c: float) -> Classifier:
        drawn.append(train[0][:, 0].tolist())
        return Classifier()

    monkeypatch.setattr(probe, "fit", fit)
    monkeypatch.setattr(probe, "best_c", lambda *sets: 1.0)
    train = np.arange(12.0)[:, None], np.repeat([0, 1, 2], 4)
    row = few_shot(ProbeSets(train, train, train), 2, seed=0)
    # standard deviation of 50, 60, 50, ... over ten draws: 5.27; its mean's: 1.667
    assert row["top-1"] == pytest.approx(55) and row["interval"] == pytest.approx((51.23, 58.77), abs=0.01)
    assert row["draws"] == 10 and all([int(i) // 4 for i in rows] == [0, 0, 1, 1, 2, 2] for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 5


def test_probe_learns_colours_and_is_reported(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    folder = colours(tmp_path / "colours", 12)
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    assert cli(["eval", str(tiny_export), "--linear_probe", str(folder), "--validation_fraction", "0.25"]) == 1
    printed, warning = capsys.readouterr()
    assert "broken.png" in warning
    assert f"linear probe, {folder}: 3 classes, " in printed and "images per class" in printed
    data = probe_sets(str(folder), 0.25)
    encoder = open_encoder(str(tiny_export), "MODEL")
    report = probe.linear_probe(encoder, data)
    assert [row["images_per_class"] for row in report["rows"]] == ["zero-shot", "1", "4", "all"]
    found = {row["images_per_class"]: row for row in report["rows"]}
    assert found["all"]["top-1"] >= 90 and found["all"]["top-1"] >= found["1"]["top-1"]
    assert report["train_images"] + report["test_images"] < 37 and list(report["skipped"]) == ["red/broken.png"]
    features = encoder.image_features(data["test"].images[-2:], 2, False)
    assert features.shape == (2, encoder.model.vision_model.pooled_size)  # type: ignore[attr-defined]
    assert not torch.allclose(features.norm(dim=-1), torch.ones(2))


def test_folders_without_two_splits_are_errors(
    tiny_export: Path, tmp_path: Path, captioned_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = tmp_path / "splits"
    colours(splits / "train", 2), colours(splits / "val", 1)
    assert {name: part.split for name, part in probe_sets(str(splits)).items()} == {
        "train": "train", "test": "validation"
    }  # fmt: skip
    colours(splits / "test", 1)
    assert {name: part.split for name, part in probe_sets(str(splits)).items()} == {
        "train": "train", "test": "test", "validation": "validation"
    }  # fmt: skip
    (splits / "test" / "red").rename(splits / "test" / "pink")
    with pytest.raises(DataError, match="the class folders of train are not those of the others"):
        probe_sets(str(splits))
    with pytest.raises(DataError, match="class 'blue' has one image"):
        probe_sets(str(colours(tmp_path / "single", 1)))
    with pytest.raises(DataError, match="--linear_probe .*captioned: expected a folder with at least two folders"):
        probe_sets(str(captioned_folder))
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    with pytest.raises(MiniClipError, match=r"needs scikit-learn: pip install scikit-learn"):
        probe.check_probe()
