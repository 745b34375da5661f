"""The output folder: lock it for one run, check it, empty it, and say what was saved when its disk is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import MiniClipError, UsageError, disk_error_message
from ...utils.files import discard_folder, recover_folder
from ...utils.locks import LockedError, lock_file, unlock_file
from ...utils.names import check_name
from ...utils.processes import process_rank
from ..command_line.arguments import TrainingArguments
from .checkpoints import INTERRUPTED_EXPORT, list_checkpoints
from .fingerprint import UNDECODABLE

LOCK_FILE = ".lock"
RESULTS = (
    "checkpoints", "export", INTERRUPTED_EXPORT, "metrics.jsonl", "curves.png", "retrieval.png", "arguments.yaml",
    UNDECODABLE,
)  # fmt: skip


@contextmanager
def locked_output_dir(arguments: TrainingArguments) -> Iterator[None]:
    """Within the block, no other run can use `--output_dir`, and errors of its disk say what was saved.

    Rank 0 locks the folder for all processes of the run.

    Raises:
        MiniClipError: the folder is used by another run or cannot be written to, or its disk became full or read-only
            during the run.
    """
    output_dir = Path(arguments.output_dir)
    if process_rank() != 0:
        yield
        return
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(output_dir / LOCK_FILE)
    except LockedError as error:
        raise MiniClipError(
            f"--output_dir {output_dir} is used by another run, {error.holder or 'just started'}: wait until it ends, "
            "stop it, or choose another --output_dir"
        ) from error
    except OSError as error:
        raise MiniClipError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    try:
        yield
    except MiniClipError:
        raise
    except Exception as error:
        reason = disk_error_message(error)
        if reason is None:
            raise
        raise MiniClipError(f"{reason}; {_what_was_saved(output_dir)}") from error
    finally:
        unlock_file(output_dir / LOCK_FILE, descriptor)
        if is_new:
            with suppress(OSError):
                output_dir.rmdir()  # succeeds only if the run failed before it wrote anything


def _what_was_saved(output_dir: Path) -> str:
    found = list_checkpoints(output_dir / "checkpoints")
    left = f"{found[-1]} is complete" if found else "there is no checkpoint yet"
    return f"{left}: free some space and repeat the command with --resume_from_checkpoint latest"


def how_to_resume(output_dir: str | os.PathLike) -> str:
    """What is left of a run whose processes did not all survive, and how to go on."""
    found = list_checkpoints(Path(output_dir) / "checkpoints")
    last = f"last checkpoint: {found[-1]}" if found else "no checkpoint yet"
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    where = " on all machines" if several else ""
    return f"{last}; resume with the same command{where} and --resume_from_checkpoint latest"


def check_output_dir(arguments: TrainingArguments) -> None:
    """Check that the folder is new, or may be overwritten or resumed; repair an export that was being replaced.

    Nothing is deleted yet, see [`clear_output_dir`].

    Raises:
        UsageError: the folder contains an earlier run, and neither `--resume_from_checkpoint` nor
            `--overwrite_output_dir` is given.
    """
    output_dir = Path(arguments.output_dir)
    check_name(output_dir, "--output_dir ")
    may_exist = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if not may_exist and any((output_dir / name).exists() for name in RESULTS):
        raise UsageError(
            f"{output_dir} contains an earlier run: continue it with --resume_from_checkpoint latest, choose another "
            "--output_dir, or delete it with --overwrite_output_dir"
        )
    recover_folder(output_dir / "export")


def clear_output_dir(output_dir: Path) -> None:
    """Delete an earlier run's results; called only when everything else about the new run is known to be right."""
    for path in (output_dir / name for name in RESULTS):
        if path.is_file():
            path.unlink()
        else:
            discard_folder(path)
