"""How a command ends after Ctrl-C, with a closed output, or while processes that it started are busy."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import pytest

from modeling_miniclip.utils import interrupts, processes
from modeling_miniclip.utils.commands import run_command
from modeling_miniclip.utils.processes import ended_children, follow_parent
from tests.helpers.runs import ROOT

# Modules of the standard library and light ones of the package: such a process starts in a tenth of a second.
PRELUDE = """
import multiprocessing, os, signal, socket, sys, time
from modeling_miniclip.utils.commands import run_command
from modeling_miniclip.utils import interrupts
from modeling_miniclip.utils.interrupts import quit_at_interrupt
from modeling_miniclip.utils.processes import follow_parent
def ready():
    os.write(1, b"ready")
def busy():
    follow_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    time.sleep(100)
"""


def start(code: str, **options: Any) -> "subprocess.Popen[str]":
    """Run code in a process of a group of its own, in which Ctrl-C works as in a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        env=environment | options.pop("env", {}), text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )  # fmt: skip


def run_and_interrupt(code: str, **options: Any) -> tuple[int, str]:
    """Run code, send Ctrl-C to its group when it is ready, and wait for the end of all of its processes.

    Returns:
        Exit code and what it printed as errors.
    """
    process = start(code, **options)
    assert process.stdout is not None and process.stdout.read(5) == "ready"
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


INTERRUPTED = {
    "at work": "sys.exit(run_command(lambda: (ready(), time.sleep(100)), False))",
    "before the command, while modules are imported": "quit_at_interrupt(); ready(); time.sleep(100)",
    "as the interruption becomes another error": """
def work():
    try:
        ready(); time.sleep(100)
    except BaseException:
        raise RuntimeError("a library's own words")
sys.exit(run_command(work, False))""",
    "in a destructor, where Python cannot raise": """
class Slow:
    def __del__(self):
        ready(); time.sleep(100)
def work():
    Slow(); time.sleep(100)
sys.exit(run_command(work, False))""",
    "while a child ignores SIGTERM": """
def work():
    multiprocessing.get_context("fork").Process(target=busy).start(); time.sleep(100)
sys.exit(run_command(work, False))""",
}


@pytest.mark.parametrize("moment", INTERRUPTED)
def test_ctrl_c_is_one_line_and_exit_code_130(moment: str) -> None:
    assert run_and_interrupt(INTERRUPTED[moment]) == (130, "interrupted\n")


def test_only_the_first_of_several_processes_says_so() -> None:
    assert run_and_interrupt(INTERRUPTED["at work"], env={"RANK": "1"}) == (130, "")


def test_second_ctrl_c_ends_a_slow_cleanup() -> None:
    code = """
interrupts.FORWARDED = 0.4
def work():
    try:
        ready(); time.sleep(100)
    finally:
        ready(); time.sleep(100)
sys.exit(run_command(work, False))"""
    process = start(code)
    assert process.stdout is not None
    for moment in ("at work", "cleaning up"):
        assert process.stdout.read(5) == "ready", moment
        os.killpg(process.pid, signal.SIGINT)  # while it cleans up, this is the first one, forwarded by a launcher
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130


def test_ctrl_c_of_a_debugged_command_shows_where_it_was() -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as in background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            run_command(interrupt, debug=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


CLOSED = {
    "a long text": ("stdout", "print('long ' * 100_000)"),
    "a short text, written when the command ends": ("stdout", "print('short')"),
    "a text before the exit": ("stdout", "(print('short'), sys.exit(0))"),
    "a progress bar": ("stderr", "[print(i, file=sys.stderr) for i in range(10)]"),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_output_ends_a_command_without_a_word(case: str) -> None:
    name, expression = CLOSED[case]
    reader, writer = os.pipe()
    os.close(reader)
    process = start(f"sys.exit(run_command(lambda: {expression}, False))", **{name: writer})
    os.close(writer)
    assert not any(process.communicate(timeout=60)) and process.returncode == 141


def test_broken_connection_is_no_closed_output() -> None:
    code = """
ends = socket.socketpair(); ends[1].close()
sys.exit(run_command(lambda: ends[0].send(b"x"), False))"""
    process = start(code)
    assert "BrokenPipeError" in process.communicate(timeout=60)[1] and process.returncode == 1


def test_full_device_as_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = start("sys.exit(run_command(lambda: print('short'), False))", stdout=full)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and errors.splitlines()[0].startswith("error: cannot write: [Errno 28]")
    assert len(errors.splitlines()) == 1


# --- processes that a command started -------------------------------------------------------------------------------


def ignore_sigterm_and_sleep(_: object = None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)


def start_child(**options: Any) -> BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=ignore_sigterm_and_sleep, **options)
    child.start()
    return child


def raise_error() -> NoReturn:
    raise RuntimeError("unexpected")


@pytest.mark.parametrize("daemon", [False, True])
def test_children_end_with_an_unexpected_error(daemon: bool) -> None:
    bystander = start_child()
    children: list[BaseProcess] = []
    with pytest.raises(RuntimeError, match="unexpected"), ended_children():
        children.append(start_child(daemon=daemon))
        raise_error()
    assert not children[0].is_alive() and bystander.is_alive()
    bystander.kill()
    bystander.join()


def test_children_end_with_an_error_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="unexpected"):
        run_command(lambda: (start_child(), raise_error()), False)
    pool = ProcessPoolExecutor(1)
    with pytest.raises(RuntimeError, match="unexpected"):
        run_command(lambda: (pool.submit(ignore_sigterm_and_sleep), raise_error()), False)
    assert multiprocessing.active_children() == [] and capsys.readouterr().err == ""


# --- other systems --------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """In place of the end of a process."""


def end_of(parent_alive: list[bool], monkeypatch: pytest.MonkeyPatch, parent_pid: int) -> int:
    """How often a child asked for its parent's number until it ended, if it waits for the parent itself otherwise."""

    class Parent:
        pid = parent_pid

        def join(self) -> None:
            parent_alive.clear()

    asked = 0

    def getppid() -> int:
        nonlocal asked
        asked += 1
        return 10 if parent_alive and parent_alive.pop() else 1

    def leave(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(os, "getppid", getppid)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(processes, "SECONDS_BETWEEN_CHECKS", 0)
    with pytest.raises(Ended):
        processes._exit_after(Parent())  # type: ignore[arg-type]
    return asked


def test_a_forked_process_asks_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_of([True, True, True], monkeypatch, parent_pid=10) == 4


def test_process_of_a_fork_server_waits_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [True, True, True]
    assert end_of(alive, monkeypatch, parent_pid=11) == 1
    assert not alive


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no fork server here")
def test_processes_of_a_fork_server_live_on() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), initializer=follow_parent) as pool:
        assert pool.submit(time.sleep, 0.3).result(60) is None


def test_a_child_leaves_ctrl_c_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.append((number, handler)))
    monkeypatch.setattr(interrupts, "is_child", lambda: True)
    interrupts.quit_at_interrupt()
    assert set_to == [(signal.SIGINT, signal.SIG_IGN)]


def test_ctrl_break_ends_a_command_like_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(interrupts, "TERMINATING", (signal.SIGTERM, 21))  # Windows' number
    interrupts.exit_when_terminated()
    for number in (signal.SIGTERM, 21):
        with pytest.raises(SystemExit) as error:
            handlers[number](number, None)
        assert error.value.code == 143
