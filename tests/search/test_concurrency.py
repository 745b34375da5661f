"""Concurrent use of an index: threads, forked processes, and replacement of its folder."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from modeling_miniclip.search.filters import EntryFilter
from modeling_miniclip.search.index import SCHEMA, ImageIndex, Manifest, write_index
from tests.helpers.runs import ROOT, environment

ROWS, DIM = 4200, 64  # three row groups, and products that torch shares among threads
NAMES = ("float32", "float16", "approximate")
KINDS = ["float32", "float16", "int8", pytest.param("approximate", marks=pytest.mark.skipif(
    find_spec("faiss") is None, reason="no FAISS: pip install faiss-cpu"))]  # fmt: skip
needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork processes"
)


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write an index of random vectors. Each image has a caption and a thumbnail."""
    rng = np.random.default_rng(seed)
    names = [f"/photos/{seed}/{row}.jpg" for row in range(ROWS)]
    columns: dict[str, list[Any]] = {name: [None] * ROWS for name in SCHEMA.names}
    columns |= {"id": names, "captions": [["even" if row % 2 == 0 else "odd"] for row in range(ROWS)]}
    columns["thumbnail"] = [name.encode() for name in names]
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    vectors = rng.standard_normal((ROWS, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    dtype, neighbours = ("float32", kind) if kind == "approximate" else (kind, "exact")
    write_index(folder, Manifest("model", "0", DIM, dtype, neighbours=neighbours), [entries], [vectors])
    return folder


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that returns the index of a kind, and writes it at the first call. Read-only."""
    folder = tmp_path_factory.mktemp("indexes")

    def index_of(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else write(folder / kind, kind)

    return index_of


def queries(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, DIM), np.float32)


def ask(index: ImageIndex, query: np.ndarray) -> list[Any]:
    """Everything that the search page does for a query."""
    found = index.search(query, 5)
    odd = index.search(query, 5, EntryFilter(caption_contains="odd"))
    assert all(match.index % 2 == 1 for match in odd)
    return [*found, *odd, index.entry(found[0].index), index.thumbnail(found[0].index)]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_same_answers_as_one(indexes: Callable[[str], Path], kind: str) -> None:
    folder, asked = indexes(kind), queries(10)
    expected = [ask(ImageIndex.open(folder), query) for query in asked[:4]]
    assert expected[0][-1] == expected[0][0].name.encode()
    index = ImageIndex.open(folder)  # none of its entries have been read
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda query: ask(index, query), asked))
        assert answers[:4] == expected
        assert list(threads.map(lambda query: ask(index, query), asked)) == answers


def answers_of_fork(indexes: list[ImageIndex], asked: np.ndarray) -> list[list[Any]]:
    """Answers that a forked process gets from indexes that its parent has opened."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=lambda: sender.send([[ask(index, query) for query in asked] for index in indexes])
    )
    process.start()
    try:
        assert receiver.poll(30), "the forked process gives no answer"
        answers: list[list[Any]] = receiver.recv()
        return answers
    finally:
        process.kill()
        process.join()


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_forked_processes_get_the_same_answers(indexes: Callable[[str], Path], kind: str) -> None:
    folder, asked, threads = indexes(kind), queries(4), torch.get_num_threads()
    torch.set_num_threads(2)  # such a pool of threads does not survive a fork
    try:
        opened, used = ImageIndex.open(folder), ImageIndex.open(folder)
        expected = [ask(used, query) for query in asked]
        assert answers_of_fork([opened, used], asked) == [expected, expected]
    finally:
        torch.set_num_threads(threads)


FORKING = """
import multiprocessing, sys
from tests.search.test_concurrency import ImageIndex, ask, queries

folders, asked = sys.argv[1:], queries(4)
opened, used = [ImageIndex.open(folder) for folder in folders], [ImageIndex.open(folder) for folder in folders]
expected = [[ask(index, query) for query in asked] for index in used]

def child(indexes):
    return [[ask(index, query) for query in asked] for index in indexes]

def child_of_opened(_):
    return child(opened)

def child_of_used(_):
    return child(used)

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(child_of_opened, [0, 1]) + pool.map(child_of_used, [0, 1]) == [expected] * 4
"""


@pytest.mark.slow
@needs_fork
def test_a_pool_of_forked_processes_gets_the_same_answers(indexes: Callable[[str], Path]) -> None:
    kinds = NAMES if find_spec("faiss") else NAMES[:2]
    argv = [sys.executable, "-c", FORKING, *(str(indexes(kind)) for kind in kinds)]
    env = {**environment(), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def test_open_index_survives_replacement_of_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "index", "float32")
    query = queries(1)[0]
    before, index = ask(ImageIndex.open(folder), query), ImageIndex.open(folder)
    write(folder, "float32", seed=1)
    assert ask(index, query) == before
    after = ask(ImageIndex.open(folder), query)
    assert after[-1].startswith(b"/photos/1/") and before[-1].startswith(b"/photos/0/")
    shutil.rmtree(folder)
    assert ask(index, query) == before
    assert os.listdir(tmp_path) == []
