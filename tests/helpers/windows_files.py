"""Files as Windows treats them, on Linux: what this process has open or mapped can be neither renamed nor deleted."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip.utils import files, locks


def open_files() -> set[str]:
    """Paths of the files that this process has open or mapped into its memory."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(link))
        except OSError:  # the descriptor of this listing
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        found.add(line.split(maxsplit=5)[-1])
    return found


def check_closed(path: Any) -> None:
    """Raise Windows' error if a file, or any in a folder, is in use."""
    whole = os.path.realpath(path)
    held = sorted(name for name in open_files() if name == whole or name.startswith(f"{whole}/"))
    if held:
        raise PermissionError(errno.EACCES, "used by another process", held[0])


def treat_files_like_windows(patch: pytest.MonkeyPatch) -> None:
    """Let `os` and the package treat files as on Windows until the end of the test; for single-threaded code."""
    rename, replace, unlink, open_file = os.rename, os.replace, os.unlink, os.open

    def checked(change: Callable[..., None], may_replace: bool) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            check_closed(source)
            if os.path.lexists(target):
                if not may_replace or os.path.isdir(target):
                    raise FileExistsError(errno.EEXIST, "exists already", os.fspath(target))
                check_closed(target)
            change(source, target)

        return call

    def unlink_closed(path: Any, **options: Any) -> None:
        is_probe = os.path.basename(path).startswith(".filelock-probe")  # of the library filelock on Linux
        if options.get("dir_fd") is None and not is_probe:
            check_closed(path)
        unlink(path, **options)

    def open_no_folder(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if isinstance(path, str | os.PathLike) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder cannot be opened", os.fspath(path))
        return open_file(path, flags, *rest, **options)

    patch.setattr(os, "rename", checked(rename, may_replace=False))
    patch.setattr(os, "replace", checked(replace, may_replace=True))
    patch.setattr(os, "unlink", unlink_closed)
    patch.setattr(os, "remove", unlink_closed)
    patch.setattr(os, "open", open_no_folder)
    patch.setattr(shutil, "_use_fd_functions", False)  # Windows has none
    patch.setattr(files, "_exchange", lambda first, second: False)
    patch.setattr(files, "KEEPS_OPEN_FILES", True)
    patch.setattr(files, "PATIENCE", 0.0)
    patch.setattr(locks, "FCNTL", None)  # which deletes the open file
