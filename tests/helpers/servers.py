"""A web server on loopback that can be slow or fail."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class WebServer:
    """Serves the files of a folder.

    Args:
        folder: the folder.
        url: its URL, without a slash at the end.
        status: status code to answer requests for a file with, by its name.
        get_status: the same for GET requests only.
        drop: number of bytes after which the connection ends, by name.
        seconds: seconds to wait before a file is sent, by name.
        has_ranges: whether it sends parts of files.
        gets: number of GET requests for each file.
        sent: number of bytes sent of each file.
    """

    folder: Path
    url: str = ""
    status: dict[str, int] = field(default_factory=dict)
    get_status: dict[str, int] = field(default_factory=dict)
    drop: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    has_ranges: bool = True
    gets: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """A server on a free port, until the block ends."""
    state = WebServer(folder)
    has_ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            state.gets[self.path.strip("/")] += 1
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            if has_ended.is_set():  # a connection that was left open
                self.close_connection = True
                return
            name = self.path.strip("/")
            path = folder / name
            known = state.status | (state.get_status if with_body else {})
            status = known.get(name, 200 if path.is_file() else 404)
            body = path.read_bytes() if status == 200 else b""
            whole = len(body)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if part and status == 200 and state.has_ranges:
                first, last = int(part[1]), min(int(part[2] or whole), whole - 1)
                body, status = body[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes" if state.has_ranges else "none")
            if path.is_file():
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.end_headers()
            if with_body:
                time.sleep(state.seconds.get(name, 0))
                state.sent[name] += len(body)
                self.wfile.write(body[: state.drop.get(name)])
                self.close_connection = name in state.drop

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        has_ended.set()
        server.shutdown()
        server.server_close()
