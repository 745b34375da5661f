"""Answers requests for the page's thumbnails before gradio does, in a fraction of the time: each search has 24."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

FOLDER = "miniclip-"  # start of the name of a folder of thumbnails
ROUTE = "/gradio_api/file="  # of gradio's files, which browsers are given

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


class ThumbnailRoute:
    """ASGI middleware that serves thumbnails, and nothing else, from folders that the page made.

    Args:
        app: the rest of the server, which answers everything else.
        served: folder with the folders of thumbnails.
    """

    def __init__(self, app: App, served: str):
        self.app, self.served = app, Path(served)
        inside = re.escape(Path(served).as_posix().rstrip("/"))
        self.pattern = re.compile(rf"{re.escape(ROUTE)}{inside}/({FOLDER}\w+)/(\d+\.jpg)", re.ASCII)

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        content = self.thumbnail(scope)
        if content is None:
            await self.app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"image/jpeg"),
            (b"content-length", str(len(content)).encode()),
            (b"cache-control", b"private, max-age=600"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def thumbnail(self, scope: Message) -> bytes | None:
        """The JPEG that a request is for, or None."""
        if scope["type"] != "http" or scope["method"] != "GET":
            return None
        found = self.pattern.fullmatch(scope["path"])
        if found is None:
            return None
        try:
            return (self.served / found[1] / found[2]).read_bytes()  # small, and in the system's cache
        except OSError:
            return None
