"""Tables of sources on disk: each is written once, by one process, and opened by all others.

A table's folder is named by a hash of everything that it depends on, so that an edited caption file is read again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...errors import MiniClipError, disk_error_message
from ...utils.checksums import file_checksum
from ...utils.files import replaced_folder

FORMAT = 4  # part of every hash: increase it when rows are read or stored in another way


def default_cache_dir() -> Path:
    """`HF_HOME/miniclip/datasets`, next to the caches of the other Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "miniclip" / "datasets"


def content_of(path: str | os.PathLike) -> list[Any]:
    """What identifies a text file in a key: its path and a checksum of its content."""
    return [os.path.abspath(path), file_checksum(Path(path))]


def stat_of(path: str | os.PathLike) -> list[Any]:
    """What identifies a large file in a key: its path, size and time of change."""
    info = os.stat(path)
    return [os.path.abspath(path), info.st_size, info.st_mtime_ns]


def digest_of(parts: Iterable[Any]) -> str:
    """A hash of JSON-compatible values, one after the other."""
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(json.dumps(part, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()


def cached_table(
    key: Iterable[Any],
    cache_dir: Path,
    build: Callable[[Path], object],
    advice: str = "choose another folder with --dataset_cache_dir",
) -> Path:
    """The folder of a table, built now unless it is there.

    Two processes that need the same table build it once: the second one waits for the first. If a process dies while
    it writes, nothing half-written is read, and the next one that builds a table cleans up.

    Args:
        key: everything that the table depends on, as JSON-compatible values.
        cache_dir: folder of all tables.
        build: writes the table into an empty folder.
        advice: what to do if the folder cannot be written to.

    Raises:
        MiniClipError: the folder cannot be written to.
    """
    from huggingface_hub.utils import WeakFileLock

    folder = cache_dir / digest_of([FORMAT, *key])
    try:
        if not folder.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(cache_dir / f".{folder.name}.lock"):
                if not folder.exists():
                    _remove_unfinished(cache_dir)
                    with replaced_folder(folder) as fresh:
                        build(fresh)
        with suppress(PermissionError):  # a cache that others may only read
            os.utime(folder)  # when it was used last
    except OSError as error:
        reason = disk_error_message(error)
        if reason is None and not isinstance(error, PermissionError):
            raise
        raise MiniClipError(
            f"the table of the dataset cannot be stored in {cache_dir}: {reason or error.strerror}; free some "
            f"space, or {advice}"
        ) from error
    return folder


def _remove_unfinished(cache_dir: Path) -> None:
    """Remove what killed processes left of their tables: nobody holds the lock of these."""
    from huggingface_hub.utils import WeakFileLock

    for fresh in cache_dir.glob(".*.new"):
        with suppress(OSError), WeakFileLock(fresh.with_suffix(".lock"), timeout=0.1):  # a TimeoutError is an OSError
            shutil.rmtree(fresh, ignore_errors=True)
