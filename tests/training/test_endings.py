"""However a run ends, every process that it started ends with it, within seconds."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from modeling_miniclip.utils.commands import run_command
from tests.helpers.forks import fork, free_port, write_to
from tests.helpers.runs import ROOT, environment, flags, leave_out_figures
from tests.helpers.small_disks import fill, make_room, mounted_disk
from tests.training.test_checkpoints import at_change
from train_miniclip import main

# A function that each phase of a run calls while loader processes are running.
PHASES = {
    "features": "modeling_miniclip.training.towers.features.model_inputs",
    "preparing": "modeling_miniclip.training.setup.build_run",
    "training": "train_miniclip.clamp_logit_scale",
    "validation": "modeling_miniclip.training.reports.measure.validation_metrics",
    "export": "modeling_miniclip.training.publish.export",
    "saving": "accelerate.Accelerator.save_state",
    "figures": "train_miniclip.draw_curves",
    "a loader process": "modeling_miniclip.data.loading.collation.Collator.__call__",
}


class NeedsTwo(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, one: str, two: str):
        super().__init__(one, two)


class Panic(BaseException):
    """As libraries written in Rust raise it."""


def errors() -> dict[str, BaseException]:
    class Local(Exception):
        """No other process can import it."""

    kinds = (
        RuntimeError,
        ValueError,
        KeyError,
        AssertionError,
        MemoryError,
        StopIteration,
        OSError,
        SystemExit,
        Panic,
    )
    return {kind.__name__: kind("boom") for kind in kinds} | {"NeedsTwo": NeedsTwo("a", "b"), "Local": Local("boom")}


def endings(folder: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, int, float]]:
    """How runs end that raise an error in a phase.

    Args:
        folder: folder for the runs.
        cases: phase and name of the error of each.

    Returns:
        For each case the name of the error that `main` raised, how many processes were left, and the seconds from the
        error on in which they ended.
    """
    write_to(folder / "log")
    patch, found = pytest.MonkeyPatch(), {}
    for number, (phase, name) in enumerate(cases):
        raised_at = folder / f"raised{number}"
        error = errors()[name]

        def fail(*_: Any, at: Path = raised_at, error: BaseException = error, **__: Any) -> NoReturn:
            at.touch()
            raise error

        leave_out_figures(patch)
        patch.setattr(PHASES[phase], fail)
        values = {"freeze": "vision", "feature_cache_dir": folder / f"run{number}"} if phase == "features" else {}
        ended = ""
        try:
            main(flags(folder, f"run{number}", num_workers=1, num_train_epochs=1, **values))
        except BaseException as error_of_run:
            ended, keep = type(error_of_run).__name__, error_of_run  # noqa: F841  (keeps what refers to the loaders)
        left = len(multiprocessing.active_children())
        found[phase, name] = ended, left, time.time() - raised_at.stat().st_mtime
        patch.undo()
    return found


def assert_ends(folder: Path, cases: list[tuple[str, str]], expected: dict[str, str]) -> None:
    process = fork(endings, folder, cases)
    process.join(300)
    assert process.exitcode == 0, (folder / "log").read_text()
    for (phase, name), (ended, left, seconds) in process.result.items():
        assert (ended, left) == (expected.get(name, name), 0), (phase, name)
        assert seconds < 15, (phase, name)


def test_unexpected_error_leaves_no_process(tmp_path: Path) -> None:
    assert_ends(tmp_path, [("a loader process", "Local")], {"Local": "RuntimeError"})


@pytest.mark.slow
def test_error_in_any_phase_leaves_no_process(tmp_path: Path) -> None:
    assert_ends(tmp_path, [(phase, "RuntimeError") for phase in PHASES], {})


# The slow suite takes one error of each kind, the weekly one all others.
KINDS = ["MemoryError", "SystemExit", "NeedsTwo", "ValueError"]
EACH_KIND = [
    pytest.param(KINDS, marks=pytest.mark.slow),
    pytest.param([name for name in errors() if name not in KINDS], marks=pytest.mark.long),
]


@pytest.mark.parametrize("names", EACH_KIND)
def test_any_error_in_training_leaves_no_process(tmp_path: Path, names: list[str]) -> None:
    assert_ends(tmp_path, [("training", name) for name in names], {})


@pytest.mark.parametrize("names", EACH_KIND)
def test_any_error_in_a_loader_process_leaves_no_process(tmp_path: Path, names: list[str]) -> None:
    # Those that are no Exception end the loader process, and torch cannot make the others from a message.
    expected = {
        "MemoryError": "MiniClipError", "SystemExit": "MiniClipError", "Panic": "MiniClipError",
        "NeedsTwo": "RuntimeError", "Local": "RuntimeError", "StopIteration": "RuntimeError",
    }  # fmt: skip
    assert_ends(tmp_path, [("a loader process", name) for name in names], expected)


def interrupt_runs(folder: Path, phases: list[str]) -> dict[str, tuple[int, int, list[str]]]:
    """Runs that get Ctrl-C in a phase in which nothing can be saved.

    Returns:
        For each phase the exit code, how many processes were left, and the files that are unfinished.
    """
    write_to(folder / "log")
    patch, found = pytest.MonkeyPatch(), {}
    for phase in phases:
        output_dir, cache = folder / phase, folder / f"{phase}-features"
        leave_out_figures(patch)
        patch.setattr(PHASES[phase], lambda *_, **__: signal.raise_signal(signal.SIGINT))
        values = {"freeze": "vision" if phase == "features" else None, "feature_cache_dir": cache}
        argv = flags(folder, phase, num_workers=1, max_steps=1, **values)
        code = run_command(lambda argv=argv: main(argv), False)  # type: ignore[misc]
        unfinished = [str(path) for place in (output_dir, cache) for path in place.rglob(".*")]
        found[phase] = code, len(multiprocessing.active_children()), unfinished
        patch.undo()
    return found


def test_ctrl_c_outside_of_training_leaves_nothing_unfinished(tmp_path: Path) -> None:
    phases = ["features", "preparing", "figures"]
    process = fork(interrupt_runs, tmp_path, phases)
    process.join(300)
    log = (tmp_path / "log").read_text()
    assert process.result == dict.fromkeys(phases, (130, 0, [])), log
    assert log.count("interrupted\n") == len(phases) and "Traceback" not in log
    assert not (tmp_path / "preparing").exists() and (tmp_path / "figures" / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command_line", ["train_miniclip.py", "-m modeling_miniclip search INDEX dogs"])
def test_ctrl_c_during_imports_is_one_line(tiny_index: Path, command_line: str) -> None:
    process = subprocess.Popen(
        [sys.executable, *command_line.replace("INDEX", str(tiny_index)).split()],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "libtorch_cpu" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")


def become_rank(rank: int, port: int, log: Path) -> None:
    """Let this process be one of two, as a launcher would."""
    write_to(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def end_as_rank(argv: list[str], rank: int, port: int, phase: str, log: Path) -> None:
    """Run the command as one of two processes, of which the second raises an error in a phase."""
    become_rank(rank, port, log)

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("boom")

    patch = pytest.MonkeyPatch()
    leave_out_figures(patch)
    if rank == 1 and phase in PHASES:
        patch.setattr(PHASES[phase], fail)
    raise SystemExit(run_command(lambda: main(argv), False))


@pytest.mark.parametrize(
    "phase",
    [*(pytest.param(phase, marks=pytest.mark.slow) for phase in ("saving", "a loader process")),
     *(pytest.param(phase, marks=pytest.mark.long) for phase in ("preparing", "training"))],
)  # fmt: skip
def test_error_in_one_of_two_processes_ends_both(tmp_path: Path, phase: str) -> None:
    argv, port, log = flags(tmp_path, num_workers=1), free_port(), tmp_path / "log"
    ranks = [fork(end_as_rank, argv, rank, port, phase, log) for rank in range(2)]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [1, 1], log.read_text()
    assert "RuntimeError: boom" in log.read_text()


def fill_disk_as_rank(argv: list[str], rank: int, port: int, disk: Path, log: Path) -> None:
    """Run the command as one of two processes on a disk that fills up while a checkpoint is written."""
    become_rank(rank, port, log)
    leave_out_figures(pytest.MonkeyPatch())
    if rank == 0:
        at_change(str(disk), ("os.mkdir", "/checkpoints/.step-", 2), lambda: fill(disk, 2_500_000))
    raise SystemExit(run_command(lambda: main(argv), False))


@pytest.mark.slow
def test_full_disk_ends_two_processes_with_one_line(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk") as disk:
        argv = [*flags(tmp_path, "disk/run", num_workers=1), "--resume_from_checkpoint=latest"]
        for expected in (1, 0):
            port, log = free_port(), tmp_path / f"log{expected}"
            start = fill_disk_as_rank if expected else end_as_rank
            what = disk if expected else "a phase that does not occur"
            ranks = [fork(start, argv, rank, port, what, log) for rank in range(2)]
            for process in ranks:
                process.join(120)
            text = log.read_text()
            assert [process.exitcode for process in ranks] == [expected, expected], text
            assert text.count("error: cannot write: [Errno 28]") == text.count("error: ") == expected, text
            assert "Traceback" not in text
            if expected:
                make_room(disk)
