"""When a run validates: at the ends of epochs, every `--eval_steps`, and before the first step of a trained model."""

import signal
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip.modeling_miniclip import MiniClipModel
from modeling_miniclip.training.optimizer import clamp_logit_scale
from modeling_miniclip.training.reports.reporting import describe_best
from modeling_miniclip.training.resuming.checkpoints import Progress
from tests.helpers.runs import assert_same_log, assert_same_weights, flags, metrics_of
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_finish")

# 21 training images: epochs of three steps.
EVERY_TWO: dict[str, Any] = {"eval_steps": 2, "checkpointing_steps": 1, "save_total_limit": 9}


def validations(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(output_dir) if line["split"] == "validation"]


@pytest.mark.parametrize(
    "checkpoints",
    [["latest"], pytest.param(["step-00000001", "step-00000004", "step-00000003"], marks=pytest.mark.slow)],
)
def test_resumed_runs_repeat_the_validations_of_eval_steps(
    tmp_path: Path, checkpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(flags(tmp_path, "whole", **EVERY_TWO))
    assert [line["step"] for line in validations(tmp_path / "whole")] == [2, 3, 4, 6]

    def interrupt_in_step_two(model: MiniClipModel) -> None:
        clamp_logit_scale(model)
        if (taken := next(steps)) == 2:
            signal.raise_signal(signal.SIGINT)
        assert taken < 3

    steps = iter(range(1, 9))
    with monkeypatch.context() as patch:
        patch.setattr("train_miniclip.clamp_logit_scale", interrupt_in_step_two)
        main(flags(tmp_path, "parts", **EVERY_TWO))  # validates at the end, after the checkpoint
    argv = flags(tmp_path, "parts", discard_later_checkpoints=True, **EVERY_TWO)
    for checkpoint in checkpoints:
        main([*argv, f"--resume_from_checkpoint={checkpoint}"])
        assert_same_log(tmp_path / "whole", tmp_path / "parts")
        for part in ("export", "checkpoints/step-00000006"):
            assert_same_weights(tmp_path / "whole" / part, tmp_path / "parts" / part, 0)
        assert not (tmp_path / "parts" / "export-interrupted").exists()


def test_patience_counts_validations_within_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A learning rate that destroys the model: the first validation stays the best.
    values: dict[str, Any] = {
        "eval_steps": 1,
        "early_stopping_patience": 1,
        "learning_rate": 0.5,
        "best_metric": "rsum",
    }
    main(flags(tmp_path, **values))
    found = validations(tmp_path / "run")
    sums = [line["rsum"] for line in found]
    assert len(found) < 6 and sums[-1] <= max(sums[:-1]) and sorted(set(sums[:-1])) == sums[:-1]
    assert "early stopping: rsum did not improve for 1 validations" in capsys.readouterr().out
    main(flags(tmp_path, resume_from_checkpoint="latest", **values))
    assert len(validations(tmp_path / "run")) == len(found), "it had stopped"


def test_trained_model_is_validated_before_the_first_step(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = min(validations(tiny_run), key=lambda line: line["loss"])
    start = {"preset": None, "model_name_or_path": tiny_run / "export", "learning_rate": 0.02}
    main(flags(tmp_path, max_steps=1, **start))
    before, after = validations(tmp_path / "run")
    assert (before["step"], before["epoch"], after["step"]) == (0, 0.0, 1)
    assert all(before[name] == pytest.approx(best[name], rel=1e-4) for name in best if "R@" in name or name == "loss")
    printed = capsys.readouterr().out
    assert f"before training: loss {before['loss']:.4f}, R@1/5/10 text to image" in printed
    assert f"best loss {after['loss']:.4g} at step 1, before training {before['loss']:.4g}" in printed
    main(flags(tmp_path, resume_from_checkpoint="latest", **start))
    assert [line["step"] for line in validations(tmp_path / "run")] == [0, 3, 6], "it is not repeated"
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    recalls = " | ".join(f"{before[f'image_to_text_R@{k}']:.1f}" for k in (1, 5, 10))
    assert f"| image to text, before training | {recalls} | {before['image_to_text_median_rank']:g} |\n" in card
    assert f", and was {before['rsum']:.1f} before training. The contrastive" in card


def test_end_of_a_run_names_its_best_value_and_that_before() -> None:
    assert describe_best("rsum", Progress(best_value=300.0, best_step=7)) == ["best rsum 300 at step 7"]
    better = Progress(best_value=300.0, best_step=7, at_start={"rsum": 200.0})
    assert describe_best("rsum", better) == ["best rsum 300 at step 7, before training 200"]
    worse = Progress(best_value=0.5, best_step=7, at_start={"loss": 0.25})
    assert len(describe_best("loss", worse)) == 2
