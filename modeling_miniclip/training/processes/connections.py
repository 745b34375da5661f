"""Connections from process 0 of a run to all others, over which the heartbeat sends its messages, lines of JSON."""

import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ...errors import MiniClipError, one_line

JOIN = 600.0  # s for all processes to start
KEY = "miniclip/heartbeat"  # of the address of process 0 in the store that the processes share
LONGEST = 2**16  # bytes of a message
SELECTOR: Any = getattr(selectors, "PollSelector", selectors.SelectSelector)  # Windows has only the latter

Message = dict[str, Any]


class Connection:
    """One end of a connection.

    Attributes:
        member: `rank`, `pid` and `place` of the process at the other end, once it has introduced itself.
        heard: time of the last message.
        closed: whether nothing can be received any more.
        finished: whether the other end has said that it will close.
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
        """Messages that have arrived.

        Raises:
            ValueError: what has arrived is no message, as the other end is another program.
        """
        try:
            data = self.socket.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.closed = not data
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LONGEST:
            raise ValueError("not a message")
        return [json.loads(line) for line in lines]


def wait_for(sockets: Sequence[socket.socket], seconds: float) -> list[socket.socket]:
    """Sockets from which something can be received, or with a connection to accept, as soon as there is one.

    (`multiprocessing.connection.wait` cannot wait for connections on Windows.)
    """
    if not sockets:  # an error on Windows
        time.sleep(seconds)
        return []
    with SELECTOR() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ, each)
        return [key.data for key, _ in selector.select(seconds)]


def shared_store() -> dist.Store:
    """The store of the process group, or the one that PyTorch will build it with.

    Raises:
        MiniClipError: not all processes have started.
    """
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


def listen(store: dist.Store, one_machine: bool) -> tuple[socket.socket, str]:
    """In process 0: open a port for the others and publish its address.

    Args:
        store: the shared store.
        one_machine: whether all processes are on this machine; then others cannot reach the port.

    Returns:
        The socket, and a secret that the others get from the store.
    """
    if one_machine:
        hosts = ["127.0.0.1"]
        listener = socket.create_server((hosts[0], 0), backlog=1024)
    else:
        hosts, both = _own_addresses(), socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
    listener.setblocking(False)
    token = secrets.token_hex()
    address = {"hosts": hosts, "port": listener.getsockname()[1], "token": token}
    store.set(KEY, json.dumps(address))
    return listener, token


def connect(store: dist.Store, me: Message) -> tuple[Connection, str]:
    """In another process: connect to process 0, and introduce the processes to each other.

    Args:
        store: the shared store. Until process 0 has started, it may have the address of one before a restart.
        me: what `Connection.member` will be in process 0.

    Returns:
        The connection, and the secret.

    Raises:
        MiniClipError: process 0 cannot be reached.
    """
    tried, end = "it has not started", time.monotonic() + JOIN
    while time.monotonic() < end:
        address = _published_address(store)
        for host in address["hosts"]:
            tried = f"{host}, port {address['port']}"
            with suppress(OSError):
                connection = Connection(socket.create_connection((host, address["port"]), timeout=5))
                connection.send({"hello": {**me, "token": address["token"]}})
                wait_for([connection.socket], 5)
                for message in connection.receive():
                    connection.member = message["welcome"]
                    return connection, address["token"]
        time.sleep(0.2)
    raise MiniClipError(
        f"process {me['rank']} cannot connect to process 0 ({tried}): all machines must be able to reach each other "
        "on all ports, see docs/several-machines.md"
    )


def _published_address(store: dist.Store) -> Message:
    try:
        return dict(json.loads(store.get(KEY))) if store.check([KEY]) else {"hosts": []}
    except RuntimeError as error:
        raise MiniClipError(f"the launcher of process 0 has ended: {one_line(error)}") from error


def _own_addresses() -> list[str]:
    """Names and addresses under which other processes may reach this one, the likeliest first."""
    main, own = os.environ["MASTER_ADDR"], socket.gethostname()
    found = [main, own]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((main, 9))  # sends nothing, but chooses the network card
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(own, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(found))
