"""A file is locked for one process on every system; Windows' and missing locks are simulated."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip.utils import locks
from modeling_miniclip.utils.locks import LockedError, lock_file, unlock_file


class Msvcrt:
    """Windows' module of this name: ranges of bytes are locked, for each open file."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}  # descriptors by inode

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1000, "others could not read the text"
        holder = self.locked.setdefault(os.fstat(descriptor).st_ino, descriptor)
        if holder != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Msvcrt:
    """A system with `msvcrt` and without `fcntl`, which deletes no open file."""
    module, unlink = Msvcrt(), os.unlink

    def unlink_closed(path: Any) -> None:
        inode = os.stat(path).st_ino
        if inode in module.locked:
            with pytest.raises(OSError):
                os.fstat(module.locked.pop(inode))
        unlink(path)

    monkeypatch.setattr(locks, "FCNTL", None)
    monkeypatch.setattr(locks, "MSVCRT", module)
    monkeypatch.setattr(os, "unlink", unlink_closed)
    return module


def test_windows_locks_a_file_once(tmp_path: Path, windows: Msvcrt) -> None:
    path = tmp_path / ".lock"
    for _ in range(2):
        descriptor = lock_file(path)
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(LockedError) as error:
            lock_file(path)
        assert error.value.holder == path.read_text()
        unlock_file(path, descriptor)
        assert not path.exists()


def test_a_system_without_locks_works_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "FCNTL", None)
    monkeypatch.setattr(locks, "MSVCRT", None)
    first, second = lock_file(tmp_path / ".lock"), lock_file(tmp_path / ".lock")
    unlock_file(tmp_path / ".lock", first)
    unlock_file(tmp_path / ".lock", second)
    assert os.listdir(tmp_path) == []
