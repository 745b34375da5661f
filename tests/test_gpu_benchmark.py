"""`benchmarks/gpu.py`: all of its parts run, here on the CPU with tiny towers."""

import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forks import fork, write_to
from tests.helpers.runs import ROOT, environment, leave_out_figures
from train_miniclip import main


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("gpu")


def test_parts_come_in_order_of_importance(gpu: Any) -> None:
    parts = gpu.parts_of(gpu.full_setup(Path("shared")))
    names = [name for name, _ in parts]
    assert names[:4] == ["agreement", "resume", "memory", "loss"]
    assert set(names) == set(import_module("gpu_parts").PARTS)
    training = [arguments for name, arguments in parts if name == "train"]
    assert len(training) == 2 * 2 * 2, "pairs, batch sizes, eager and compiled"
    assert [arguments["compiled"] for arguments in training] == [False] * 4 + [True] * 4
    assert names.count("plain") == 2


def test_failed_part_is_a_row_and_the_exit_code(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--seconds", "0", "--only", "loss"]) == 1
    output = capsys.readouterr().out
    assert "| loss {} | no time was left | **no** |" in output and "Failed: loss {}." in output


class ForkedRun:
    """What the script does with a process, for a run in a fork: a new process would import libraries for seconds."""

    def __init__(self, argv: list[str], log: Path):
        self.fork = fork(run_quietly, argv, log)

    def poll(self) -> int | None:
        self.fork.join(0)
        return self.fork.exitcode

    def kill(self) -> None:
        self.fork.kill()

    def wait(self) -> int | None:
        self.fork.join(120)
        return self.fork.exitcode


def run_quietly(argv: list[str], log: Path) -> None:
    write_to(log)
    leave_out_figures(pytest.MonkeyPatch())
    main(argv)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(
    gpu: Any, tmp_path: Path, without_finish: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parts = import_module("gpu_parts")

    def run(name: str, arguments: dict[str, Any], setup: Any, seconds: float) -> Any:
        return parts.PARTS[name](parts.Setup(**json.loads(json.dumps(asdict(setup)))), **arguments)

    monkeypatch.setattr(gpu, "run_part", run)
    monkeypatch.setattr(parts, "start_run", lambda argv: ForkedRun(argv, tmp_path / "log"))
    code, output = gpu.main(["--small"]), capsys.readouterr().out
    assert code == 0 and "Nothing failed." in output, output
    # gradients (2), recall, resumed run, memory, loss, index, search
    assert output.count("| yes |") == 8 and output.count("images and pairs/s") == 5


@pytest.mark.long
def test_command_runs_on_a_cpu() -> None:
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small"]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after" in done.stdout
