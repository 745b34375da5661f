"""`--zero_shot_dataset`: class folders that each validation classifies."""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from accelerate import Accelerator

from modeling_miniclip import DataError, UsageError
from modeling_miniclip.data.scenes import render, sample_scenes
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import evaluate_model
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.zero_shot import load_zero_shot
from tests.helpers.forks import train_in_processes
from tests.helpers.runs import assert_same_log, flags, metrics_of
from tests.helpers.towers import PIXELS
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_finish")

EXACT: dict[str, Any] = {"dropout": 0, "freeze_batch_norm": True, "max_steps": 4, "eval_steps": 2}


def class_folders(root: Path, classes: int = 7) -> Path:
    """Folders of 2 or 3 scenes each. Returns the root."""
    scenes = iter(sample_scenes(3 * classes, seed=5))
    for label in range(classes):
        folder = root / f"class_{'abcdefg'[label]}"
        folder.mkdir(parents=True)
        for i in range(2 + label % 2):
            render(next(scenes), Random(i), PIXELS).save(folder / f"{i}.png")
    return root


def validations(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(output_dir) if line["split"] == "validation"]


@pytest.mark.parametrize("freeze", ["none", "both"])
def test_each_validation_classifies_as_eval_does(
    tmp_path: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = class_folders(tmp_path / "places")
    values = {"zero_shot_dataset": places, "best_metric": "zero_shot_top-1", "freeze": freeze, "augmentation": "[]"}
    main(flags(tmp_path, **values))
    found = validations(tmp_path / "run")
    best = max(found, key=lambda line: line["zero_shot_top-1"])
    report = evaluate_model(str(tmp_path / "run" / "export"), load_eval_set(str(places)))
    for k in (1, 5):
        assert best[f"zero_shot_top-{k}"] == pytest.approx(report["metrics"][f"top-{k}"], abs=1e-3)
    printed = capsys.readouterr().out
    assert f"zero-shot classification: {places}, all: 17 images of 7 classes" in printed
    assert f", zero-shot top-1/5 {best['zero_shot_top-1']:.1f} / {best['zero_shot_top-5']:.1f} *" in printed
    assert f"best zero_shot_top-1 {best['zero_shot_top-1']:.4g} at step {best['step']}" in printed
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    low, high = report["intervals"]["top-5"]
    top = f"top-5 {best['zero_shot_top-5']:.1f} ({low:.1f} to {high:.1f}) %."
    assert "Zero-shot classification of `places`, 17 images of 7 classes: top-1" in card and top in card
    assert str(tmp_path) not in card and "name: top-1 accuracy" in card


def test_two_processes_classify_and_validate_as_one(tmp_path: Path) -> None:
    places = class_folders(tmp_path / "places")
    (places / "class_c" / "0.png").write_bytes(b"no picture")
    values = EXACT | {"zero_shot_dataset": places, "max_bad_image_fraction": 0.1}
    main(flags(tmp_path, "one", **values))
    output = train_in_processes(flags(tmp_path, "two", **values), 2, tmp_path / "log")
    assert "on 2 x cpu" in output and output.count("skipped in zero_shot_dataset") == 1
    assert [line["step"] for line in validations(tmp_path / "two")] == [2, 3, 4]
    assert_same_log(tmp_path / "one", tmp_path / "two")
    assert "1 of 17 in zero_shot_dataset" in output


def test_resumed_run_needs_the_same_class_folders(tmp_path: Path) -> None:
    places = class_folders(tmp_path / "places")
    main(flags(tmp_path, zero_shot_dataset=places, max_steps=3))
    shutil.move(places, tmp_path / "moved")
    values = {"zero_shot_dataset": tmp_path / "moved", "resume_from_checkpoint": "latest", "max_steps": 4}
    main(flags(tmp_path, **values))
    assert [line["step"] for line in validations(tmp_path / "run")] == [3, 4]
    (tmp_path / "moved" / "class_a" / "0.png").unlink()
    with pytest.raises(DataError, match="--zero_shot_dataset has other images or classes"):
        main(flags(tmp_path, **values))


def test_folders_that_cannot_be_classified_are_errors(tmp_path: Path, captioned_folder: Path) -> None:
    few, accelerator = class_folders(tmp_path / "few", 5), Accelerator(cpu=True)
    for argv, message in (
        (["--zero_shot_dataset", str(captioned_folder)], "--zero_shot_dataset .*captioned: expected a folder with at"),
        (["--zero_shot_dataset", str(tmp_path / "none")], "--zero_shot_dataset .*none: expected a folder with at"),
        (["--zero_shot_dataset", str(few), "--best_metric", "zero_shot_top-5"], "few has 5 classes.*zero_shot_top-1"),
    ):
        with pytest.raises((DataError, UsageError), match=message):
            load_zero_shot(parse_arguments(["--dataset=scenes", *argv]), accelerator)
    with pytest.raises(UsageError, match="--best_metric zero_shot_top-1 needs --zero_shot_dataset"):
        parse_arguments(["--best_metric", "zero_shot_top-1"])
    folders = class_folders(tmp_path / "splits" / "validation", 2), class_folders(tmp_path / "splits" / "test", 2)
    shutil.rmtree(folders[1] / "class_a")
    data = load_zero_shot(parse_arguments(["--zero_shot_dataset", str(tmp_path / "splits")]), accelerator)
    assert data is not None and (data.split, data.at, len(data.image_ids)) == ("validation", (1,), 5)
