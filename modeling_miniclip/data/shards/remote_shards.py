"""Shards that are elsewhere (`https://`, `s3://`, `hf://`): fetched whole by fsspec, and kept in a folder for a while.

Any number of processes and workers share the folder: each shard has a lock, and gets its name when it is complete. The
protocols, their retries and their tokens are those of fsspec, huggingface_hub and s3fs.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import DataError, MiniClipError, Problem, disk_error_message, one_line

GB = 1e9
LIMIT_GB = 100.0
IN_USE = 60.0  # seconds after its last use before which a shard is not removed
TOUCHED = 10.0  # seconds after which the time of its last use is written again
ABANDONED = 3600.0  # seconds after which a part is removed that a killed process left
CONNECTIONS = 16
# What tells two versions of a file apart, in the words of the file systems of fsspec.
MARKS = ("size", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "blob_id", "Content-MD5")
FOLDER, GIGABYTES = "MINICLIP_SHARD_FOLDER", "MINICLIP_SHARD_CACHE_GB"  # set for the processes that this one starts


def is_url(source: str) -> bool:
    """Whether a source is a URL such as `https://...`, not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", source) is not None


def default_folder() -> Path:
    """The folder of indexes and fetched shards without an argument: `miniclip/shards` in HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "miniclip", "shards")


def use_cache(folder: str | os.PathLike | None = None, limit_gb: float = LIMIT_GB) -> None:
    """Choose the folder of fetched shards for this process and those that it starts, and how much may be in it."""
    os.environ[FOLDER] = os.fspath(folder or default_folder())
    os.environ[GIGABYTES] = str(limit_gb)


def local_shard(shard: str) -> str:
    """The local file of a shard: the shard itself or, for a URL, the file that it is fetched to.

    Raises:
        DataError: it cannot be fetched.
        MiniClipError: it cannot be stored.
    """
    return current_cache().local(shard) if is_url(shard) else shard


def current_cache() -> "ShardCache":
    """The cache that [`use_cache`] chose."""
    return _cache_of(os.environ.get(FOLDER) or os.fspath(default_folder()), os.environ.get(GIGABYTES) or str(LIMIT_GB))


@lru_cache(maxsize=4)
def _cache_of(folder: str, limit_gb: str) -> "ShardCache":
    return ShardCache(folder, float(limit_gb))


class ShardCache:
    """A folder of fetched shards.

    Args:
        folder: the folder; fetched shards are in its subfolder `fetched`.
        limit_gb: gigabytes above which the least recently used shards are removed, but none that was in use within the
            last minute.
    """

    def __init__(self, folder: str | os.PathLike, limit_gb: float = LIMIT_GB):
        self.folder = Path(folder, "fetched")
        self.limit_gb = limit_gb
        self._used: dict[str, tuple[str, float]] = {}  # path of each shard, and when its last use was written
        self._next: dict[str, str] = {}
        self._ahead: set[str] = set()  # shards that were fetched before they were needed
        self._thread: threading.Thread | None = None  # the last one that fetches ahead

    def expect(self, shards: Sequence[str]) -> None:
        """Name shards in the order in which they will be read: while one is read, the next one is fetched."""
        remote = [shard for shard in shards if is_url(shard)]
        self._next = dict(zip(remote, remote[1:], strict=False))
        self._ahead.clear()

    def local(self, shard: str) -> str:
        """The local file of a shard, fetched now unless it is there.

        Args:
            shard: URL; a path is returned as it is.

        Raises:
            DataError: it cannot be fetched.
            MiniClipError: it cannot be stored.
        """
        if not is_url(shard):
            return shard
        path, touched = self._used.get(shard) or (os.fspath(self.folder / _file_name(shard)), 0.0)
        now = time.monotonic()
        if not touched or now - touched > TOUCHED or not os.path.exists(path):
            self._fetch(shard, Path(path))
            with suppress(OSError):
                os.utime(path)
            self._used[shard] = path, now
        self._fetch_next(shard)
        return path

    def version(self, shard: str) -> str:
        """What identifies the content of a remote shard now. If it has changed, the fetched file is removed.

        Raises:
            DataError: it cannot be asked for.
        """
        import fsspec

        with _explained(shard):
            files, remote = fsspec.url_to_fs(shard)
            about: dict[str, Any] = files.info(remote)
        version = json.dumps({key: str(about[key]) for key in MARKS if about.get(key) is not None}, sort_keys=True)
        path = self.folder / _file_name(shard)
        mark = path.with_name(f"{path.name}.version")
        if not mark.exists() or mark.read_text(encoding="utf-8") != version:
            with self._locked(path):
                path.unlink(missing_ok=True)
                mark.write_text(version, encoding="utf-8")
        return version

    def versions(self, shards: Iterable[str]) -> Iterator[str | DataError]:
        """[`version`][ShardCache.version] of several shards, several at a time; its error for those without."""

        def version(shard: str) -> str | DataError:
            try:
                return self.version(shard)
            except DataError as error:
                return error

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(version, shards)

    def _fetch(self, shard: str, path: Path) -> None:
        import fsspec

        if path.exists():
            return
        with self._locked(path):
            if path.exists():  # another process was faster
                return
            part = path.with_name(f"{path.name}.part")
            with _explained(shard), self._stored():
                files, remote = fsspec.url_to_fs(shard)
                size = files.info(remote).get("size")
                self._make_room(size or 0)
                files.get_file(remote, os.fspath(part))
                if size is not None and part.stat().st_size != size:
                    raise OSError(f"{part.stat().st_size:,} of {size:,} bytes arrived")
                part.replace(path)

    def _fetch_next(self, shard: str) -> None:
        """Fetch the shard after this one in a thread, once."""
        following = self._next.get(shard)
        if following is not None and following not in self._ahead:
            self._ahead.add(following)
            self.fetch_ahead([following])

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Fetch shards that will be needed soon, one after the other, in a thread; paths are left out."""
        missing = [shard for shard in shards if is_url(shard) and not (self.folder / _file_name(shard)).exists()]
        if missing:
            self._thread = threading.Thread(target=self._fetch_all, args=(self._thread, missing), daemon=True)
            self._thread.start()

    def _fetch_all(self, before: threading.Thread | None, shards: Sequence[str]) -> None:
        if before is not None:
            before.join()
        for shard in shards:
            with suppress(Exception):  # `local` raises it when the shard is needed
                self._fetch(shard, self.folder / _file_name(shard))

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards until one more of this size is within the limit."""
        shards, total, now = [], 0, time.time()
        for file in self.folder.iterdir():
            with suppress(OSError):
                info = file.stat()
                if file.suffix == ".part" and now - info.st_mtime > ABANDONED:
                    file.unlink()
                elif file.suffix not in (".part", ".version", ".lock"):
                    shards.append((info.st_mtime, info.st_size, file))
                    total += info.st_size
        for used, size_of_file, file in sorted(shards):
            if total + size <= self.limit_gb * GB or now - used < IN_USE:
                return
            file.unlink(missing_ok=True)
            total -= size_of_file

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        from huggingface_hub.utils import WeakFileLock

        with self._stored():
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f"{path.name}.lock")):
            yield

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """Within the block, a full disk is an error of one line."""
        try:
            yield
        except OSError as error:
            reason = disk_error_message(error)
            is_ours = os.fspath(error.filename or "").startswith(os.fspath(self.folder))
            if reason is None and not (is_ours and isinstance(error, PermissionError)):
                raise
            raise MiniClipError(
                f"shards cannot be stored in {self.folder}: {reason or error.strerror}; free some space, lower "
                "--shard_cache_gb, or let HF_HOME name another disk"
            ) from error


def _file_name(shard: str) -> str:
    base = re.sub(r"[^\w.-]", "_", shard.rpartition("/")[2])[-80:]
    return f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{base}"


@contextmanager
def _explained(shard: str) -> Iterator[None]:
    """Within the block, whatever the library of a protocol raises becomes one sentence."""
    try:
        yield
    except MiniClipError:
        raise
    except ImportError as error:
        raise DataError(Problem("unusable", f"cannot be read without a package: {one_line(error)}", shard)) from error
    except Exception as error:
        reason = one_line(error)
        if reason == shard and error.__cause__ is not None:  # as the file system for HTTP does
            reason = one_line(error.__cause__)
        text = f"cannot be fetched: {reason}; start the same command again: what was fetched and done is kept"
        raise DataError(Problem("shard", text, shard)) from error
