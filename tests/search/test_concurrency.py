"""An index gives each of many threads, and each forked process, the answers that it gives to one."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from modeling_miniclip.search.filters import EntryFilter
from modeling_miniclip.search.index import SCHEMA, ImageIndex, Manifest, write_index
from tests.helpers.runs import ROOT, environment

ROWS, DIM = 6000, 64
KINDS = ["float32", "float16", pytest.param("approximate", marks=pytest.mark.skipif(
    find_spec("faiss") is None, reason="no FAISS: pip install 'miniclip[search]'"))]  # fmt: skip


def write(folder: Path, kind: str, seed: int = 0) -> Path:
    """An index of random vectors, each image with a caption and a thumbnail of its own."""
    rng = np.random.default_rng(seed)
    names = [f"/photos/{seed}/{row}.jpg" for row in range(ROWS)]
    columns: dict[str, list[Any]] = {name: [None] * ROWS for name in SCHEMA.names}
    columns |= {"id": names, "captions": [["even" if row % 2 == 0 else "odd"] for row in range(ROWS)]}
    columns["thumbnail"] = [name.encode() for name in names]
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    vectors = rng.standard_normal((ROWS, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    dtype, neighbours = ("float32", kind) if kind == "approximate" else (kind, "exact")
    write_index(folder, Manifest("model", "0", DIM, dtype, neighbours=neighbours), entries, [vectors])
    return folder


def queries(count: int = 40) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, DIM), np.float32)


def ask(index: ImageIndex, query: np.ndarray) -> list[Any]:
    """What the page does for a query."""
    found = index.search(query, 5)
    odd = index.search(query, 5, EntryFilter(caption_contains="odd"))
    assert all(match.index % 2 == 1 for match in odd)
    return [*found, *odd, index.entry(found[0].index), index.thumbnail(found[0].index)]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_same_answers_as_one(tmp_path: Path, kind: str) -> None:
    folder, asked = write(tmp_path / "index", kind), queries()
    expected = [ask(ImageIndex.open(folder), query) for query in asked]
    assert expected[0][-1] == expected[0][0].name.encode()
    index = ImageIndex.open(folder)  # nothing of it was read yet
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            assert list(threads.map(lambda query: ask(index, query), asked)) == expected


# With two threads of OpenMP, which do not survive a fork: a search of half-precision numbers would wait for the other.
FORKING = """
import multiprocessing, sys
from tests.search.test_concurrency import ImageIndex, ask, queries

opened, used, asked = ImageIndex.open(sys.argv[1]), ImageIndex.open(sys.argv[1]), queries(4)
expected = [ask(used, query) for query in asked]

def child(index):
    return [ask(index, query) for query in asked]

def child_of_opened(_):
    return child(opened)

def child_of_used(_):
    return child(used)

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(child_of_opened, [0, 1]) + pool.map(child_of_used, [0, 1]) == [expected] * 4
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_processes_forked_before_or_after_the_first_search_get_its_answers(tmp_path: Path, kind: str) -> None:
    argv = [sys.executable, "-c", FORKING, str(write(tmp_path / "index", kind))]
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
