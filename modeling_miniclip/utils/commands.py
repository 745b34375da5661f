"""Run a command of the command line: how it ends after an error, Ctrl-C or a closed pipe."""

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from ..errors import MiniClipError, disk_error_message, printable
from .interrupts import INTERRUPTED, interruptible, print_interrupted
from .processes import ended_children

CLOSED_PIPE = 128 + 13  # exit code of a program that SIGPIPE ends; not all systems have that signal


def run_command(command: Callable[[], object], debug: bool) -> int:
    """Run a command of the command line; print the package's errors, and disk errors, as one line on stderr.

    However the command ends, the processes that it started end too. If nobody reads its output any more, as in
    `miniclip check DATA | head`, it ends without a word.

    Args:
        command: function to run; it may return an exit code.
        debug: whether to let errors through, with their traceback.

    Returns:
        The command's own exit code, else 0. After an error, its `exit_code`: 2 for `UsageError`, 1 for all others.
        130 after Ctrl-C, 141 if the output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names of files that the terminal's encoding lacks
    with interruptible() as interrupt, ended_children():
        try:
            result = _run_and_flush(command)
            return result if isinstance(result, int) else 0
        except BaseException as error:
            ending = (INTERRUPTED, "") if interrupt.received else _ending(error)
            if ending is None or (debug and ending[0] != CLOSED_PIPE):
                raise
    code, line = ending
    if code == INTERRUPTED:
        print_interrupted()
    with suppress(OSError):
        if line:  # printed here: by now the error's frame is gone, and any progress bar with it
            print(line, file=sys.stderr)
    _leave_closed_pipes()
    return code


def _run_and_flush(command: Callable[[], object]) -> object:
    """Run a command and write out what it printed, while an error in that can still be reported."""
    try:
        result = command()
    except SystemExit:
        _flush()
        raise
    _flush()
    return result


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed before the program started
            stream.flush()


def _ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line of a command that ends with an error; None for an unexpected error."""
    if isinstance(error, MiniClipError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, BrokenPipeError):
        return (CLOSED_PIPE, "") if any(map(_has_no_reader, (sys.stdout, sys.stderr))) else None
    reason = disk_error_message(error) if isinstance(error, Exception) else None
    if reason is None:
        return None
    return 1, f"error: {printable(reason)}; free some space or choose another folder, then run again"


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether a stream of this process is a pipe that nobody reads any more."""
    try:
        descriptor = stream.fileno() if stream is not None else -1
    except (OSError, ValueError):  # replaced by something in memory
        return False
    if descriptor < 0 or not hasattr(select, "poll"):  # Windows: a closed pipe that is not one of these is rare
        return descriptor >= 0
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _leave_closed_pipes() -> None:
    """Let Python's last flush succeed: it would print a traceback and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _has_no_reader(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
