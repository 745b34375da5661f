"""`benchmarks/gpu.py`: all of its parts run, here on the CPU with tiny towers."""

import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, environment

IN_THIS_PROCESS = ["agreement", "memory", "train", "plain", "loss", "search"]  # the other part starts runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("gpu")


def test_parts_come_in_order_of_importance(gpu: Any) -> None:
    parts = gpu.parts_of(gpu.full_setup(Path("shared")))
    names = [name for name, _ in parts]
    assert names[:4] == ["agreement", "resume", "memory", "loss"]
    assert set(names) - set(IN_THIS_PROCESS) == {"resume"}
    training = [arguments for name, arguments in parts if name == "train"]
    assert len(training) == 2 * 2 * 2, "pairs, batch sizes, eager and compiled"
    assert [arguments["compiled"] for arguments in training] == [False] * 4 + [True] * 4
    assert names.count("plain") == 2


def test_failed_part_is_a_row_and_the_exit_code(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--seconds", "0", "--only", "loss"]) == 1
    output = capsys.readouterr().out
    assert "| loss {} | no time was left | **no** |" in output and "Failed: loss {}." in output


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(
    gpu: Any, without_finish: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = import_module("gpu_parts")

    def run(name: str, arguments: dict[str, Any], setup: Any, seconds: float) -> Any:
        return parts.PARTS[name](parts.Setup(**json.loads(json.dumps(asdict(setup)))), **arguments)

    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.main(["--small", "--only", *IN_THIS_PROCESS]) == 0
    output = capsys.readouterr().out
    assert "Nothing failed." in output
    # gradients (2), recall, memory, loss, index, search
    assert output.count("| yes |") == 7 and output.count("images and pairs/s") == 5


@pytest.mark.long
def test_command_runs_on_a_cpu() -> None:
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small"]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after" in done.stdout
