"""Files that are elsewhere (`https://`, `s3://`, `hf://`), as fsspec reads them; its errors in one sentence.

The protocols, their retries and their tokens are those of fsspec, huggingface_hub and s3fs. Only the time that HTTP
waits is set here: fsspec ends each download after five minutes, however well it goes, and waits as long for a server
that sends nothing.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import DataError, MiniClipError, Problem, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Item = TypeVar("Item")
Result = TypeVar("Result")
FAILED = "cannot be fetched"
ADVICE = "repeat the command, in training with --resume_from_checkpoint latest: what was fetched and done is kept"
CONNECT, SILENCE = 30, 30  # seconds for a connection, and without a byte, after which HTTP gives up


class UnreachableError(DataError):
    """A server cannot be reached, or cannot answer now.

    Attributes:
        reason: what the library says.
    """

    reason: str = ""


def is_url(source: str) -> bool:
    """Whether a source is a URL such as `https://...`, not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", source) is not None


def file_system(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URL, and the path in it. What the user has set in fsspec's configuration counts.

    Raises:
        ImportError: it needs a package.
    """
    import fsspec

    protocol = url.partition("://")[0]
    if protocol not in ("http", "https"):  # huggingface_hub gives up after 10 silent seconds, s3fs after 60
        return fsspec.url_to_fs(url)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
    chosen = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return fsspec.url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True} | chosen)


@contextmanager
def explained(url: str, what: str = FAILED) -> Iterator[None]:
    """Within the block, whatever the library of a protocol raises becomes one sentence.

    Args:
        url: URL of the file.
        what: what fails, for the message.

    Raises:
        UnreachableError: the server cannot be reached.
        DataError: a package is missing, or it fails for any other reason.
    """
    try:
        yield
    except MiniClipError:
        raise
    except ImportError as error:
        raise DataError(Problem("unusable", f"cannot be read without a package: {one_line(error)}", url)) from error
    except Exception as error:
        if _is_unreachable(error):
            raise unreachable(url, _reason(error, url), what) from error
        raise DataError(Problem("shard", f"{what}: {_reason(error, url)}; {ADVICE}", url)) from error


def unreachable(url: str, reason: str, what: str = FAILED) -> UnreachableError:
    """The error for a file whose server cannot be reached."""
    error = UnreachableError(Problem("shard", f"{what}: {reason}; {ADVICE}", url))
    error.reason = reason
    return error


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """The result of a function for each item, in their order, while threads work on the next `count` items."""
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        yield from (each.result() for each in waiting)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, url: str) -> str:
    """What a library says. Some name only the file, or nothing, and keep the reason as the cause."""
    for link in _chain(error):
        if str(link) and not url.endswith(str(link)):
            return one_line(link)
    return "no such file (404)" if isinstance(error, FileNotFoundError) else type(error).__name__


def _is_unreachable(error: Exception) -> bool:
    """Whether an error is no answer about the file: the connection failed, or the server has a problem now."""
    statuses = [status for link in _chain(error) if (status := _status(link)) is not None]
    if statuses:
        return min(statuses) >= 500
    no_answer = (FileNotFoundError, PermissionError)
    return any(isinstance(link, OSError) and not isinstance(link, no_answer) for link in _chain(error))


def _status(error: BaseException) -> int | None:
    """The status code of an answer, where aiohttp, httpx and botocore keep it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None
