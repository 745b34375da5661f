"""Kill or stop this process at a chosen moment while it writes files, without waiting for that moment."""

import fcntl
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

# When files get content or names, in the words of `sys.addaudithook`.
EVENTS = frozenset({"open", "os.rename"})


def at_change(folder: Path, number: int, action: Callable[[], object], events: frozenset[str] = EVENTS) -> None:
    """Call a function right before this process renames, or opens to write, a file below a folder.

    Args:
        folder: the folder.
        number: number of the change, from 0.
        action: function to call.
        events: events to count.
    """
    numbers, start = count(), f"{folder}{os.sep}"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in events or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if os.fspath(args[0]).startswith(start) and next(numbers) == number:
            action()

    sys.addaudithook(hook)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_each_change(folder: Path, write: Callable[[Path], object]) -> int:
    """Call a function in forks of this process: the n-th one dies right before its n-th change of a file.

    Args:
        folder: existing folder; the n-th call writes to its subfolder `n`.
        write: function that is called with that subfolder.

    Returns:
        Number of forks that died; one more did not, as it had no more changes to make.
    """
    for number in count():
        pid = os.fork()
        if pid == 0:
            place = folder / str(number)
            place.mkdir()
            at_change(place, number, die)
            write(place)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return number
        assert code == -signal.SIGKILL
    raise AssertionError("unreachable")


def die_at_byte(size: int) -> None:
    """Let this process die, without any clean-up, when it makes a file longer than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def gate(path: Path) -> Iterator[None]:
    """For the length of the block, processes wait at [`pass_gate`] of the same new file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pass_gate(path: Path) -> None:
    """Wait until the [`gate`] is open."""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
