"""The embeddings nearest to a query: exactly, by a matrix product, or by an approximate index where there are many."""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

HALF_MARGIN = 4e-3  # more than a cosine computed in half precision is off; what comes so close is computed again
PROCESS = os.getpid()  # another one than this was forked
LEAST_SELECTED = 0.3  # share of the rows from which computing all of them is faster than gathering them


@dataclass(frozen=True)
class Match:
    """An image found for a query: its name, its cosine similarity, and its row in the embeddings."""

    name: str
    score: float
    index: int


class Neighbours:
    """Exact search.

    Args:
        embeddings: `[rows, dim]` float32 or float16, unit norm; may be memory-mapped.
    """

    def __init__(self, embeddings: np.ndarray):
        self.embeddings = embeddings

    def search(self, query: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` largest inner products, largest first; of equal ones those of the first rows.

        Args:
            query: `[dim]` float32.
            k: how many; all, where there are fewer.
            rows: ascending rows among which to search; None: all.

        Returns:
            `[k]` float32 products and `[k]` rows.
        """
        if rows is not None and len(rows) < LEAST_SELECTED * len(self.embeddings):
            scores = self._products(self.embeddings[rows], query, k)
            best = top_k_rows(scores, k)
            return scores[best], rows[best]
        scores = self._products(self.embeddings, query, k, rows)
        if rows is None:
            best = top_k_rows(scores, k)
        else:
            best = rows[top_k_rows(scores[rows], k)]
        return scores[best], best

    def _products(
        self, embeddings: np.ndarray, query: np.ndarray, k: int, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """`[n]` float32 products, exact wherever they may be among the `k` largest (of the given rows)."""
        if embeddings.dtype == np.float32 or not len(embeddings):
            # One product over everything: it reads each number once, in the order of the file, by all cores.
            return embeddings @ query
        import torch  # NumPy has no product of half precision, and converting first takes ten times as long

        from ..utils.performance import one_thread

        half = torch.from_numpy(np.asarray(embeddings).view(np.int16)).view(torch.float16)
        # A forked process would wait forever for the threads that torch had in its parent.
        with one_thread() if os.getpid() != PROCESS else nullcontext():
            scores = (half @ torch.from_numpy(query).half()).float().numpy()
        candidates = scores if rows is None else scores[rows]
        bound = candidates[top_k_rows(candidates, k)[-1]] - HALF_MARGIN if len(candidates) else 0.0
        near = np.flatnonzero(scores >= bound)
        scores[near] = embeddings[near].astype(np.float32) @ query
        return scores


def top_k_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` largest, largest first and equal ones in their order.

    Args:
        scores: `[n]`.
        k: all, where there are fewer.
    """
    if k < len(scores):
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        surely, equal = np.flatnonzero(scores > bound), np.flatnonzero(scores == bound)
        best = np.concatenate([surely, equal[: k - len(surely)]])
    else:
        best = np.arange(len(scores))
    return best[np.lexsort((best, -scores[best]))]
