"""A small real file system that a test can fill up; only root can mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 64 * 2**20
BALLAST = "ballast"


@contextmanager
def mounted_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 64 MiB at a new folder for the length of the block; skip the test where that fails."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Write a file that leaves only so many bytes free."""
    status = os.statvfs(disk)
    with (disk / BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)


def make_room(disk: Path) -> None:
    """Delete what [`fill`] wrote."""
    (disk / BALLAST).unlink()
