"""The result of a run: its metrics and model, and how a notebook shows it."""

import base64
import io
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from modeling_miniclip import ModelError, TrainResult, UsageError
from tests.helpers.runs import metrics_of


def test_result_of_a_finished_run(tiny_run: Path) -> None:
    result = TrainResult.load(tiny_run)
    assert result.history == metrics_of(tiny_run)
    validations = [line for line in result.history if line["split"] == "validation"]
    best = min(validations, key=lambda line: line["loss"])  # the run selects by the loss
    assert result.best_step == best["step"] and result.metrics["rsum"] == best["rsum"]
    assert not {"step", "split", "seconds"} & set(result.metrics)
    assert result.export == tiny_run / "export" and result.model.config.projection_dim == 16
    assert result.processor.tokenizer is not None
    other = pickle.loads(pickle.dumps(result))
    assert "_loaded" not in vars(other) and other.metrics == result.metrics


def test_a_notebook_shows_metrics_curves_and_pictures(tiny_run: Path) -> None:
    result = TrainResult.load(tiny_run)
    html = result._repr_html_()
    assert f"{result.metrics['rsum']:.1f}" in html and "R@1/5/10 text to image" in html
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]
    assert [picture.format for picture in pictures] == ["PNG", "JPEG"]
    assert all(0 < picture.width <= 640 for picture in pictures)
    assert len(html) < 400_000
    lines = str(result).splitlines()
    assert lines[0].endswith(f"the model of step {result.best_step} of {result.history[-1]['step']}")
    assert lines[-1].startswith("loss: ")


def test_the_model_that_a_run_starts_from_is_no_candidate() -> None:
    lines = [(0, "validation", 1.0), (5, "validation", 2.0), (9, "train", 0.1), (9, "validation", 3.0)]
    history = [{"step": step, "split": split, "loss": loss} for step, split, loss in lines]
    assert TrainResult(Path("x"), history).best_step == 5
    by_recall = [history[0] | {"step": 5, "rsum": 3.0}, history[0] | {"step": 9, "rsum": 5.0}]
    assert TrainResult(Path("x"), by_recall, "rsum").best_step == 9


def test_metrics_are_those_of_the_chosen_blend() -> None:
    history = [{"step": 9, "split": "validation", "rsum": 300.0}]
    for share, rsum in ((0.0, 200.0), (0.5, 310.0), (1.0, 300.0)):
        history.append({"step": 9, "split": "blend", "share": share, "rsum": rsum, "retained_rsum": 400 - rsum})
    result = TrainResult(Path("x"), [*history, {"step": 9, "split": "chosen blend", "share": 0.5}], "rsum")
    assert result.metrics == {"rsum": 310.0, "retained_rsum": 90.0} and result.best_step == 9
    assert TrainResult(Path("x"), history, "rsum").metrics == {"rsum": 300.0}, "interrupted before the choice"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run of MiniCLIP; name the output_dir of one"):
        TrainResult.load(tmp_path)
    empty = TrainResult(tmp_path)
    assert empty.metrics == {} and empty.best_step is None and "<img" not in empty._repr_html_()
    with pytest.raises(ModelError, match="cannot be loaded"):
        _ = empty.model
