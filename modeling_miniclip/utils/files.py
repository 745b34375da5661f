"""Folders and files that are either complete or not there: written beside their place, then renamed."""

import ctypes
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError

# Linux's numbers for renameat2(2) (fcntl.h, linux/fs.h).
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_new_folder(folder: Path, label: str = "", allowed: Collection[str] = ()) -> None:
    """Check that a folder can be written without overwriting anything.

    Args:
        folder: path that must not exist, or be an empty folder.
        label: start of the error message, such as the flag that named the folder.
        allowed: names of files that may exist in the folder.

    Raises:
        UsageError: it is a file, or a folder with other contents.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not names <= set(allowed):
        other = "something else" if allowed else "something"
        raise UsageError(
            f"{label}{folder}: there is already {other} here, and nothing is overwritten; name a new folder"
        )


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an error.

    Until then `target` is untouched; on an error the new folder is removed. What a process that died in here has left
    is cleared away by the next one that replaces the same folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        commit_folder(fresh, target)
    except BaseException:
        recover_folder(target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def commit_folder(fresh: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it the name `target`, whose former content is then removed.

    Linux exchanges the two names in one step. Other systems, and file systems that cannot do that, take two renames:
    between them `target` is missing and its former content is called `.<name>.old`, see [`recover_folder`].
    """
    for path in (fresh, *fresh.rglob("*")):
        _flush(path)
    former = fresh
    if not target.exists():
        fresh.rename(target)
    elif not _exchange(fresh, target):
        former = _former(target)
        shutil.rmtree(former, ignore_errors=True)
        target.rename(former)
        fresh.rename(target)
    _flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put the former folder back if a process died between the two renames of [`commit_folder`]."""
    former = _former(target)
    if former.exists() and not target.exists():
        former.rename(target)
    shutil.rmtree(former, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Delete a folder: it is gone at once, and what a process that dies in here leaves is no longer found by its name.

    What an earlier one has left is cleared away too.
    """
    former = _former(path)
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        path.rename(former)
        shutil.rmtree(former)


def link_folder(source: Path, target: Path) -> None:
    """A copy of a folder whose files are never changed in place: hard links, where the file system has them."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file that is, at any moment, as it was or as it shall be."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders at once; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # glibc before 2.28, or another libc
        return False
    done = renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return bool(done == 0)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
