"""An approximate index for many images: FAISS's inverted file with vectors of 8 bits a number.

The vectors are in cells around `cells(n)` centres, of which a search looks into one in `CELLS_A_PROBE`. What it finds
there is compared again with the embeddings themselves, so that scores and their order are exact. Why this library and
this kind of index: `benchmarks/search.md`.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniClipError, UsageError
from .exact import Neighbours, top_k_rows

FILE = "neighbours.faiss"
CHOICES = ("auto", "exact", "approximate")
APPROXIMATE_FROM = 500_000  # images from which "auto" takes it
TRAINING_ROWS = 40  # a cell, for k-means
CELLS_A_PROBE = 64
LEAST_PROBES = 32
REFINED = 4  # candidates for each image asked for, and no less than LEAST_REFINED
LEAST_REFINED = 40
BLOCK = 65_536  # rows added at a time


def is_chosen(choice: str, count: int) -> bool:
    """Whether an index of so many images gets an approximate one.

    Raises:
        MiniClipError: FAISS is asked for and not installed.
        UsageError: no such choice.
    """
    if choice not in CHOICES:
        raise UsageError(f"neighbours {choice!r}: expected one of {', '.join(CHOICES)}")
    installed = find_spec("faiss") is not None
    if choice == "approximate" and not installed:
        raise MiniClipError("an approximate index needs FAISS: pip install 'miniclip[search]'")
    return choice == "approximate" or (choice == "auto" and installed and count >= APPROXIMATE_FROM)


def cells(count: int) -> int:
    """About twice the square root, as a power of two, but no more than can be trained."""
    number = 1 << round(math.log2(2 * math.sqrt(max(1, count))))
    while number > 1 and number * TRAINING_ROWS > count:
        number //= 2
    return number


def build_neighbours(embeddings: np.ndarray, path: Path) -> None:
    """Write an approximate index of embeddings.

    Args:
        embeddings: `[rows, dim]`, unit norm; may be memory-mapped.
        path: of the file.
    """
    import faiss

    rows, dim = embeddings.shape
    lists = cells(rows)
    index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).choice(rows, min(rows, lists * TRAINING_ROWS), replace=False))
    index.train(embeddings[sample].astype(np.float32))
    for start in range(0, rows, BLOCK):
        index.add(embeddings[start : start + BLOCK].astype(np.float32))
    faiss.write_index(index, str(path))


class ApproximateNeighbours(Neighbours):
    """Search by such a file; rows that are chosen beforehand are searched exactly.

    Args:
        embeddings: that the file was made of.
        path: of the file.
        probes: cells to look into; by default one in `CELLS_A_PROBE`.
    """

    def __init__(self, embeddings: np.ndarray, path: Path, probes: int | None = None):
        faiss: Any = import_module("faiss")  # its stubs lack half of it
        super().__init__(embeddings)
        # Mapped as if in memory: FAISS's older way to map cells starts 32 threads a search to read them ahead.
        self.index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        self.parameters = faiss.SearchParametersIVF(
            nprobe=probes or max(LEAST_PROBES, self.index.nlist // CELLS_A_PROBE)
        )

    def search(self, query: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As [`Neighbours.search`]; some of the largest may be missing."""
        if rows is not None:
            return super().search(query, k, rows)
        wanted = min(max(REFINED * k, LEAST_REFINED), len(self.embeddings))
        _, found = self.index.search(query[None], wanted, params=self.parameters)
        candidates = np.sort(found[0][found[0] >= 0])
        if len(candidates) < min(k, len(self.embeddings)):  # the cells were too empty
            return super().search(query, k)
        scores = self.embeddings[candidates].astype(np.float32) @ query
        best = top_k_rows(scores, k)
        return scores[best], candidates[best]
