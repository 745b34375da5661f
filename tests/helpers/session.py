"""Folders that are made once for a whole test session, by whichever worker needs them first, and only read."""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Snapshot = dict[str, tuple[int, int]]


def shared_once(request: pytest.FixtureRequest, name: str, build: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a folder that all workers of this session share, and fail at the end if a test has changed it.

    Args:
        request: pytest's, of a fixture of the session.
        name: name of the folder.
        build: fills the empty folder; it runs in one worker, and leaves the random number generators untouched.
    """
    base: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if hasattr(request.config, "workerinput"):  # under xdist each worker has a folder within the session's
        base = base.parent
    folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
    folder.parent.mkdir(exist_ok=True)
    with one_worker(base / "shared" / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
            folder.mkdir()
            with untouched_generators():
                build(folder)
            done.touch()
    before = snapshot(folder)
    yield folder
    changed = {path for path, _ in before.items() ^ snapshot(folder).items()}
    assert not changed, f"tests must not change the shared folder {name}, copy it first: {sorted(changed)}"


@contextmanager
def one_worker(path: Path) -> Iterator[None]:
    """Within the block, no other worker is in a block with the same path."""
    from modeling_miniclip.utils.locks import LockedError, lock_file, unlock_file  # after the warm process was forked

    while True:
        try:
            descriptor = lock_file(path)
            break
        except LockedError:
            time.sleep(0.1)
    try:
        yield
    finally:
        unlock_file(path, descriptor)


def snapshot(folder: Path) -> Snapshot:
    """Size and time of change of each file below a folder."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Restores the states of Python's, NumPy's and torch's random number generators after the block."""
    import numpy as np
    import torch

    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
