"""Notice within a minute that a process of a run, or its machine, is lost, and end the others with one line.

Without it they would wait in their next collective operation: half an hour or for ever, for nothing.

Each process has a thread for this, which works while the main thread waits for other processes, exports or builds a
cache. Process 0 has a connection to each of the others. Both ends of a connection send

- `alive` every 5 s;
- `done` when the process has finished and will close its connection;
- `end` when the run must end, and why. A process that fails sends it; process 0 passes it on to all others, and sends
  it when it notices a loss.

A process is lost if its connection closes without `done` or `end` (it was killed; noticed at once) or if it is silent
for 45 s (its machine or the network is down). The loss of process 0 is noticed by each of the others itself. Then the
first process that is left on each machine prints one line, and all end their loader processes and exit with code 1.
After the error of a process, which it prints itself, the others have some seconds to end by an error of their own.
"""

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from ...errors import MiniClipError, one_line
from .connections import JOIN, Connection, Message, connect, listen, shared_store, wait_for

BEAT, SILENCE = 5.0, 45.0  # s between two signs of life, and without any until a process counts as lost
NOTICE = 3.0  # s in which a loss is noticed after an operation with the lost process has failed
REACTION = 0.5  # s in which a loss is noticed after the launcher has noticed it
GRACE_AFTER_ERROR, GRACE_AFTER_STOP = 5.0, 30.0  # s to end by itself after another process failed, or was stopped
PATIENCE = timedelta(days=7)  # for collective operations, as others may export or build a cache meanwhile

_current: "Heartbeat | None" = None


class Heartbeat:
    """The connections of this process and the thread that watches them.

    Args:
        advice: function that returns what to do after a loss, for the end of the line.

    Attributes:
        verdict: once the run must end: its `text`, the `ranks` that were lost or `failed`, and the `grace`, in
            seconds, in which the other processes may end by themselves.
        store: a store for this start of the run; the launcher's has the addresses of processes before a restart.

    Raises:
        MiniClipError: not all processes have started, or process 0 cannot be reached.
    """

    def __init__(self, advice: Callable[[], str]):
        self.advice = advice
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.verdict: Message | None = None
        self.has_verdict = threading.Event()
        self.previous_handler: Any = signal.SIG_DFL
        me: Message = {"rank": self.rank, "pid": os.getpid(), "place": _place()}
        self._members = {self.rank: me}  # all that have ever been connected
        self._connections: list[Connection] = []
        self._listener: socket.socket | None = None
        self._farewell: Message | None = None
        self._end_of_grace = math.inf
        self._ending = threading.Lock()
        store = shared_store()
        self._joined_by = time.monotonic() + JOIN
        if self.rank == 0:
            self._listener, self._token = listen(store, one_machine=not me["place"])
        else:
            connection, self._token = connect(store, me)
            self._connections, self._members[0] = [connection], connection.member or {}
        self.store = dist.PrefixStore(self._token, store)
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._close)  # else a loader process would keep the connections open
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        self._thread.start()

    # --- the main thread ---------------------------------------------------------------------------------------------

    def leave(self, farewell: Message) -> None:
        """Say `done` or `end` to the other processes, and stop watching them."""
        self._farewell = farewell
        self._thread.join(10)

    def failure(self, error: BaseException) -> Message:
        """What to say to the other processes when this one ends with an error."""
        stopped = not isinstance(error, Exception)  # Ctrl-C, or an exit after SIGTERM
        reason = "was stopped" if stopped else f"failed: {one_line(error)[:500]}"
        grace = GRACE_AFTER_STOP if stopped else GRACE_AFTER_ERROR
        text = f"{self._describe([self.rank])} {reason}"
        return {"end": {"text": text, "ranks": [self.rank], "failed": True, "grace": grace}}

    def handle_sigterm(self, number: int, _: object) -> None:
        """When a process is lost, its launcher sends SIGTERM to the others of the machine: say first which one.

        To be installed as a signal handler in the main thread, with the one before as `previous_handler`.
        """
        if self._ending.locked():
            return
        if os.getpid() == self._members[self.rank]["pid"] and self.has_verdict.wait(REACTION):
            self.end_process()
        signal.signal(number, self.previous_handler)
        signal.raise_signal(number)

    def end_process(self) -> NoReturn:
        """Print the verdict, once per machine, and end this process and its loader processes."""
        with self._ending:  # never released: if both threads come here, one waits until the other ends the process
            guard = threading.Timer(10, os._exit, [1])  # a file system may be lost with its machine
            guard.daemon = True
            guard.start()
            verdict = self.verdict or {}
            if self._speaks(verdict["ranks"], verdict["failed"]):
                tqdm.write(f"error: {MiniClipError(verdict['text'])}; {self.advice()}", file=sys.stderr)
            for child in multiprocessing.active_children():
                child.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _speaks(self, ranks: list[int], failed: bool) -> bool:
        """Whether this is the first process left on its machine; if one failed there, it has printed its error."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        machine = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if failed and any(rank in machine for rank in ranks):
            return False
        return set(range(first, self.rank)) <= set(ranks)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beat = woken = time.monotonic()
        while self._farewell is None and time.monotonic() < self._end_of_grace:
            self._receive(0.2)
            now = time.monotonic()
            if now > woken + 2 * BEAT:  # this process was stopped for some time, as by Ctrl-Z
                for connection in self._connections:
                    connection.heard = now
            woken = now
            if now > beat:
                beat = now + BEAT
                self._send_all({"alive": True})
            if self.verdict is None and self._lost(SILENCE):
                self._receive(0.1)  # from processes that were killed at the same moment
                lost = self._lost(SILENCE - 2 * BEAT)
                text = f"lost {self._describe(sorted(lost))} ({next(iter(lost.values()))})"
                self._decide({"text": text, "ranks": sorted(lost), "failed": False, "grace": 0})
        if self._farewell is None:
            self.end_process()
        self._send_all(self._farewell)
        for connection in self._connections:
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        self._receive(0.2)
        self._close()

    def _receive(self, seconds: float) -> None:
        """Wait for messages and connections, and handle what has arrived."""
        self._connections = [c for c in self._connections if not (c.closed and (c.finished or c.member is None))]
        sources = [connection.socket for connection in self._connections if not connection.closed]
        ready = wait_for([*sources, *filter(None, [self._listener])], seconds)
        for connection in self._connections:
            if connection.socket in ready:
                try:
                    for message in connection.receive():
                        self._handle(connection, message)
                except (ValueError, KeyError, TypeError):  # from a program that is no process of the run
                    connection.closed = True
        if self._listener is not None and self._listener in ready:
            with suppress(OSError):
                self._connections.append(Connection(self._listener.accept()[0]))

    def _handle(self, connection: Connection, message: Message) -> None:
        if connection.member is None:
            member = dict(message["hello"])
            if member.pop("token") != self._token:
                raise ValueError("not of this run")
            connection.member = self._members[int(member["rank"])] = member
            connection.send({"welcome": self._members[self.rank]})
        elif "done" in message or "end" in message:
            connection.finished = True
            if "end" in message and self.verdict is None:
                self._decide(message["end"])

    def _send_all(self, message: Message) -> None:
        for connection in self._connections:
            if connection.member is not None:
                connection.send(message)

    def _decide(self, verdict: Message) -> None:
        """The run must end: pass it on, and end this process after the time of grace."""
        self.verdict = verdict
        self._end_of_grace = time.monotonic() + verdict["grace"]
        if self.rank == 0:
            self._send_all({"end": verdict})
        self.has_verdict.set()

    def _lost(self, silence: float) -> dict[int, str]:
        """Ranks that are lost, with the reason; one is lost after `silence` seconds without a message."""
        now, lost = time.monotonic(), {}
        for connection in self._connections:
            if connection.member is not None and not connection.finished:
                if connection.closed:
                    lost[int(connection.member["rank"])] = "its connection closed"
                elif now > connection.heard + silence:
                    lost[int(connection.member["rank"])] = f"silent for {SILENCE:.0f} s"
        if self.rank == 0 and now > self._joined_by:
            for rank in set(range(self.world_size)) - set(self._members):
                lost[rank] = f"not started within {JOIN / 60:.0f} minutes"
        return lost

    def _describe(self, ranks: list[int]) -> str:
        """Processes with their machines: `process 1 of machine 0 (a)` or `machine 1 (b) with processes 2 and 3`."""
        places: dict[str, list[int]] = {}
        for rank in ranks:
            places.setdefault(self._members.get(rank, {"place": ""})["place"], []).append(rank)
        parts = []
        for place, here in places.items():
            *most, last = map(str, here)
            names = f"processes {', '.join(most)} and {last}" if most else f"process {last}"
            whole = [rank for rank, member in self._members.items() if member["place"] == place]
            if place and len(here) == len(whole) > 1:
                parts.append(f"{place} with {names}")
            else:
                parts.append(f"{names} of {place}" if place else names)
        return ", ".join(parts)

    def _close(self) -> None:
        for connection in self._connections:
            connection.socket.close()
        if self._listener is not None:
            self._listener.close()


def _place() -> str:
    """The machine of this process, with its number if the launcher gave it one; empty if it is the only one."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        return ""
    return " ".join(["machine", *filter(None, [os.environ.get("GROUP_RANK")]), f"({socket.gethostname()})"])


@contextmanager
def ends_with_lost_processes(advice: Callable[[], str]) -> Iterator[None]:
    """Within the block, a process that is lost or fails ends all others with one line and exit code 1.

    With one process, nothing happens.

    Args:
        advice: function that returns what to do after a loss, for the end of the line.

    Raises:
        MiniClipError: not all processes have started, or they cannot reach each other.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    heartbeat = _current = Heartbeat(advice)
    farewell: Message = {"done": True}
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        heartbeat.previous_handler = signal.signal(signal.SIGTERM, heartbeat.handle_sigterm) or signal.SIG_DFL
    try:
        yield
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, MiniClipError) else error
        # Operations with a process that is gone fail with an error of PyTorch: wait for the reason.
        if isinstance(cause, RuntimeError) and heartbeat.has_verdict.wait(NOTICE):
            heartbeat.end_process()
        farewell = heartbeat.failure(error)
        raise
    finally:
        heartbeat.leave(farewell)
        if in_main_thread:
            signal.signal(signal.SIGTERM, heartbeat.previous_handler)


def join_processes(on_cpu: bool, backend: str | None = None) -> PartialState:
    """Connect the processes of the run, if there are several, so that they can exchange tensors.

    Args:
        on_cpu: whether they compute on CPUs.
        backend: backend of torch.distributed; None lets Accelerate choose.
    """
    if _current is None:
        return PartialState(cpu=on_cpu, backend=backend)
    options: dict[str, Any] = {"timeout": PATIENCE, "backend": backend}
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):  # DeepSpeed chooses the store itself
        options |= {"store": _current.store, "rank": _current.rank, "world_size": _current.world_size}
    return PartialState(cpu=on_cpu, **options)


def run_is_ending() -> bool:
    """Whether a process of this run was lost or has failed, and this one is about to end; to ask after SIGTERM."""
    return _current is not None and _current.has_verdict.wait(REACTION)
