"""Ctrl-C ends a command with one line and exit code 130, at any moment from its first import on.

What signals do on which system is here: nothing sends SIGTERM on Windows, which has Ctrl-Break instead, and `os.kill`
ends a process there, whatever the signal.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

from .processes import is_child

INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells report it
TERMINATED = 128 + signal.SIGTERM
FORWARDED = 1.0  # seconds within which another SIGINT is the same Ctrl-C, passed on by a launcher
STARTED = time.perf_counter()  # about when this process started: before the imports of a program, which take seconds

# Signals that ask a process to end soon: SIGTERM, and Ctrl-Break on Windows.
TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name))

_printed = False  # whether this command has printed its line


def print_interrupted() -> None:
    """Print `interrupted` once for this command, which may run in several processes."""
    global _printed
    if not _printed and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    _printed = True


def _quit(*_: Any) -> None:
    print_interrupted()
    os._exit(INTERRUPTED)


def quit_at_interrupt() -> None:
    """From now on Ctrl-C ends this process at once: for a program whose imports, which take seconds, come next.

    A process that `multiprocessing` has started, and that loads the program once more, leaves Ctrl-C to its parent.
    """
    if is_child():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell lets background jobs ignore it
        signal.signal(signal.SIGINT, _quit)


def exit_when_terminated() -> None:
    """From now on SIGTERM, or Ctrl-Break on Windows, ends the program like Ctrl-C: everything is cleaned up."""
    for number in TERMINATING:
        signal.signal(number, lambda *_: sys.exit(TERMINATED))


def interrupt_main_thread() -> None:
    """Let the main thread get SIGINT, also while it waits for the system."""
    if os.name == "nt":
        signal.raise_signal(signal.SIGINT)  # `os.kill` would end this process
    else:
        os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[SimpleNamespace]:
    """Within the block Ctrl-C raises KeyboardInterrupt, so that everything is cleaned up; another one quits at once.

    Yields:
        An object whose attribute `received` says whether there was a Ctrl-C.
    """
    global _printed
    _printed = False
    state, since, process = SimpleNamespace(received=False), -FORWARDED, os.getpid()

    def handle(*_: Any) -> None:
        nonlocal since
        if os.getpid() != process or time.monotonic() < since + FORWARDED:  # a child that was just forked
            return
        if state.received:
            _quit()
        state.received, since = True, time.monotonic()
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        """Raise it a little later: in a destructor, say, Python cannot, and would print a traceback and go on."""
        if unraisable.exc_type is not KeyboardInterrupt:
            return hook(unraisable)
        nonlocal since
        state.received, since = False, -FORWARDED
        threading.Timer(0.05, interrupt_main_thread).start()

    is_main = threading.current_thread() is threading.main_thread()  # the only one that receives signals
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield state
        return
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    handler = signal.signal(signal.SIGINT, handle)
    try:
        yield state
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)  # None: it was not set from Python
