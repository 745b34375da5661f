"""Whole runs of `train_miniclip.py` on a few small pictures."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from modeling_miniclip import MiniClipError, MiniClipModel, MiniClipProcessor, UsageError, encode_images, encode_texts
from modeling_miniclip.data.captions import load_captions
from modeling_miniclip.evaluation.metrics import METRIC_NAMES, validation_metrics
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.optimizer import clamp_logit_scale
from tests.helpers.forks import train_in_processes
from tests.helpers.runs import ROOT, assert_same_log, assert_same_weights, environment, flags, launch, metrics_of
from tests.helpers.session import snapshot
from tests.helpers.towers import PIXELS
from train_miniclip import cli, main, prepare

pytestmark = pytest.mark.usefixtures("without_finish")


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "export" / "model.safetensors")


def last_state(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((output_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def copy_run(tiny_run: Path, folder: Path, output_dir: str = "run") -> Path:
    """A copy of the shared run, of two epochs, that may be changed. Returns its folder."""
    return Path(shutil.copytree(tiny_run, folder / output_dir))


def without_times(output_dir: Path) -> list[dict[str, Any]]:
    noise = {"seconds", "pairs_per_second"}
    return [{k: v for k, v in line.items() if k not in noise} for line in metrics_of(output_dir)]


def test_exported_model_has_the_metrics_of_log_and_card(tiny_run: Path) -> None:
    export = tiny_run / "export"
    assert {path.name for path in tiny_run.iterdir()} >= {
        "arguments.yaml", "checkpoints", "curves.png", "export", "metrics.jsonl", "retrieval.png"
    }  # fmt: skip
    lines = metrics_of(tiny_run)
    assert [list(line)[:4] for line in lines] == [["step", "epoch", "split", "loss"]] * len(lines)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    validations = [line for line in lines if line["split"] == "validation"]
    assert [(line["step"], line["epoch"]) for line in validations] == [(3, 1.0), (6, 2.0)]
    assert all(set(METRIC_NAMES) <= set(line) for line in validations)
    best = min(validations, key=lambda line: line["loss"])

    model, processor = MiniClipModel.from_pretrained(export), MiniClipProcessor.from_pretrained(export)
    split = load_captions(tiny_run.parent / "scenes" / "captions.csv", validation_fraction=0.2)["validation"]
    images = encode_images(model, split, processor, progress=False)
    texts = encode_texts(model, [text for row in split["captions"] for text in row], processor, progress=False)
    owner = torch.arange(len(split)).repeat_interleave(5)
    metrics = validation_metrics(images, texts, owner, model.inverse_temperature().item())
    assert metrics["loss"] == pytest.approx(best["loss"], rel=1e-4)
    card = (export / "README.md").read_text()
    assert f"{best['loss']:.4f} nats" in card and f"{best['rsum']:.1f}" in card
    assert str(tiny_run.parent) not in card
    for name in ("curves.png", "retrieval.png"):
        with Image.open(tiny_run / name) as picture:
            assert min(picture.size) > 300


def test_saved_arguments_repeat_the_run_with_loader_workers(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tiny_run / "arguments.yaml"
    assert yaml.safe_load(recipe.read_text())["batch_size"] == 8
    main([f"--recipe={recipe}", f"--output_dir={tmp_path / 'again'}", "--num_workers=2"])
    assert_same(weights(tiny_run), weights(tmp_path / "again"))


def test_resumed_run_ends_as_an_uninterrupted_one(tiny_run: Path, tmp_path: Path) -> None:
    main(flags(tmp_path, num_train_epochs=1))
    main(flags(tmp_path, num_train_epochs=2, resume_from_checkpoint="latest"))
    assert_same(last_state(tiny_run), last_state(tmp_path / "run"))
    assert without_times(tiny_run) == without_times(tmp_path / "run")


def test_run_stopped_within_an_epoch_resumes_there(tmp_path: Path) -> None:
    # Without patience, an extra validation would lower the rates once more.
    same = {"num_train_epochs": 3, "lr_scheduler_kwargs": "{patience: 0, factor: 0.5}", "text_learning_rate": 0.1}
    main(flags(tmp_path, "whole", **same))
    main(flags(tmp_path, "parts", max_steps=5, **same))
    assert [line["epoch"] for line in metrics_of(tmp_path / "parts") if line["split"] == "validation"] == [
        1,
        1.6667,
    ]
    main(flags(tmp_path, "parts", resume_from_checkpoint="latest", **same))
    steps, expected = (
        [
            (line["loss"], line["text_learning_rate"])
            for line in metrics_of(tmp_path / name)
            if line["split"] == "train"
        ]
        for name in ("parts", "whole")
    )
    assert steps == expected and len({rate for _, rate in expected}) > 1
    # The extra validation leaves nothing in the log or the export.
    assert [line["step"] for line in metrics_of(tmp_path / "parts") if line["split"] == "validation"] == [3, 6, 9]
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert_same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))


def test_resuming_with_other_batches_raises_and_changes_nothing(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    with pytest.raises(UsageError, match="cannot change --batch_size 8 -> 4: .*--recipe"):
        main(flags(tmp_path, batch_size=4, resume_from_checkpoint="latest"))
    assert metrics_of(run) == metrics_of(tiny_run)


def test_resuming_from_an_earlier_checkpoint_needs_a_flag(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    values = {"max_steps": 4, "save_total_limit": 3, "resume_from_checkpoint": "step-00000003"}
    before = snapshot(run)
    with pytest.raises(UsageError, match="deletes the later step-00000006,.*--discard_later_checkpoints true"):
        main(flags(tmp_path, **values))
    assert snapshot(run) == before
    main(flags(tmp_path, discard_later_checkpoints=True, **values))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]
    assert [line["step"] for line in metrics_of(run) if line["split"] == "validation"] == [3, 4]
    with pytest.raises(UsageError, match="no such checkpoint.*step-00000003, step-00000004"):
        main(flags(tmp_path, resume_from_checkpoint="step-00000006"))


def test_ctrl_c_saves_validates_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = []

    def clamp_and_interrupt(model: MiniClipModel) -> None:
        clamp_logit_scale(model)
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("train_miniclip.clamp_logit_scale", clamp_and_interrupt)
    main(flags(tmp_path))
    assert re.search("Ctrl-C.*exported: the model of step 2; if.*export-interrupted", capsys.readouterr().out, re.S)
    lines = metrics_of(tmp_path / "run")
    assert [(line["step"], line["split"]) for line in lines] == [(1, "train"), (2, "train"), (2, "validation")]
    MiniClipModel.from_pretrained(tmp_path / "run" / "export")
    assert (tmp_path / "run" / "curves.png").is_file() and (tmp_path / "run" / "retrieval.png").is_file()
    interrupted = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    main(flags(tmp_path, max_steps=3, resume_from_checkpoint="latest"))
    assert [line["step"] for line in metrics_of(tmp_path / "run") if line["split"] == "train"] == [1, 2, 3]
    assert "export-interrupted: the model of step 2," in capsys.readouterr().out
    assert (tmp_path / "run" / "export-interrupted" / "model.safetensors").read_bytes() == interrupted
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() != interrupted


# What makes the steps of any number of processes equal; 21 training images give batches of 8, 8 and 5.
EXACT: dict[str, Any] = {
    "dropout": 0, "freeze_batch_norm": True, "batch_size": 8, "captions_per_image": 2, "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}  # fmt: skip


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    main(flags(tmp_path, "one", max_steps=4, **EXACT))
    train_in_processes(flags(tmp_path, "two", max_steps=4, **EXACT), 2, tmp_path / "log")
    assert_same_log(tmp_path / "one", tmp_path / "two")
    for part in ("export", "checkpoints/step-00000004"):
        assert_same_weights(tmp_path / "one" / part, tmp_path / "two" / part, 4e-3)  # at most a step's length


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"loss_type": "softmax_mean"}, {"loss_type": "sigmoid"}, {"num_workers": 2}])
def test_one_two_and_four_processes_have_equal_losses(tmp_path: Path, values: dict[str, Any]) -> None:
    long = EXACT | {"num_train_epochs": 7, "max_steps": 20, "lr_scheduler_type": "plateau"} | values
    main(flags(tmp_path, "1", **long))
    assert [line["step"] for line in metrics_of(tmp_path / "1") if line["split"] == "train"] == list(range(1, 21))
    for processes in (2, 4):
        result = launch(flags(tmp_path, str(processes), **long), processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"on {processes} x cpu" in result.stdout
        assert_same_log(tmp_path / "1", tmp_path / str(processes), norms=1e-2)


@pytest.mark.parametrize(
    "freeze", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vision", "text"))]
)
def test_frozen_towers_train_like_towers_that_run_each_step(tmp_path: Path, freeze: str) -> None:
    # Except for the batch norm of the ResNet, cached features must train like the tower that runs in each step.
    (tmp_path / "start").mkdir()
    start = prepare(parse_arguments(flags(tmp_path, "start", freeze=freeze, augmentation="[]"))).unwrapped_model
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    main(flags(tmp_path, "cached", freeze=freeze, augmentation="[]"))
    after = last_state(tmp_path / "cached")
    changed = {name for name in after if not torch.allclose(before[name], after[name], rtol=0, atol=1e-7)}
    frozen = {"vision": ["vision_model"], "text": ["text_model"], "both": ["vision_model", "text_model"]}[freeze]
    assert changed and not any(name.startswith(tuple(frozen)) for name in changed)
    # An augmentation that does nothing makes the image tower run in each step: the losses must be the same.
    nothing = json.dumps([{"name": "NoOp"}])
    main(flags(tmp_path, "run-each-step", freeze=freeze, augmentation=nothing))
    pairs = zip(metrics_of(tmp_path / "cached"), metrics_of(tmp_path / "run-each-step"), strict=True)
    assert all(one["loss"] == pytest.approx(two["loss"], rel=1e-4) for one, two in pairs)


def test_augmented_images_have_their_own_size(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = prepare(parse_arguments(flags(tmp_path, train_image_size=PIXELS + 16, frozen_vision_fraction=0.5)))
    shapes = [next(iter(loader))["pixel_values"].shape[1:] for loader in (run.train_loader, run.validation_loader)]
    assert shapes == [(3, PIXELS + 16, PIXELS + 16), (3, PIXELS, PIXELS)]
    frozen = [name for name, p in run.unwrapped_model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("vision_model.") for name in frozen)


def test_early_stopping_keeps_the_best_model(tmp_path: Path) -> None:
    # A learning rate that destroys the model: the first validation stays the best.
    main(
        flags(
            tmp_path, num_train_epochs=9, early_stopping_patience=2, best_metric="text_to_image_R@1", learning_rate=0.5
        )
    )
    validations = [line for line in metrics_of(tmp_path / "run") if line["split"] == "validation"]
    recalls = [line["text_to_image_R@1"] for line in validations]
    best = recalls.index(max(recalls))
    assert len(validations) == min(best + 3, 9) < 9
    assert f"{recalls[best]:.1f}" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_loss_of_nan_ends_the_run_and_keeps_the_export(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(tiny_run, tmp_path)
    monkeypatch.setattr(MiniClipModel, "inverse_temperature", lambda self: self.logit_scale * math.nan)
    with pytest.raises(MiniClipError, match="training loss became nan.*--head_learning_rate"):
        main(flags(tmp_path, num_train_epochs=3, resume_from_checkpoint="latest"))
    assert_same(weights(tiny_run), weights(run))


def test_earlier_run_is_overwritten_only_when_asked(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    with pytest.raises(UsageError, match="--resume_from_checkpoint latest.*--overwrite_output_dir"):
        main(flags(tmp_path, max_steps=1))
    with pytest.raises(UsageError, match="nowhere"):  # a mistake must not cost the earlier run
        main(flags(tmp_path, preset="nowhere.json", overwrite_output_dir=True))
    assert (run / "export" / "model.safetensors").exists()
    main(flags(tmp_path, max_steps=1, overwrite_output_dir=True))
    assert len(metrics_of(run)) == 2


def test_warm_start_continues_from_an_export(tiny_run: Path, tmp_path: Path) -> None:
    main(flags(tmp_path, preset=None, model_name_or_path=tiny_run / "export", max_steps=1, freeze_batch_norm=True,
               learning_rate=1e-12))  # fmt: skip
    first = metrics_of(tmp_path / "run")[-1]
    best = min(line["loss"] for line in metrics_of(tiny_run) if line["split"] == "validation")
    assert first["loss"] == pytest.approx(best, rel=1e-4)


def test_missing_image_ends_with_one_line_and_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_miniclip.py", *flags(tmp_path)])
    (tmp_path / "scenes" / "Images" / "003.png").unlink()
    assert cli() == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "003.png" in error and "row 17" in error
    assert not (tmp_path / "run" / "export").exists()


def test_help_and_wrong_flags_end_before_the_imports() -> None:
    # The modules are those of the process: importing torch would take seconds.
    code = (
        "import sys\nsys.argv = ['train_miniclip.py', '--batchsize', '3']\n"
        "try:\n    import train_miniclip\nexcept SystemExit as ended:\n"
        "    print(ended.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2 False\n"
    assert "did you mean --batch_size?" in result.stderr


def test_without_arguments_the_built_in_recipe_is_run() -> None:
    arguments = parse_arguments([])
    assert (arguments.recipe, arguments.dataset, arguments.preset) == ("scenes", ["scenes"], "scenes_tiny")


def test_tracker_gets_each_step_once_even_after_resuming(tmp_path: Path) -> None:
    main(flags(tmp_path, max_steps=2, checkpointing_steps=1, report_to="tensorboard"))
    resume = {"resume_from_checkpoint": "step-00000001", "discard_later_checkpoints": True}
    main(flags(tmp_path, max_steps=3, report_to="tensorboard", **resume))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "miniclip")).Reload()
    assert {"train/loss", "validation/loss", "validation/text_to_image_R@1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("validation/loss")] == [3]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [("notebook_launcher", 1), ("debug_launcher", 2)])
def test_main_works_from_python_and_from_a_launcher(tmp_path: Path, launcher: str, processes: int) -> None:
    call = f"{launcher}(main, ({flags(tmp_path, max_steps=2)!r},), num_processes={processes})"
    code = f"from accelerate import {launcher}\nfrom train_miniclip import main\n{call}\n"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"on {processes} x cpu" in result.stdout
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2
