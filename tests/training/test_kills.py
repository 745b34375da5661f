"""Runs that are killed at any moment, again and again, lose nothing that was complete and end as if they were not."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_miniclip import MiniClipModel
from modeling_miniclip.training.resuming.checkpoints import list_checkpoints
from tests.helpers.forks import Fork, fork, write_to
from tests.helpers.runs import flags, leave_out_figures
from tests.training.test_checkpoints import (
    PLATEAU,
    SETTINGS,
    assert_same_result,
    result_of,
    whole,  # noqa: F401  (a fixture)
)
from train_miniclip import main

KILLS = 50


def run_quietly(argv: list[str]) -> None:
    write_to(Path(os.devnull))
    leave_out_figures(pytest.MonkeyPatch())
    main(argv)


def start(argv: list[str]) -> Fork:
    """Start a run in a fork."""
    return fork(run_quietly, argv)


def assert_complete(run: Path, steps_before: list[str]) -> list[str]:
    """The checkpoints that were there are there or have a later one; all of them and the export load.

    Returns:
        Names of the checkpoints.
    """
    found = list_checkpoints(run / "checkpoints") if (run / "checkpoints").exists() else []
    assert not steps_before or (found and found[-1].name >= steps_before[-1]), "what was complete is gone"
    for checkpoint in found:
        names = {path.name for path in checkpoint.iterdir()}
        assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"} <= names
        load_file(checkpoint / "model.safetensors")
        for path in (*checkpoint.glob("*.bin"), *checkpoint.glob("*.pkl")):
            torch.load(path, weights_only=False)
    for export in (run / "export", *(checkpoint / "export" for checkpoint in found)):
        if export.exists():
            MiniClipModel.from_pretrained(export)
    return [path.name for path in found]


@pytest.mark.long
def test_runs_killed_at_random_moments_lose_nothing(
    tmp_path: Path,
    whole: Any,  # noqa: F811
    record_property: Any,
) -> None:
    expected, _ = whole(PLATEAU)
    began = time.monotonic()
    process = start(flags(tmp_path / "timed", **SETTINGS[PLATEAU]))
    process.join(600)
    seconds = time.monotonic() - began
    seed = os.getpid()
    rng = random.Random(seed)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        argv = [*flags(folder, **SETTINGS[PLATEAU]), "--resume_from_checkpoint=latest"]
        runs, ended, steps = runs + 1, False, []
        while not ended:
            process = start(argv)
            process.join(rng.uniform(0, seconds) if kills < KILLS else 600)
            ended = process.exitcode == 0
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                assert process.exitcode == -signal.SIGKILL
            assert ended or process.exitcode == -signal.SIGKILL, f"seed {seed}, run {runs}, after {kills} kills"
            steps = assert_complete(folder / "run", steps)
        assert_same_result(result_of(folder / "run"), expected)
    print(f"{kills} kills, {runs} runs, seed {seed}")
    record_property("kills", kills)
