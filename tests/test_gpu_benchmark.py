"""`benchmarks/gpu.py`: all of its parts run, here on the CPU with tiny towers."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.create_model import create_model
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


def test_parts_without_time_are_rows_and_the_exit_code(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--seconds", "0", "--only", "loss", "train"]) == 1
    output = capsys.readouterr().out
    assert "| loss | no time was left | **no** |" in output
    assert "batch_size=16 chunk_size=None compiled=True | no time was left |  |" in output
    failed = output.split("Failed: ")[1]
    assert "loss" in failed and "compiled=False" in failed and "compiled=True" not in failed


def test_without_a_gpu_or_data_nothing_starts(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that this torch can use: .* --small"):
        gpu.main(["--shared", str(tmp_path)])
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"flickr8k does not exist, --shared is .*; set MINICLIP_SHARED or pass"):
        gpu.main(["--shared", str(tmp_path)])


PARTS = {
    "good": 'print(\'a library\'); print(\'[{"what": "a", "found": "b", "ok": true}]\')',
    "bad": "import sys, warnings; sys.stderr.write('ValueError: too few\\nsome warning\\n'); sys.exit(3)",
    "slow": """
import subprocess, time
child = subprocess.Popen(['sleep', '60'])
open('child', 'w').write(str(child.pid))
time.sleep(60)
""",
}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("good", {"what": "a", "found": "b", "ok": True}),
        ("bad", {"what": "any pair=p", "found": "failed: ValueError: too few", "ok": False}),
        ("slow", {"what": "any pair=p", "found": "not done within 2 s", "ok": False}),
    ],
)
def test_a_part_is_a_process_that_ends_in_time(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "gpu_parts.py").write_text(PARTS[part])
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert gpu.run_part("any", {"pair": "p"}, gpu.SMALL, 2.0) == [expected]
    if part == "slow":
        child = int(Path("child").read_text())
        with suppress(psutil.NoSuchProcess):
            psutil.Process(child).wait(10)  # what a part has started ends with it


@pytest.mark.slow
def test_towers_without_weights_can_be_made(gpu: Any, tmp_path: Path) -> None:
    setup = gpu.write_files(gpu.full_setup(tmp_path), tmp_path)
    argv = import_module("gpu_setup").flags_of(setup, "ResNet-50 + DistilBERT")
    model, processor = create_model(parse_arguments(argv), [["a dog", "a cat"]])
    assert (
        model.config.vision_config.architecture == "resnet50" and model.config.text_config.model_type == "distilbert"
    )
    assert (model.vision_width, model.text_width) == (2048, 768) and model.config.projection_dim == 256
    assert processor.image_processor.crop_size["height"] == 224


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
    # gradients (2), recall, resumed run (2), memory, loss, index, search
    assert output.count("| yes |") == 9 and output.count("images and pairs/s") == 5


@pytest.mark.long
def test_command_runs_on_a_cpu() -> None:
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small"]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after" in done.stdout
