"""Shards that are elsewhere (`https://`, `s3://`, `hf://`): fetched whole by fsspec, and kept in a folder for a while.

Any number of processes and workers share the folder: each shard has a lock, and gets its name when it is complete.
Shards that are there are used as they are if their server cannot be reached.
"""

import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...errors import DataError, MiniClipError, Problem, disk_error_message
from ...utils.files import delete_file, replace_file
from ...utils.names import portable_name
from ...utils.processes import process_rank
from .remote_files import UnreachableError, explained, file_system, is_url, unreachable

GB = 1e9
LIMIT_GB = 100.0
IN_USE = 60.0  # seconds after its last use before which a shard is not removed
TOUCHED = 10.0  # seconds after which the time of its last use is written again
ABANDONED = 3600.0  # seconds after which a part is removed that a killed process left
CONNECTIONS = 16
# What tells two versions of a file apart, in the words of the file systems of fsspec.
MARKS = ("size", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "blob_id", "Content-MD5")
FOLDER, GIGABYTES = "MINICLIP_SHARD_FOLDER", "MINICLIP_SHARD_CACHE_GB"  # set for the processes that this one starts


def default_folder() -> Path:
    """The folder of indexes and fetched shards without an argument: `miniclip/shards` in HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "miniclip", "shards")


def use_cache(folder: str | os.PathLike | None = None, limit_gb: float = LIMIT_GB) -> None:
    """Choose how much the folder of fetched shards may hold, and another folder, for this process and its children."""
    if folder is not None:
        os.environ[FOLDER] = os.fspath(folder)
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
        self._versions: dict[str, str] = {}
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
        path, touched = self._used.get(shard) or (os.fspath(self._path_of(shard)), 0.0)
        now = time.monotonic()
        if not touched or now - touched > TOUCHED or not os.path.exists(path):
            self._fetch(shard, Path(path))
            self._check_version(shard, _read(_mark(Path(path))))  # another run may have fetched a later one
            with suppress(OSError):
                os.utime(path)
            self._used[shard] = path, now
        self._fetch_next(shard)
        return path

    def fetched(self, shard: str) -> str | None:
        """The local file of a shard if it is there, else None; a path is returned as it is."""
        path = os.fspath(self._path_of(shard)) if is_url(shard) else shard
        return path if path == shard or os.path.exists(path) else None

    def version(self, shard: str) -> str:
        """What identifies the content of a remote shard, as it was when this process asked last.

        Raises:
            DataError: it cannot be asked for.
        """
        if shard not in self._versions:
            (version,) = self.versions([shard])
            if isinstance(version, DataError):
                raise version
        return self._versions[shard]

    def versions(self, shards: Sequence[str]) -> list[str | DataError]:
        """What identifies the content of each remote shard now; an error for those that cannot be asked for.

        If a shard has changed, its fetched file is removed. If its server cannot be reached, that file counts as
        current, and a warning says so.
        """
        reached: set[str] = set()  # servers that have answered
        gone: dict[str, UnreachableError] = {}  # those that are not asked again
        kept: list[UnreachableError] = []  # one for each shard that is used as it was fetched

        def ask(shard: str) -> str | DataError:
            server = shard.split("/")[2]
            try:
                if server in gone:
                    raise unreachable(shard, gone[server].reason)
                version = self._ask(shard)
                reached.add(server)
                return version
            except UnreachableError as error:
                if server not in reached:
                    gone.setdefault(server, error)
                path = self._path_of(shard)
                known = _read(_mark(path)) if path.exists() else None
                kept.extend([error] if known is not None else [])
                return error if known is None else known
            except DataError as error:
                return error

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = pool.map(ask, shards)
            versions = list(tqdm(answers, "ask for versions", len(shards), unit="shard", delay=2, leave=False))
        self._versions |= {shard: each for shard, each in zip(shards, versions, strict=True) if isinstance(each, str)}
        if kept and process_rank() == 0:
            text = f"{len(kept)} of {len(shards)} shards cannot be asked for ({kept[0].reason})"
            warnings.warn(f"{text}: they are used as they were fetched before", stacklevel=2)
        return versions

    def matches(self, pattern: str) -> list[str]:
        """URLs of the shards that a pattern with `*` stands for; those of the last time, if the server is unreachable.

        Raises:
            DataError: they cannot be listed.
        """
        known = _mark(self._path_of(pattern))
        try:
            with explained(pattern, "cannot be listed"):
                files, path = file_system(pattern)
                found = sorted(files.unstrip_protocol(each) for each in files.glob(path))
                if not found:  # as fsspec also does where it cannot list: ask for the reason
                    with suppress(FileNotFoundError):
                        files.ls(re.split(r"[^/]*[*?\[]", path)[0], refresh=True)
        except UnreachableError:
            before = _read(known)
            if before is None:
                raise
            return before.split("\n")
        if found:
            self._write(known, "\n".join(found))
        return found

    def _ask(self, shard: str) -> str:
        with explained(shard):
            files, remote = file_system(shard)
            version = _version_of(files.info(remote))
        path = self._path_of(shard)
        if _read(_mark(path)) != version:
            with self._locked(path):
                path.unlink(missing_ok=True)
                self._write(_mark(path), version)
        return version

    def _write(self, path: Path, text: str) -> None:
        """Write a small file, unless it says the same already."""
        if _read(path) != text:
            with self._stored():
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
                try:
                    fresh.write_text(text, encoding="utf-8")
                    replace_file(fresh, path)
                finally:
                    fresh.unlink(missing_ok=True)

    def _path_of(self, shard: str) -> Path:
        base = portable_name(shard.rpartition("/")[2])
        return self.folder / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}-{base}"

    def _fetch(self, shard: str, path: Path) -> None:
        if path.exists():
            return
        with self._locked(path):
            if path.exists():  # another process was faster
                return
            part = path.with_name(f"{path.name}.part")
            try:
                with explained(shard), self._stored():
                    self._fetch_part(shard, part)
                    replace_file(part, path)
            finally:
                part.unlink(missing_ok=True)  # the libraries do not go on with it, and a disk may be full

    def _fetch_part(self, shard: str, part: Path) -> None:
        """Fetch a shard to a file.

        Raises:
            DataError: it is not the one that the dataset was read from.
        """
        files, remote = file_system(shard)
        about = files.info(remote)
        self._check_version(shard, _version_of(about))
        size = about.get("size")
        self._make_room(size or 0)
        files.get_file(remote, os.fspath(part))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes arrived")

    def _check_version(self, shard: str, version: str | None) -> None:
        """Raise an error if this is not the version that the dataset was read from."""
        before = self._versions.get(shard) or _read(_mark(self._path_of(shard)))
        if before is not None and version is not None and _differ(before, version):
            text = "has changed since the dataset was read; repeat the command to read it again"
            raise DataError(Problem("shard", text, shard))

    def _fetch_next(self, shard: str) -> None:
        """Fetch the shard after this one in a thread, once."""
        following = self._next.get(shard)
        if following is not None and following not in self._ahead:
            self._ahead.add(following)
            self.fetch_ahead([following])

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Fetch shards that will be needed soon, one after the other, in a thread; paths are left out."""
        missing = [shard for shard in shards if is_url(shard) and not self._path_of(shard).exists()]
        if missing:
            self._thread = threading.Thread(target=self._fetch_all, args=(self._thread, missing), daemon=True)
            self._thread.start()

    def _fetch_all(self, before: threading.Thread | None, shards: Sequence[str]) -> None:
        if before is not None:
            before.join()
        for shard in shards:
            with suppress(Exception):  # `local` raises it when the shard is needed
                self._fetch(shard, self._path_of(shard))

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
            if delete_file(file):
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


def _version_of(about: dict[str, Any]) -> str:
    return json.dumps({key: str(about[key]) for key in MARKS if about.get(key) is not None}, sort_keys=True)


def _differ(before: str, now: str) -> bool:
    """Whether two versions are of different files. (Two servers may have different `ETag`s for the same file.)"""
    first, second = json.loads(before), json.loads(now)
    if first.pop("size", None) != second.pop("size", None):
        return True
    return bool(first) and not first.items() & second.items()


def size_of(version: str) -> int:
    """Bytes of a shard of a version; 0 if the server does not say it."""
    return int(json.loads(version).get("size", 0))


def _mark(path: Path) -> Path:
    """The file with the version of a shard."""
    return path.with_name(f"{path.name}.version")


def _read(path: Path) -> str | None:
    """The content of a small file; None without it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
