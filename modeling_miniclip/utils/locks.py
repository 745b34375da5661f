"""A lock that a run holds on a file, and that ends with its process, on every system.

Linux and macOS have POSIX record locks: loader processes, which may live some seconds longer, do not inherit them.
Windows locks a range of bytes, here one beyond the text, so that others can still read who holds the file. Some
network file systems have no locks.
"""

import errno
import os
import socket
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

BEYOND = 1 << 30  # place of the byte that Windows locks
HELD = (errno.EACCES, errno.EAGAIN)  # what systems say if another process holds the lock


class LockedError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: which process on which machine; empty if it has just started.
    """

    def __init__(self, holder: str):
        super().__init__(holder)
        self.holder = holder


def _module(name: str) -> Any:
    """A module that only some systems have, or None."""
    try:
        return import_module(name)
    except ImportError:
        return None


FCNTL, MSVCRT = _module("fcntl"), _module("msvcrt")


def lock_file(path: Path) -> int:
    """Open and lock a file, and write into it who holds it.

    Args:
        path: file to lock; it may exist.

    Returns:
        Its descriptor, for [`unlock_file`].

    Raises:
        LockedError: another process holds it.
        OSError: it cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(descriptor)
        except OSError as error:
            if error.errno in HELD:
                holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                raise LockedError(holder) from error
            return descriptor  # a file system without locks
        with suppress(OSError):
            # Not a file that its holder has just deleted; Windows deletes no open file.
            if FCNTL is None or os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                break
        os.close(descriptor)
    with suppress(OSError):  # the lock holds on a full disk too
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def unlock_file(path: Path, descriptor: int) -> None:
    """Delete a file that [`lock_file`] has locked, and release the lock."""
    if FCNTL is None:
        os.close(descriptor)  # Windows deletes no open file, so nobody can hold one that is deleted
    with suppress(OSError):
        os.unlink(path)
    if FCNTL is not None:
        os.close(descriptor)  # after it is deleted: who has opened it meanwhile finds that it is gone


def _take(descriptor: int) -> None:
    """Lock a file without waiting.

    Raises:
        OSError: another process holds the lock, or the file system has no locks.
    """
    if FCNTL is not None:
        FCNTL.lockf(descriptor, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
    elif MSVCRT is not None:
        os.lseek(descriptor, BEYOND, os.SEEK_SET)
        try:
            MSVCRT.locking(descriptor, MSVCRT.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
