"""Whatever wraps the model (a compiler, several processes, averages), a run's files are those of a plain run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.forks import train_in_processes
from tests.helpers.runs import assert_same_log, assert_same_weights, flags
from train_miniclip import main

# What makes the steps of any number of processes equal.
EXACT: dict[str, Any] = {"dropout": 0, "freeze_batch_norm": True, "num_train_epochs": 1}
STEP = 4e-3  # keys' biases have no gradient but rounding, which AdamW turns into whole steps
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "eager"}

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Runs are compiled by `accelerator.prepare`; the compiled model computes as it is, as compiling takes seconds."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with torch.compiler.set_stance("force_eager"):
        yield monkeypatch


def test_compiled_run_goes_on_as_a_plain_one(tmp_path: Path, compiled: pytest.MonkeyPatch) -> None:
    averaged = EXACT | {"ema_decay": 0.5}
    main(flags(tmp_path, "mixed", **averaged, max_steps=1))
    compiled.delenv("ACCELERATE_DYNAMO_BACKEND")
    main(flags(tmp_path, "mixed", **averaged, max_steps=2, resume_from_checkpoint="latest"))
    compiled.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    main(flags(tmp_path, "mixed", **averaged, max_steps=3, resume_from_checkpoint="latest"))
    compiled.delenv("ACCELERATE_DYNAMO_BACKEND")
    main(flags(tmp_path, "plain", **averaged, max_steps=3))
    for part in ("export", "checkpoints/step-00000003"):
        assert_same_weights(tmp_path / "plain" / part, tmp_path / "mixed" / part, 0)
    assert_same_log(tmp_path / "plain", tmp_path / "mixed")


@pytest.mark.slow
def test_compiled_training_equals_plain_training(tmp_path: Path) -> None:
    main(flags(tmp_path, "plain", **EXACT, max_steps=1))
    train_in_processes(flags(tmp_path, "compiled", **EXACT, max_steps=1), 1, tmp_path / "log", COMPILED)
    assert_same_log(tmp_path / "plain", tmp_path / "compiled")
    assert_same_weights(tmp_path / "plain" / "export", tmp_path / "compiled" / "export", STEP)


@pytest.mark.long
def test_two_compiled_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    main(flags(tmp_path, "one", **EXACT))
    train_in_processes(flags(tmp_path, "compiled", **EXACT, max_steps=1), 2, tmp_path / "log", COMPILED)
    resumed = flags(tmp_path, "compiled", **EXACT, resume_from_checkpoint="latest")
    train_in_processes(resumed, 2, tmp_path / "log", COMPILED)
    assert_same_log(tmp_path / "one", tmp_path / "compiled")
    assert_same_weights(tmp_path / "one" / "export", tmp_path / "compiled" / "export", STEP)
