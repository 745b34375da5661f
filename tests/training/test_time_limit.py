"""`--time_limit`: how many steps fit, the schedule that ends with them, and the same run without a clock."""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_miniclip.training import pace as paces
from modeling_miniclip.training import time_limit
from modeling_miniclip.training.command_line.recipes import read_recipe
from modeling_miniclip.training.optimizer import build_scheduler, cosine, set_length
from modeling_miniclip.training.pace import Pace, Rest, in_words, largest
from modeling_miniclip.training.resuming.fingerprint import Fingerprint
from modeling_miniclip.training.time_limit import NO_END, last_step_of
from tests.helpers.runs import assert_same_log, assert_same_weights, flags, launch, metrics_of, plain_arguments
from train_miniclip import main

# --- how many steps fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "seconds"),
    [
        (3, 0 + 5 + 2 + 4),  # a part of an epoch: a validation and a checkpoint at the end
        (10, 7 + 5 + 2 + 4),
        (15, 12 + 2 * 5 + 2 * 2 + 4),
        (20, 17 + 2 * 5 + 2 * 2 + 4),
        (21, 18 + 3 * 5 + 3 * 2 + 4),
    ],
)
def test_rest_counts_validations_and_checkpoints(last: int, seconds: int) -> None:
    rest = Rest(done=3, steps_per_epoch=10, step=1.0, validation=5.0, checkpoint=2.0, end=4.0)
    assert rest.seconds(last) == seconds


def test_rest_counts_what_is_due_now() -> None:
    assert Rest(done=10, steps_per_epoch=10, step=1.0, validation=5.0).seconds(10) == 5
    further = Rest(done=1, steps_per_epoch=10, step=1.0, validation=1.0, eval_steps=4)
    assert further.seconds(20) == 19 + 2 + 4, "steps 4, 8, 12 and 16; step 20 ends an epoch"
    assert Rest(done=1, steps_per_epoch=10, step=1.0, checkpoint=1.0, checkpointing_steps=3).seconds(10) == 9 + 3 + 1


def test_last_step_is_the_largest_that_fits() -> None:
    rest = Rest(done=3, steps_per_epoch=10, step=1.0, validation=5.0, checkpoint=2.0, end=4.0)
    assert [rest.last_step(seconds) for seconds in (35.0, 34.0, 42.9, 43.0)] == [20, 19, 20, 21]
    assert rest.last_step(0.0) == rest.last_step(3.0) == 3, "no step fits"
    for seconds in range(200):
        last = rest.last_step(float(seconds))
        assert rest.seconds(last + 1) > seconds and (last == 3 or rest.seconds(last) <= seconds)
    assert largest(lambda number: number < 6, 2, 9) == 5 and largest(lambda number: False, 2, 9) == 2


def test_pace_leaves_validations_out_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(paces, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pace = Pace(started=90.0)
    assert not pace.is_known and pace.elapsed == 10
    for seconds in (7.0, 1.5, 1.5, 1.5):  # the first step also starts the loader
        clock.now += seconds
        pace.count_step()
    assert pace.step_seconds == 1.5 and not pace.is_known
    clock.now += 6.0
    pace.add_validation(6.0)
    clock.now += 1.5
    pace.count_step()
    assert pace.step_seconds == 1.5 and pace.is_known and pace.validations == [6.0], "four steps took 6 seconds"


def test_times_are_in_words() -> None:
    words = [in_words(seconds) for seconds in (0.2, 61.0, 125.0, 720.0, 12_600.0)]
    assert words == ["2 seconds", "61 seconds", "2 minutes", "12 minutes", "3.5 hours"]


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_holds_before_it_decays() -> None:
    factor = cosine(
        plain_arguments(lr_scheduler_type="cosine", warmup_steps=2, lr_scheduler_kwargs="{hold_steps: 3}"), 9
    )
    assert [factor(step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert factor(7) == pytest.approx(0.5) and factor(9) == pytest.approx(0)


def test_schedule_without_an_end_starts_like_any_other() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    arguments = plain_arguments(lr_scheduler_type="cosine", warmup_steps=2)
    scheduler = build_scheduler(optimizer, arguments, NO_END)
    rates = []
    for step in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if step == 3:  # four steps are done
            arguments = replace(arguments, lr_scheduler_kwargs="{hold_steps: 2}")
            set_length(scheduler, arguments, 9)
    assert rates == [cosine(arguments, 9)(step) for step in range(9)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_last_step_is_open_until_it_is_planned() -> None:
    assert last_step_of(plain_arguments(num_train_epochs=None), 10) == NO_END
    assert last_step_of(plain_arguments(num_train_epochs=3, max_steps=25), 10) == 25
    assert last_step_of(plain_arguments(num_train_epochs=3), 10) == 30


HELD = '{"hold_steps": 2}'

# --- runs ------------------------------------------------------------------------------------------------------------

# 21 training images: epochs of three steps. The limit is never reached; the tests decide instead of the clock.
LIMITED: dict[str, Any] = {
    "time_limit": "1h", "num_train_epochs": None, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    "checkpointing_steps": 2, "save_total_limit": 9,
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """After four steps it turns out that seven fit."""
    monkeypatch.setattr(time_limit, "planned_last_step", lambda run, limit: 7 if run.progress.step == 4 else None)


def test_saved_arguments_repeat_a_run_without_a_clock(
    tmp_path: Path, planned: None, without_finish: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags(tmp_path, **LIMITED))
    out = capsys.readouterr().out
    assert "steps 1 to as many as fit into 1h of 8 images" in out and "--time_limit 1h: 7 steps, 2.333 epochs" in out
    saved = read_recipe(tmp_path / "run" / "arguments.yaml")
    assert (saved["num_train_epochs"], saved["max_steps"], saved["lr_scheduler_kwargs"]) == (3, 7, HELD)
    assert "time_limit" not in saved
    rates = [line["head_learning_rate"] for line in metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert rates == pytest.approx([1e-3 * factor for factor in (0.5, 1, 1, 1, 1, 0.75, 0.25)])
    main([f"--recipe={tmp_path / 'run' / 'arguments.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    assert_same_log(tmp_path / "run", tmp_path / "again")
    assert_same_weights(tmp_path / "run" / "export", tmp_path / "again" / "export", 0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])  # before and after the rest is planned
def test_resumed_run_keeps_its_number_of_steps(tmp_path: Path, planned: None, without_finish: None, step: int) -> None:
    main(flags(tmp_path, "whole", **LIMITED))
    main(flags(tmp_path, "parts", **LIMITED))
    checkpoint = tmp_path / "parts" / "checkpoints" / f"step-0000000{step}"
    assert Fingerprint.load(checkpoint).flags["max_steps"] == (None if step == 2 else 7)
    main(flags(tmp_path, "parts", resume_from_checkpoint=checkpoint.name, discard_later_checkpoints=True, **LIMITED))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
    saved = read_recipe(tmp_path / "parts" / "arguments.yaml")
    assert (saved["num_train_epochs"], saved["max_steps"], saved["lr_scheduler_kwargs"]) == (3, 7, HELD)


def test_every_run_says_how_long_it_will_take(
    tmp_path: Path, without_finish: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paces, "MEASURED_STEPS", 3)
    main(flags(tmp_path))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " left, " in line]
    assert line.startswith("about ") and line.endswith(" s per step")


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_run_ends_in_time(tmp_path: Path, processes: int) -> None:
    values = LIMITED | {"time_limit": "60s", "checkpointing_steps": "epoch"}
    start = time.perf_counter()
    done = launch(flags(tmp_path, **values), processes)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-2000:]
    assert abs(seconds - 60) < (3 if processes == 1 else 12), "the launcher's own seconds do not count"
    saved = read_recipe(tmp_path / "run" / "arguments.yaml")
    steps = saved.get("max_steps") or 3 * saved["num_train_epochs"]
    lines = [line for line in metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert lines[-1]["step"] == steps and math.isclose(lines[-1]["head_learning_rate"], 0, abs_tol=1e-4)
