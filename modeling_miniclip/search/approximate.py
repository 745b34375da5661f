"""Approximate nearest neighbours for large indexes: FAISS's inverted file with 8 bits per number.

The vectors are grouped in cells, see [`number_of_cells`], and a search visits one cell in `CELLS_PER_PROBE`. What it
finds there is compared again with the embeddings themselves, so scores and their order are exact. For the choice of
library and index type see `benchmarks/search.md`.
"""

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniClipError, UsageError
from .embeddings_file import Embeddings
from .exact import Neighbours, top_k_rows

FILE = "neighbours.faiss"
CHOICES = ("auto", "exact", "approximate")
APPROXIMATE_FROM = 500_000  # images from which "auto" means approximate
TRAINING_ROWS = 40  # rows per cell for k-means
CELLS_PER_PROBE = 64  # a search visits one of this many cells
LEAST_PROBES = 32  # smallest number of cells that a search visits
REFINED = 4  # candidates per requested image, and at least LEAST_REFINED in total
LEAST_REFINED = 40
BLOCK = 65_536  # rows that are added at a time


def uses_approximate_search(choice: str, count: int) -> bool:
    """Whether an index gets approximate search.

    Args:
        choice: `auto`, `exact` or `approximate`.
        count: number of images in the index.

    Raises:
        MiniClipError: the choice is `approximate` and FAISS is not installed.
        UsageError: there is no such choice.
    """
    if choice not in CHOICES:
        raise UsageError(f"neighbours {choice!r}: expected one of {', '.join(CHOICES)}")
    installed = find_spec("faiss") is not None
    if choice == "approximate" and not installed:
        raise MiniClipError("an approximate index needs FAISS: pip install faiss-cpu")
    return choice == "approximate" or (choice == "auto" and installed and count >= APPROXIMATE_FROM)


def number_of_cells(count: int) -> int:
    """Number of cells for `count` vectors: about twice the square root, a power of two, few enough to be trained."""
    number = 1 << round(math.log2(2 * math.sqrt(max(1, count))))
    while number > 1 and number * TRAINING_ROWS > count:
        number //= 2
    return number


def build_neighbours(embeddings: Embeddings, path: Path) -> None:
    """Write an approximate index of embeddings.

    Args:
        embeddings: `[rows, dim]`, unit norm; may be memory-mapped.
        path: file to write.
    """
    import faiss

    rows, dim = embeddings.shape
    lists = number_of_cells(rows)
    index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).choice(rows, min(rows, lists * TRAINING_ROWS), replace=False))
    index.train(embeddings[sample].astype(np.float32))
    for start in range(0, rows, BLOCK):
        index.add(embeddings[start : start + BLOCK].astype(np.float32))
    faiss.write_index(index, str(path))


class ApproximateNeighbours(Neighbours):
    """Search with a file of [`build_neighbours`]. Filtered searches are exact.

    Args:
        embeddings: `[rows, dim]` embeddings from which the file was built.
        path: path of the file.
        probes: cells to visit; by default one in `CELLS_PER_PROBE`.
    """

    def __init__(self, embeddings: Embeddings, path: Path, probes: int | None = None):
        faiss: Any = import_module("faiss")  # its type stubs are incomplete
        super().__init__(embeddings)
        # IFC, because FAISS's older way to map cells starts 32 read-ahead threads per search.
        self.index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        self.parameters = faiss.SearchParametersIVF(
            nprobe=probes or max(LEAST_PROBES, self.index.nlist // CELLS_PER_PROBE)
        )

    def search(self, query: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Like [`Neighbours.search`], but some of the largest may be missing."""
        if rows is not None:
            return super().search(query, k, rows)
        wanted = min(max(REFINED * k, LEAST_REFINED), len(self.embeddings))
        _, found = self.index.search(query[None], wanted, params=self.parameters)
        candidates = np.sort(found[0][found[0] >= 0])
        if len(candidates) < min(k, len(self.embeddings)):  # too few vectors in the cells
            return super().search(query, k)
        scores = self.embeddings[candidates].astype(np.float32) @ query
        best = top_k_rows(scores, k)
        return scores[best], candidates[best]
