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
        drop: number of bytes after which the connection ends, by name.
        seconds: seconds to wait before a file is sent, by name.
        gets: number of GET requests for each file.
    """

    folder: Path
    url: str = ""
    status: dict[str, int] = field(default_factory=dict)
    drop: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gets: Counter[str] = field(default_factory=Counter)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """A server on a free port, until the block ends."""
    state = WebServer(folder)

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
            name = self.path.strip("/")
            path = folder / name
            status = state.status.get(name, 200 if path.is_file() else 404)
            body = path.read_bytes() if status == 200 else b""
            whole = len(body)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if part and status == 200:
                first, last = int(part[1]), min(int(part[2] or whole), whole - 1)
                body, status = body[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            if path.is_file():
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.end_headers()
            if with_body:
                time.sleep(state.seconds.get(name, 0))
                self.wfile.write(body[: state.drop.get(name)])
                self.close_connection = name in state.drop

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
