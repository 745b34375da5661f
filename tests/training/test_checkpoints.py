"""A run that is killed at any moment and resumed ends as one that was not, bit for bit.

What a killed process knew is lost, so that it does not matter when it dies between two changes to its files: the runs
here are killed by SIGKILL at such changes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_miniclip import ModelError, UsageError
from modeling_miniclip.training.optimizer import clamp_logit_scale
from modeling_miniclip.training.reports.reporting import MetricsLog
from modeling_miniclip.training.resuming.checkpoints import (
    INTERRUPTED_EXPORT,
    drop_repeated_export,
    expired_checkpoints,
    find_checkpoint,
    rewind_folders,
)
from modeling_miniclip.training.resuming.output_dir import clear_output_dir
from tests.helpers.forks import fork, write_to
from tests.helpers.runs import command, environment, flags, launch, leave_out_figures, metrics_of
from tests.helpers.session import shared_once
from train_miniclip import main

# What a Python program does to files, as its audit hooks see it.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree", "shutil.copytree"}
Point = tuple[str, str, int]  # the n-th change of a kind whose path contains a text
NEVER: Point = ("", "", 0)

SETTINGS: dict[str, dict[str, Any]] = {
    # Ends within the fourth epoch; the best is the second.
    "plateau, by steps": {
        "num_train_epochs": 5, "max_steps": 11, "checkpointing_steps": 2, "save_total_limit": 1, "logging_steps": 3,
        "lr_scheduler_kwargs": "{patience: 0}", "learning_rate": 3e-3, "seed": 2,
    },
    # The first is the best or, as bf16 is computed on some machines, the second.
    "cosine, by epochs, stopped early": {
        "num_train_epochs": 9, "lr_scheduler_type": "cosine", "warmup_steps": 2, "captions_per_image": 2,
        "early_stopping_patience": 2, "vision_learning_rate": 0.1, "text_learning_rate": 0.1,
        "mixed_precision": "bf16",
    },
}  # fmt: skip
PLATEAU, COSINE = SETTINGS
POINTS: list[tuple[str, Point]] = [
    (PLATEAU, ("os.link", "/export/model.safetensors", 3)),  # while the second checkpoint is written
]
MORE_POINTS: list[tuple[str, Point]] = [
    (PLATEAU, ("os.rename", "/checkpoints/.step-", 1)),  # the first checkpoint is not yet there
    (COSINE, ("shutil.rmtree", "/.export.new", 2)),  # after a validation that no checkpoint remembers
    (PLATEAU, ("open", "/.export.new/README.md", 2)),  # while the best is exported
    (PLATEAU, ("open", "/curves.png", 1)),  # when all is trained and validated
    (PLATEAU, ("os.rename", "/.arguments.yaml.new", 1)),  # at the very start
    (PLATEAU, ("open", "/metrics.jsonl", 3)),  # within the second epoch
    (PLATEAU, ("shutil.rmtree", "/.export.new", 4)),  # while the former best is deleted
    (PLATEAU, ("os.rename", "/checkpoints/step-", 4)),  # the last is there, an old one not yet dropped
    (PLATEAU, ("shutil.rmtree", "/checkpoints/.step-00000002.old", 2)),  # and while it is
    (COSINE, ("open", "/retrieval.png", 1)),  # after early stopping
]


def at_change(
    output_dir: str, point: Point, act: Callable[[], object], counted: Callable[[], object] = lambda: None
) -> None:
    """From now on count this process's changes to files of that kind, and act at the one of that number."""
    kind, text, number = point
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or kind not in event or not str(arguments[0]).startswith(output_dir):
            return
        if text not in str(arguments[0]) or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        nonlocal changes
        changes += 1
        counted()
        if changes == number:
            act()

    sys.addaudithook(hook)


def run_and_die(argv: list[str], output_dir: str, point: Point, count: Path) -> None:
    """Train without figures, count the run's changes to files of that kind, and be killed at the one of that number.

    Args:
        argv: flags of the run.
        output_dir: its output folder.
        point: change at which it is killed.
        count: file to which each change adds a byte.
    """
    counter = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write_to(Path(os.devnull))
    leave_out_figures(pytest.MonkeyPatch())
    at_change(output_dir, point, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os.write(counter, b"."))
    main(argv)


def killed(argv: list[str], output_dir: Path, point: Point) -> tuple[bool, int]:
    """Whether a run in a fork was killed at a change to a file, and the number of changes of that kind."""
    count = output_dir.with_name("changes")
    process = fork(run_and_die, argv, str(output_dir), point, count)
    process.join(900)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0, count.stat().st_size


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Gives what the run of a setting leaves that nobody killed, and the number of its changes to files."""
    results: dict[str, tuple[dict[str, Any], int]] = {}

    def train(setting: str, folder: Path) -> None:
        assert not killed(flags(folder, **SETTINGS[setting]), folder / "run", NEVER)[0]

    with ExitStack() as stack:

        def get(setting: str) -> tuple[dict[str, Any], int]:
            if setting not in results:
                once = contextmanager(shared_once)(request, f"whole run, {setting}", partial(train, setting))
                folder = stack.enter_context(once)
                results[setting] = result_of(folder / "run"), (folder / "changes").stat().st_size
            return results[setting]

        yield get


def state_of(folder: Path) -> Any:
    """Everything that a checkpoint holds, down to the bits."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: bits(torch.load(path, weights_only=False)) if path.suffix in (".bin", ".pkl") else path.read_bytes()
        for name, path in files.items()
    }


def bits(value: Any) -> Any:
    """A nested state with its tensors and arrays as bytes, to be compared by ==."""
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.numpy().tobytes()
    return value.tobytes() if hasattr(value, "tobytes") else value


def result_of(run: Path) -> dict[str, Any]:
    """What a run leaves, without what says how fast it was."""
    noise = {"seconds", "pairs_per_second"}
    return {
        "files": sorted(path.name for folder in (run, run / "checkpoints") for path in folder.iterdir()),
        "log": [{k: v for k, v in line.items() if k not in noise} for line in metrics_of(run)],
        "export": state_of(run / "export"),
        "last": state_of(sorted((run / "checkpoints").iterdir())[-1]),
        "curves": (run / "curves.png").read_bytes(),
        "retrieval": (run / "retrieval.png").read_bytes(),
    }


def assert_same_result(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        different = [k for k in one[name] if one[name][k] != other[name].get(k)] if isinstance(one[name], dict) else ""
        assert one[name] == other[name], f"{name} {different}"


def assert_resumes_exactly(folder: Path, setting: str, point: Point, expected: dict[str, Any]) -> None:
    argv = flags(folder, **SETTINGS[setting])
    assert killed(argv, folder / "run", point)[0], "it ended before"
    assert not killed([*argv, "--resume_from_checkpoint=latest"], folder / "run", NEVER)[0]
    assert_same_result(result_of(folder / "run"), expected)


@pytest.mark.parametrize(
    ("setting", "point"), [*POINTS, *(pytest.param(*values, marks=pytest.mark.slow) for values in MORE_POINTS)]
)
def test_killed_and_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, whole: Any, setting: str, point: Point
) -> None:
    assert_resumes_exactly(tmp_path, setting, point, whole(setting)[0])


def test_plateau_settings_keep_best_and_last_checkpoint(whole: Any) -> None:
    result, _ = whole(PLATEAU)
    validations = [(line["loss"], line["step"]) for line in result["log"] if line["split"] == "validation"]
    assert [step for _, step in validations] == [3, 6, 9, 11] and min(validations)[1] == 6
    assert [name for name in result["files"] if "step" in name] == ["step-00000006", "step-00000011"]


@pytest.mark.slow
def test_cosine_settings_stop_early(whole: Any) -> None:
    result, _ = whole(COSINE)
    validations = [(line["loss"], line["step"]) for line in result["log"] if line["split"] == "validation"]
    assert min(validations)[1] == validations[-3][1] < validations[-1][1] < 27


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_run_survives_two_kills_at_random_changes(tmp_path: Path, whole: Any, setting: str) -> None:
    expected, changes = whole(setting)
    rng = random.Random(os.getpid())
    for _ in range(4):
        folder = tmp_path / str(rng.random())
        argv = flags(folder, **SETTINGS[setting])
        points = rng.randrange(1, changes), rng.randrange(1, changes // 2)
        print(setting, points)
        assert killed(argv, folder / "run", ("", "", points[0]))[0]
        killed([*argv, "--resume_from_checkpoint=latest"], folder / "run", ("", "", points[1]))
        assert not killed([*argv, "--resume_from_checkpoint=latest"], folder / "run", NEVER)[0]
        assert_same_result(result_of(folder / "run"), expected)


@pytest.mark.slow
def test_two_processes_with_loader_workers_killed_together_resume_exactly(tmp_path: Path) -> None:
    same = {
        "num_train_epochs": 4,
        "num_workers": 2,
        "checkpointing_steps": 2,
        "mixed_precision": "bf16",
        "batch_size": 7,
    }
    assert launch(flags(tmp_path / "whole", **same), processes=2).returncode == 0
    argv = flags(tmp_path / "parts", **same)
    process = subprocess.Popen(command(argv, 2), env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "parts" / "run" / "checkpoints" / "step-00000004")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics_of(tmp_path / "parts" / "run")[-1]["step"] < 12, "it ended before"
    assert launch([*argv, "--resume_from_checkpoint=latest"], processes=2).returncode == 0
    assert_same_result(result_of(tmp_path / "parts" / "run"), result_of(tmp_path / "whole" / "run"))


@pytest.mark.usefixtures("without_finish")
def test_sigterm_saves_and_the_run_resumes_exactly(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def clamp_and_signal(model: Any) -> None:
        clamp_logit_scale(model)
        steps.append(1)
        if len(steps) in (3, 8):  # the first at the end of an epoch, the second in the middle of one
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("train_miniclip.clamp_logit_scale", clamp_and_signal)
    argv = flags(tmp_path, **SETTINGS[PLATEAU])
    for saved in ("step-00000003", "step-00000008"):
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--resume_from_checkpoint=latest"])
        assert ended.value.code == 143
        assert sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name == saved
        assert not (tmp_path / "run" / "curves.png").exists()
    main([*argv, "--resume_from_checkpoint=latest"])
    assert_same_result(result_of(tmp_path / "run"), whole(PLATEAU)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signal_to_group_with_loader_workers_ends_cleanly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    argv = flags(tmp_path, num_train_epochs=500, num_workers=2)
    process = subprocess.Popen(
        command(argv),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "run" / "export")
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert output.count("saving after this step") == 1
    assert "Error" not in errors
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if line["split"] == "train"]
    assert last == f"step-{steps[-1]:08d}" and steps[-1] < 1500
    assert (tmp_path / "run" / "retrieval.png").exists() == (code == 0)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)


def test_last_and_best_checkpoint_are_never_surplus() -> None:
    paths = [Path(f"step-{step:08d}") for step in (3, 6, 9, 12)]
    assert expired_checkpoints(paths, 2, 3) == [paths[1], paths[2]]
    assert expired_checkpoints(paths, 1, 6) == [paths[0], paths[2]]
    assert expired_checkpoints(paths, 1, 12) == paths[:3]
    assert expired_checkpoints(paths, 3, 0) == [paths[0]]
    assert expired_checkpoints(paths, 4, 3) == []


def test_latest_without_checkpoint_starts_afresh(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    (tmp_path / "metrics.jsonl").touch()
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(UsageError, match="step-00000003: no such checkpoint"):
        find_checkpoint(tmp_path, "step-00000003")
    (tmp_path / "curves.png").touch()
    with pytest.raises(UsageError, match="--model_name_or_path"):
        find_checkpoint(tmp_path, "latest")


def test_unfinished_checkpoints_are_not_found_and_are_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000003", ".step-00000006.new", ".step-00000001.old"):
        (folder / name).mkdir(parents=True)
    found = find_checkpoint(tmp_path, "latest")
    assert found == folder / "step-00000003"
    rewind_folders(found, tmp_path / "export")
    assert os.listdir(folder) == ["step-00000003"]


def test_rewinding_brings_back_the_best_model_of_the_checkpoint(tmp_path: Path) -> None:
    def write(folder: Path, text: str) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(text)
        (folder / "README.md").write_text(text)

    first, second, export = tmp_path / "checkpoints/step-3", tmp_path / "checkpoints/step-6", tmp_path / "export"
    first.mkdir(parents=True)
    write(second / "export", "best")
    write(export, "later")
    rewind_folders(second, export)
    assert (export / "model.safetensors").read_text() == "best" == (export / "README.md").read_text()
    (export / "README.md").unlink()
    (export / "README.md").write_text("my own words")
    rewind_folders(second, export)
    assert (export / "README.md").read_text() == "my own words", "the same weights are left alone"
    (export / "model.safetensors").unlink()
    (export / "model.safetensors").write_text("the same step again, resumed")
    assert not rewind_folders(second, export) and not (tmp_path / INTERRUPTED_EXPORT).exists()
    for text in ("stopped within an epoch", "stopped again"):
        (export / "model.safetensors").unlink()
        (export / "model.safetensors").write_text(text)
        assert rewind_folders(second, export, within_epoch=True)
        assert (tmp_path / INTERRUPTED_EXPORT / "model.safetensors").read_text() == text
        assert (export / "model.safetensors").read_text() == "best"
        assert not rewind_folders(second, export, within_epoch=True), "it is killed, and resumed once more"
    drop_repeated_export(export)
    assert (tmp_path / INTERRUPTED_EXPORT).exists()
    (export / "model.safetensors").unlink()
    (export / "model.safetensors").write_text("stopped again")
    drop_repeated_export(export)
    rewind_folders(first, export)  # when it was saved, nothing was exported yet
    assert not export.exists() and not second.exists()
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_rewound_log_ends_at_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", True)
    log.write(1, 0.5, "train", {"loss": 1.0})
    log.write(2, 1.0, "train", {"loss": 0.5})
    state = log.state_dict()
    log.write(2, 1.0, "validation", {"loss": 0.7})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')  # the process died
    again = MetricsLog(log.path, True)
    again.load_state_dict(state)
    again.rewind()
    assert [(line["step"], line["split"]) for line in metrics_of(tmp_path)] == [(1, "train"), (2, "train")]
    again.write(3, 1.5, "train", {"loss": 0.25})
    assert again.state_dict() == {"lines": 3}


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    main(flags(tmp_path, max_steps=1))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "optimizer.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match="step-00000001 is damaged or of another model"):
        main(flags(tmp_path, max_steps=2, resume_from_checkpoint="latest"))


def test_cleared_folder_keeps_what_is_not_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "export").mkdir()
    for name in ("metrics.jsonl", "mine.txt"):
        (tmp_path / name).touch()
    clear_output_dir(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
