"""A run has its output folder to itself, and says what is left there when the disk takes no more."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MiniClipError, refusal
from .arguments import TrainingArguments
from .ranks import own_rank

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
        reason = refusal(error)
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
