"""A run has its output folder to itself, and says what is left there when the disk takes no more."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MiniClipError, UsageError, disk_error_message
from ..utils.files import discard_folder, recover_folder
from .arguments import TrainingArguments

try:
    import fcntl
except ImportError:  # Windows: two runs in a folder are not told apart
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def own_folder(arguments: TrainingArguments) -> Iterator[None]:
    """Within the block no other run may use `--output_dir`, and what its disk refuses is told with what is left.

    One process speaks for all of a run. With `--overfit_batch` nothing is written, and nothing locked.

    Raises:
        MiniClipError: the folder is used by another run or cannot be written, or its disk was full, or became
            read-only, in the meantime.
    """
    output_dir = Path(arguments.output_dir)
    if arguments.overfit_batch or own_rank() != 0:
        yield
        return
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(output_dir / LOCK_FILE)
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
        raise MiniClipError(f"{reason}; {_what_is_left(output_dir)}") from error
    finally:
        with suppress(OSError):
            os.unlink(output_dir / LOCK_FILE)  # before it is closed, which gives it free
            if is_new:
                output_dir.rmdir()  # of a run that was refused before it wrote anything; any other is not empty
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Open and lock a file that says who holds it.

    It is a POSIX record lock: gone with the process that holds it, however that ends, and not inherited by its loader
    processes, which may live some seconds longer. On a network file system it holds as far as that knows locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise MiniClipError(
                    f"--output_dir {path.parent} is used by another run, {holder or 'just started'}: wait for its "
                    "end, end it, or choose another --output_dir"
                ) from error
            return descriptor  # a file system without locks
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:  # not one that its holder has just deleted
                break
        os.close(descriptor)
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _what_is_left(output_dir: Path) -> str:
    from .checkpoints import checkpoints

    found = checkpoints(output_dir / "checkpoints")
    left = f"{found[-1]} is complete" if found else "there is no checkpoint yet"
    return f"{left}: make room and repeat the command with --resume_from_checkpoint latest"


def own_rank() -> int:
    """This process among those of the run, whether a launcher told it or has joined the processes already."""
    joined = sys.modules.get("torch.distributed")  # not imported here: it takes seconds
    if joined is not None and joined.is_available() and joined.is_initialized():
        return int(joined.get_rank())
    return int(os.environ.get("RANK", "0"))


RESULTS = ("checkpoints", "export", "metrics.jsonl", "curves.png", "retrieval.png", "arguments.yaml")


def prepare_output_dir(arguments: TrainingArguments) -> Path:
    """The run's folder, new or to be resumed. Nothing in it is deleted yet: see [`clear_output_dir`].

    Raises:
        UsageError: it holds an earlier run and neither resuming nor overwriting was asked for.
    """
    output_dir = Path(arguments.output_dir)
    may_exist = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if not may_exist and any((output_dir / name).exists() for name in RESULTS):
        raise UsageError(
            f"{output_dir} holds an earlier run: go on with it by --resume_from_checkpoint latest, choose another "
            "--output_dir, or delete it by --overwrite_output_dir"
        )
    recover_folder(output_dir / "export")
    return output_dir


def clear_output_dir(output_dir: Path) -> None:
    """Delete an earlier run's results; called when everything else about the new run has been found right."""
    for path in (output_dir / name for name in RESULTS):
        if path.is_file():
            path.unlink()
        else:
            discard_folder(path)
