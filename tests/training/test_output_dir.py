"""A run has its folder to itself; on a disk that takes no more it says what is left, and the next start goes on."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip import MiniClipError
from modeling_miniclip.errors import disk_error_message
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.resuming.output_dir import LOCK_FILE, locked_output_dir
from tests.helpers.forks import Fork, fork
from tests.helpers.runs import flags
from tests.helpers.small_disks import fill, make_room, mounted_disk
from tests.training.test_checkpoints import (
    NEVER,
    PLATEAU,
    SETTINGS,
    Point,
    assert_same_result,
    at_change,
    killed,
    result_of,
    wait_for,
    whole,  # noqa: F401  (a fixture)
)
from train_miniclip import main


def arguments_of(folder: Path, **values: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **values)


def hold_folder(folder: Path, started: Path) -> None:
    """Hold an output folder until this process is killed. It has a child that outlives it."""
    with locked_output_dir(arguments_of(folder)):
        child = os.fork()
        if child:
            started.with_suffix(".new").write_text(str(child))
            started.with_suffix(".new").rename(started)
        time.sleep(100)


def test_output_dir_is_locked_until_its_process_dies(tmp_path: Path) -> None:
    folder, started = tmp_path / "run", tmp_path / "started"
    holder = fork(hold_folder, folder, started)
    wait_for(started)
    child = int(started.read_text())
    try:
        for resume in ("--resume_from_checkpoint=latest", "--overwrite_output_dir=true"):
            with pytest.raises(MiniClipError, match=f"used by another run, process {holder.pid} on .*: wait"):
                main([*flags(tmp_path), resume])
        with pytest.raises(MiniClipError, match="does not reach zero"):  # writes nothing, so the lock does not matter
            main(flags(tmp_path, overfit_batch=True, max_steps=1))
        holder.kill()
        holder.join(60)
        assert holder.exitcode == -signal.SIGKILL
        with locked_output_dir(arguments_of(folder)):
            assert (folder / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.listdir(folder) == []


def test_of_several_processes_the_first_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked_output_dir(arguments_of(tmp_path / "run")):
        assert not (tmp_path / "run").exists()


def test_unwritable_folder_is_reported_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiniClipError, match="file/run cannot be written: Not a directory"):
        main(flags(tmp_path, output_dir="file/run"))


@pytest.mark.parametrize("made_before", [False, True])
def test_rejected_run_leaves_the_disk_unchanged(tmp_path: Path, made_before: bool) -> None:
    if made_before:
        (tmp_path / "run").mkdir()
    with pytest.raises(MiniClipError, match="missing.csv"):
        main(flags(tmp_path, dataset="missing.csv"))
    assert (tmp_path / "run").exists() == made_before


@pytest.fixture
def read_only(tmp_path: Path) -> Any:
    """A folder that nobody may write, not even root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.getuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("root may write everywhere, and may not mount here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_read_only_folder_is_reported_before_any_work(tmp_path: Path, read_only: Path) -> None:
    with pytest.raises(MiniClipError, match="cannot be written: (Read-only file system|Permission denied)"):
        main(flags(tmp_path, output_dir="read-only/run"))


def test_disk_errors_of_all_libraries_are_recognized() -> None:
    assert disk_error_message(OSError(28, "No space left on device", "/a")) == (
        "cannot write: [Errno 28] No space left on device: '/a'"
    )
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "(os error 28)" in str(disk_error_message(rust))
    assert disk_error_message(
        RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed")
    )
    assert disk_error_message(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"))
    assert disk_error_message(OSError("[Errno 28] Error writing bytes to file")) is not None
    try:
        try:
            raise OSError(28, "No space left on device", "/a")
        finally:
            raise RuntimeError("closing failed")
    except RuntimeError as second:
        assert "'/a'" in str(disk_error_message(second))
    assert disk_error_message(OSError(2, "No such file or directory")) is None
    assert disk_error_message(RuntimeError("mat1 and mat2 (os error 2)")) is None


# --- a disk that is full from some moment on ------------------------------------------------------------------------

# From a change to files on, no file may become longer than so many bytes: a write fails at that byte, whoever writes.
FULL: list[tuple[Point, int]] = [
    (("os.mkdir", "/checkpoints/.step-00000002.new", 1), 5_000),  # the first checkpoint
]
MORE_FULL: list[tuple[Point, int]] = [
    (("os.mkdir", "/.export.new", 2), 100_001),  # the second best model, within its weights
    (("open", "/metrics.jsonl", 6), 200),  # a line of the log
    (("os.mkdir", "/.export.new", 1), 0),
    (("open", "/.export.new/README.md", 2), 1_000),
    (("os.mkdir", "/checkpoints/.step-00000006.new", 1), 0),
    (("os.mkdir", "/checkpoints/.step-00000008.new", 1), 200_000),
    (("os.mkdir", "/checkpoints/.step-00000011.new", 1), 400_000),
    (("open", "/.curves.png.new", 1), 4_096),
    (("open", "/.retrieval.png.new", 1), 1),
]


def run_on_full_disk(argv: list[str], output_dir: str, point: Point, limit: int) -> str:
    """Train until no file may become longer than `limit` bytes. Returns the message of the error."""
    at_change(output_dir, point, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    with pytest.raises(MiniClipError) as error:
        main(argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("point", "limit"), [*FULL, *(pytest.param(*values, marks=pytest.mark.slow) for values in MORE_FULL)]
)
def test_run_on_a_full_disk_can_be_resumed(
    tmp_path: Path,
    whole: Any,  # noqa: F811
    point: Point,
    limit: int,
    record_property: Any,
) -> None:
    record_property("faults", 1)
    argv, run = flags(tmp_path, **SETTINGS[PLATEAU]), tmp_path / "run"
    process = fork(run_on_full_disk, argv, str(run), point, limit)
    assert_ends_and_resumes(process, argv, run, whole(PLATEAU)[0])


def assert_ends_and_resumes(
    process: Fork, argv: list[str], run: Path, expected: dict[str, Any], make_room: Callable[[], object] = bool
) -> None:
    """The run says why it ends and what it kept; with room, it goes on and leaves what another one leaves."""
    process.join(900)
    assert process.exitcode == 0, "it ended without an error, or with another one"
    message = process.result
    assert message.startswith("cannot write: ") and "--resume_from_checkpoint latest" in message
    assert not [path for path in (run / "checkpoints").glob(".*")] and not list(run.glob(".export*"))
    last = sorted((run / "checkpoints").glob("step-*"))[-1:]
    assert (f"{last[0]} is complete" if last else "there is no checkpoint yet") in message
    make_room()
    assert not killed([*argv, "--resume_from_checkpoint=latest"], run, NEVER)[0]
    assert_same_result(result_of(run), expected)


# From a change to files on, so many bytes are free on a file system that holds nothing else.
NO_SPACE: list[tuple[Point, int]] = [
    (("os.mkdir", "/checkpoints/.step-00000004.new", 1), 2_500_000),  # within the optimizer, which PyTorch writes
]
MORE_NO_SPACE: list[tuple[Point, int]] = [
    (("os.mkdir", "/checkpoints/.step-00000002.new", 1), 100_000),  # within the weights
    (("os.mkdir", "/checkpoints/.step-00000006.new", 1), 4_900_000),  # within the random states
    (("os.mkdir", "/.export.new", 2), 500_000),
]


def run_on_filled_disk(argv: list[str], output_dir: str, point: Point, left: int) -> str:
    """Train until only so many bytes are left. Returns the message of the error."""
    at_change(output_dir, point, lambda: fill(Path(output_dir).parent, left))
    with pytest.raises(MiniClipError) as error:
        main(argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("point", "left"),
    [*(pytest.param(*values, marks=pytest.mark.slow) for values in NO_SPACE),
     *(pytest.param(*values, marks=pytest.mark.long) for values in MORE_NO_SPACE)],
)  # fmt: skip
def test_run_on_a_small_disk_goes_on_with_room(
    tmp_path: Path,
    whole: Any,  # noqa: F811
    point: Point,
    left: int,
) -> None:
    with mounted_disk(tmp_path / "disk") as disk:
        argv, run = flags(tmp_path, "disk/run", **SETTINGS[PLATEAU]), disk / "run"
        process = fork(run_on_filled_disk, argv, str(run), point, left)
        assert_ends_and_resumes(process, argv, run, whole(PLATEAU)[0], lambda: make_room(disk))
