"""Folders and files that are either complete or do not exist: written under another name, then renamed.

What differs between systems is here: how names change in one step, what Windows does with files that are open, how
files reach the disk, and which two paths lead to the same file.
"""

import ctypes
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import DISK_ERRNOS, MiniClipError, UsageError
from .names import check_name

PROBE = 2**20  # bytes that must fit on a disk that is not full
ABANDONED = 3600.0  # seconds after which what a killed process left is removed

# Linux's constants for renameat2(2) (fcntl.h, linux/fs.h), and macOS's for renamex_np(2) (stdio.h).
AT_FDCWD, RENAME_EXCHANGE = -100, 2
RENAME_SWAP = 2

# Windows renames, replaces and deletes no file that a program has open, nor a folder with one. Virus scanners open new
# files for moments.
KEEPS_OPEN_FILES = os.name == "nt"
PATIENCE = 10.0  # seconds for which a change is tried again there


def check_new_folder(folder: Path, label: str = "", allowed: Collection[str] = ()) -> None:
    """Check that a folder can be written without overwriting anything.

    Args:
        folder: path that must not exist, or be an empty folder.
        label: start of the error message, such as the flag that named the folder.
        allowed: names of files that may exist in the folder.

    Raises:
        UsageError: it is a file, or a folder with other contents, or its name is not UTF-8.
    """
    check_name(folder, label)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not names <= set(allowed):
        other = "something else" if allowed else "something"
        raise UsageError(
            f"{label}{folder}: there is already {other} here, and nothing is overwritten; name a new folder"
        )


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that replaces `target` when the block ends without an error.

    Until then `target` is untouched. After an error the new folder is removed. If the process dies, the next one that
    replaces the same folder cleans up.

    Args:
        target: folder to write; may exist.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with disk_errors(fresh):
            yield fresh
            commit_folder(fresh, target)
    except BaseException:
        recover_folder(target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def commit_folder(fresh: Path, target: Path) -> None:
    """Flush a finished folder to disk and rename it to `target`; the former content of `target` is removed.

    Linux and macOS exchange the two names in one step. Windows, and some file systems, need two renames. Between them
    `target` does not exist, and its former content is in `.<name>.old`, see [`recover_folder`].

    Args:
        fresh: finished folder.
        target: path of the folder after the rename.
    """
    for path in (fresh, *fresh.rglob("*")):
        _flush(path)
    former = fresh
    if not target.exists():
        move_folder(fresh, target)
    elif not _exchange(fresh, target):
        former = _former(target)
        shutil.rmtree(former, ignore_errors=True)
        move_folder(target, former)
        move_folder(fresh, target)
    _flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put the former folder back if a process died between the two renames of [`commit_folder`]."""
    former = _former(target)
    if former.exists() and not target.exists():
        move_folder(former, target)
    shutil.rmtree(former, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Delete a folder by renaming it first, so that a process that dies here leaves nothing under its name.

    Also removes what is left if an earlier process died here.
    """
    former = _former(path)
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        move_folder(path, former)
        _patiently(lambda: shutil.rmtree(former))


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder, on the same disk, to a name that does not exist."""
    _patiently(lambda: folder.rename(target))


def replace_file(fresh: Path, target: Path) -> None:
    """Rename a file, on the same disk; a file that has the name is replaced in the same step."""
    _patiently(lambda: fresh.replace(target))


def delete_file(path: Path) -> bool:
    """Delete a file, if it is there; False if Windows keeps it because a program has it open."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        if not KEEPS_OPEN_FILES:
            raise
        return False
    return True


def _patiently(change: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            change()
            return
        except PermissionError:
            if not KEEPS_OPEN_FILES or time.monotonic() > end:
                raise
        time.sleep(0.05)


def identity(path: str | os.PathLike) -> tuple[Any, ...]:
    """What tells a file or folder from all others, whichever name or link leads to it.

    Raises:
        OSError: there is none.
    """
    info = os.stat(path)
    if info.st_ino == 0:  # a file system on Windows that does not number its files
        return (os.path.normcase(os.path.realpath(path)),)
    return info.st_dev, info.st_ino


def is_link(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is a symbolic link or, on Windows, a junction, which Python knows from 3.12 on."""
    return entry.is_symlink() or (hasattr(entry, "is_junction") and entry.is_junction())


def is_same_file(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths are equal, or differ only in case or Unicode form and lead to the same file or folder.

    So they do on macOS and Windows by default, while Linux has two files of such names.
    """
    names = [os.fspath(one), os.fspath(other)]
    if names[0] == names[1]:
        return True
    loose = [unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()) for name in names]
    if loose[0] != loose[1]:
        return False
    try:
        return identity(one) == identity(other)
    except OSError:
        return False


def link_folder(source: Path, target: Path) -> None:
    """Copy a folder whose files are never changed in place: with hard links if the file system has them."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """A new file that replaces `target` when the block ends without an error: `target` is never half-written.

    Args:
        target: file to write; may exist.
    """
    fresh = target.with_name(f".{target.name}.new")
    try:
        with disk_errors(target.parent):
            yield fresh
            replace_file(fresh, target)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def name_to_write(target: Path) -> Path:
    """A new name next to a file or folder that several processes may write at once, which takes some seconds.

    The folder of `target` is made. What killed processes left under such names an hour ago or earlier is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    return target.with_name(f".{target.name}.{uuid4().hex}.new")


@lru_cache(maxsize=16)  # a folder may have many thousands of files
def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if re.search(r"^\..*\.[0-9a-f]{32}\.new$", entry.name):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED:
                        _remove(Path(entry.path))


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there.

    Raises:
        OSError: the file cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def shared_file(target: Path) -> Iterator[Path]:
    """A new file that replaces `target` when the block ends without an error, whoever else writes it meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    fresh = name_to_write(target)
    try:
        yield fresh
        replace_file(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step: at any moment it has either the old or the new content.

    Characters that are not Unicode, such as bytes of a file name, are escaped.
    """
    with replaced_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def replace_between_marks(path: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- name -->` and `<!-- end of name -->` in a Markdown file."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    after = rest.split(f"<!-- end of {name} -->")[1]
    replace_text(path, f"{before}<!-- {name} -->\n{text}<!-- end of {name} -->{after}")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Within the block, whatever a library raises because `folder` cannot be written is raised as an OSError.

    PyTorch, FAISS and others say at most at which line of their source code it happened, not why. So after an error,
    this tries to write a file there itself.

    Raises:
        OSError: the disk takes no more, with the system's reason.
    """
    try:
        yield
    except MiniClipError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            raise
        reason = _why_not_writable(folder)
        if reason is None:
            raise
        raise OSError(reason.errno, reason.strerror, str(folder)) from error


def _why_not_writable(folder: Path) -> OSError | None:
    """The error of the file system if it takes no more data, found by writing some; None if it does."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error if error.errno in DISK_ERRNOS else None
    return None


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False if the system or the file system cannot do that."""
    one, other = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform.startswith("linux"):
            done = ctypes.CDLL(None).renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE)
        elif sys.platform == "darwin":
            done = ctypes.CDLL(None).renamex_np(one, other, RENAME_SWAP)
        else:
            return False
    except AttributeError:  # glibc before 2.28, or another libc
        return False
    return bool(done == 0)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if KEEPS_OPEN_FILES and path.is_dir():  # Windows has nothing to flush for it
        return
    descriptor = os.open(path, os.O_RDWR if KEEPS_OPEN_FILES else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
