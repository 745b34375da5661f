"""A server of files on this machine that is slow, or fails on demand."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 65_536  # bytes sent at a time


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Args:
        what: description.
        kind: `error` (status 503), `missing` (404), `cut` (the connection ends after half of the file), `stall`
            (after half of the file nothing more comes), or "" for nothing.
        times: how many requests for a file go wrong, before the others succeed; None for all of them.
        shard: part of the name of the files concerned.
        rate: bytes per second of a connection; None for any number.
    """

    what: str
    kind: str = ""
    times: int | None = None
    shard: str = "00001"
    rate: float | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fault = Fault("none")

    def __init__(self, *args: Any):
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()
        super().__init__(*args)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that close a connection are not reported."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        if self.server.fault.times is not None or not self._refuses(self._kind()):
            super().do_HEAD()

    def do_GET(self) -> None:
        fault = self.server.fault
        self.server.requests[self.path] += 1
        kind = self._kind()
        if self._refuses(kind):
            return
        file = self.send_head()
        if file is None:
            return
        with file:
            size = Path(self.translate_path(self.path)).stat().st_size
            self._send(file, size // 2 if kind else size, fault.rate)
        if kind == "stall":
            self.server.stopped.wait()
        if kind:
            self.close_connection = True

    def _kind(self) -> str:
        """What goes wrong with this request."""
        fault = self.server.fault
        is_over = fault.times is not None and self.server.requests[self.path] > fault.times
        return "" if is_over or fault.shard not in Path(self.path).name else fault.kind

    def _refuses(self, kind: str) -> bool:
        """Whether the request is answered with an error, which is sent."""
        if kind in ("error", "missing"):
            self.send_error(503 if kind == "error" else 404)
            return True
        return False

    def _send(self, file: Any, size: int, rate: float | None) -> None:
        start, sent = time.perf_counter(), 0
        while sent < size:
            piece = file.read(min(PIECE, size - sent))
            self.wfile.write(piece)
            sent += len(piece)
            if rate is not None:
                time.sleep(max(0.0, sent / rate - (time.perf_counter() - start)))

    def log_message(self, *args: Any) -> None:
        """Nothing is logged."""


@contextmanager
def served(folder: Path, fault: Fault) -> Iterator[str]:
    """Serve the files of a folder. Yields the URL of the folder."""
    server = _Server(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    server.fault = fault
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
