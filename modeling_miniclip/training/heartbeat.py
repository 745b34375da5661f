"""Notice within a minute that a process of a run, or its machine, is lost, and end the others with one line.

Without it they would wait in their next collective operation: half an hour or for ever, for nothing.

Each process has a thread for this, which works while the main thread waits for other processes, exports or builds a
cache. Process 0 listens, and each other process keeps a connection to it. Messages are lines of JSON:

- `hello` and `welcome`: who is at the two ends.
- `alive`: sent every 5 s by both ends.
- `done`: the process has finished, and closes its connection.
- `end`: the run must end, and why. A process that fails sends it; process 0 passes it on to all others, and sends it
  when it notices a loss.

A process is lost if its connection closes without `done` or `end` (it was killed; noticed at once) or if it is silent
for 45 s (its machine or the network is down). The loss of process 0 is noticed by each of the others itself. Then the
first process that is left on each machine prints one line, and all end their loader processes and exit with code 1.
After the error of a process, which it prints itself, the others have some seconds to end by an error of their own.
"""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import secrets
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
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

from ..errors import MiniClipError, one_line

BEAT, SILENCE = 5.0, 45.0  # s between two signs of life, and without any until a process counts as lost
JOIN = 600.0  # s for all processes to start
NOTICE = 3.0  # s in which a loss is noticed after an operation with the lost process has failed
REACTION = 0.5  # s in which a loss is noticed after the launcher has noticed it
GRACE_AFTER_ERROR, GRACE_AFTER_STOP = 5.0, 30.0  # s to end by itself after another process failed, or was stopped
PATIENCE = timedelta(days=7)  # for collective operations, as others may export or build a cache meanwhile
KEY = "miniclip/heartbeat"  # in the store that the processes share at their start: the address of process 0

Message = dict[str, Any]
_current: "Heartbeat | None" = None


class Connection:
    """One end of a connection: sends and receives messages.

    Attributes:
        member: `rank`, `pid` and `place` of the process at the other end, once it has introduced itself.
        heard: time of the last message.
        closed: whether nothing can be received any more.
        finished: whether the other end has said `done` or `end`.
    """

    def __init__(self, end: socket.socket):
        self.socket = end
        self.member: Message | None = None
        self.heard = time.monotonic()
        self.closed = self.finished = False
        self._received = b""
        end.setblocking(False)

    def send(self, message: Message) -> None:
        """Send a message, unless the other end is gone."""
        with suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """Messages that have arrived."""
        try:
            data = self.socket.recv(2**16)
            self.closed = not data
        except BlockingIOError:
            return []
        except OSError:
            self.closed = True
            return []
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > 2**16:
            raise ValueError("not a line")
        return [json.loads(line) for line in lines]


class Heartbeat:
    """The connections of this process and the thread that watches them.

    Args:
        advice: function that returns what to do after a loss, for the end of the line.

    Attributes:
        verdict: once the run must end: its `text`, the `ranks` that were lost or `failed`, and the `grace`, in
            seconds, in which the other processes may end by themselves.

    Raises:
        MiniClipError: not all processes have started, or process 0 cannot be reached.
    """

    def __init__(self, advice: Callable[[], str]):
        self.advice = advice
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.verdict: Message | None = None
        self.has_verdict = threading.Event()
        self.previous_handler: Any = signal.SIG_DFL
        self._me = {"rank": self.rank, "pid": os.getpid(), "place": _place()}
        self._members = {self.rank: self._me}  # all that have ever been connected
        self._connections: list[Connection] = []
        self._listener: socket.socket | None = None
        self._farewell: Message | None = None
        self._end_of_grace = math.inf
        self._ending = threading.Lock()
        self._store = _shared_store()  # kept, as process 0 may be its server
        self._joined_by = time.monotonic() + JOIN
        self._token = secrets.token_hex()  # of this start of the run; the others get it from process 0
        if self.rank == 0:
            self._listen()
        else:
            self._connections = [self._connect()]
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._close)  # else a loader process would keep the connections open
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        self._thread.start()

    @property
    def store(self) -> dist.Store:
        """A store for this start of the run. A launcher's store has the addresses of processes before a restart."""
        return dist.PrefixStore(self._token, self._store)

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

    def end_process(self) -> NoReturn:
        """Print the verdict, once per machine, and end this process and its loader processes."""
        with self._ending:  # never released: if both threads come here, one waits until the other ends the process
            guard = threading.Timer(10, os._exit, [1])  # a file system may be lost with its machine
            guard.daemon = True
            guard.start()
            if self._speaks():
                assert self.verdict is not None
                tqdm.write(f"error: {MiniClipError(self.verdict['text'])}; {self.advice()}", file=sys.stderr)
            for child in multiprocessing.active_children():
                child.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def handle_sigterm(self, number: int, _: object) -> None:
        """A launcher sends SIGTERM to the processes of its machine when one is lost: say first which one.

        To be installed as a signal handler in the main thread, with the one before as `previous_handler`.
        """
        if self._ending.locked():
            return
        if os.getpid() == self._me["pid"] and self.has_verdict.wait(REACTION):
            self.end_process()
        signal.signal(number, self.previous_handler)
        signal.raise_signal(number)

    def _speaks(self) -> bool:
        """Whether this is the first process left on its machine; if one failed there, it has printed its error."""
        assert self.verdict is not None
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        machine = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if self.verdict["failed"] and any(rank in machine for rank in self.verdict["ranks"]):
            return False
        return set(range(first, self.rank)) <= set(self.verdict["ranks"])

    # --- connect ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        self._store.set(KEY, json.dumps({"hosts": _own_addresses(), "port": port, "token": self._token}))

    def _connect(self) -> Connection:
        """Connect to process 0. Until it has started, the store may have the address of one before a restart."""
        tried = "it has not started"
        while time.monotonic() < self._joined_by:
            address = self._address_of_process_0()
            for host in address["hosts"]:
                tried = f"{host}, port {address['port']}"
                with suppress(OSError):
                    connection = Connection(socket.create_connection((host, address["port"]), timeout=5))
                    connection.send({"hello": {**self._me, "token": address["token"]}})
                    multiprocessing.connection.wait([connection.socket], 5)
                    for message in connection.receive():
                        connection.member = self._members[0] = message["welcome"]
                        self._token = address["token"]
                        return connection
            time.sleep(0.2)
        raise MiniClipError(
            f"process {self.rank} cannot connect to process 0 ({tried}): all machines must be able to reach each "
            "other on all ports, see docs/several-machines.md"
        )

    def _address_of_process_0(self) -> Message:
        try:
            return dict(json.loads(self._store.get(KEY))) if self._store.check([KEY]) else {"hosts": []}
        except RuntimeError as error:
            raise MiniClipError(f"process {self.rank} lost the connection to the launcher of process 0") from error

    def _accept(self) -> None:
        """Accept a connection, if one is waiting."""
        with suppress(OSError):
            assert self._listener is not None
            self._connections.append(Connection(self._listener.accept()[0]))

    # --- the thread -------------------------------------------------------------------------------------------------

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
                self._decide(self._loss())
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
        waiting = [connection.socket for connection in self._connections if not connection.closed]
        if self._listener is not None:
            waiting.append(self._listener)
        ready = multiprocessing.connection.wait(waiting, seconds)
        if self._listener in ready:
            self._accept()
        for connection in self._connections:
            if connection.socket in ready:
                try:
                    for message in connection.receive():
                        self._handle(connection, message)
                except (ValueError, KeyError, TypeError):  # from a program that is no process of the run
                    connection.closed = True

    def _handle(self, connection: Connection, message: Message) -> None:
        if connection.member is None:
            member = dict(message["hello"])
            if member.pop("token") != self._token:
                raise ValueError("not of this run")
            connection.member = self._members[int(member["rank"])] = member
            connection.send({"welcome": self._me})
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
        """Ranks that are lost, with the reason.

        Args:
            silence: seconds without a message after which a process is lost.
        """
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

    def _loss(self) -> Message:
        lost = self._lost(SILENCE - 2 * BEAT)
        text = f"lost {self._describe(sorted(lost))} ({next(iter(lost.values()))})"
        return {"text": text, "ranks": sorted(lost), "failed": False, "grace": 0}

    def _describe(self, ranks: list[int]) -> str:
        """Processes with their machines: `process 1 (pid 42)`, or `machine 1 (host) with processes 2 and 3`."""
        places: dict[str, list[int]] = {}
        for rank in ranks:
            places.setdefault(self._members.get(rank, {"place": ""})["place"], []).append(rank)
        parts = []
        for place, here in places.items():
            names = ", ".join(map(str, here[:-1])) + f" and {here[-1]}" if len(here) > 1 else str(here[0])
            names = f"processes {names}" if len(here) > 1 else f"process {names}"
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


def _own_addresses() -> list[str]:
    """Names and addresses under which other processes may reach this one, the likeliest first."""
    main, own = os.environ["MASTER_ADDR"], socket.gethostname()
    found = [main, own]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((main, 9))  # sends nothing; chooses the network card
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(own, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(found))


def _shared_store() -> dist.Store:
    """The store of the process group, or the one from which it will be built."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=JOIN)))[0]
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        raise MiniClipError(
            f"process {os.environ['RANK']} cannot join the others at {address}: {one_line(error)}; see "
            "docs/several-machines.md"
        ) from error


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
    if threading.current_thread() is threading.main_thread():
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
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heartbeat.previous_handler)


def join_processes(on_cpu: bool) -> PartialState:
    """Connect the processes of the run, if there are several, so that they can exchange tensors.

    Args:
        on_cpu: whether they compute on CPUs.
    """
    if _current is None:
        return PartialState(cpu=on_cpu)
    options: dict[str, Any] = {"timeout": PATIENCE}
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):  # DeepSpeed chooses the store itself
        options |= {"store": _current.store, "rank": _current.rank, "world_size": _current.world_size}
    return PartialState(cpu=on_cpu, **options)


def run_is_ending() -> bool:
    """Whether a process of this run was lost or has failed, and this one is about to end; to ask after SIGTERM."""
    return _current is not None and _current.has_verdict.wait(REACTION)
