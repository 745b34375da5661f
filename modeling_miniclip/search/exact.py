"""Exact nearest neighbours of a query, by a matrix product over all embeddings."""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from .embeddings_file import CodedEmbeddings, Embeddings

HALF_MARGIN = 4e-3  # above the error of a cosine in half precision; closer candidates are computed again
PROCESS = os.getpid()  # the process that imported this module; one forked from it has another id
LEAST_SELECTED = 0.3  # fraction of the rows above which computing all is faster than gathering the selected ones


@dataclass(frozen=True)
class Match:
    """An image found for a query.

    Args:
        name: name of the image.
        score: cosine similarity with the query.
        index: row of the image in the embeddings.
        chance: how often an unrelated caption finds an image that fits as well, from 0 to 1; None if it was not asked
            for.
    """

    name: str
    score: float
    index: int
    chance: float | None = None


class Neighbours:
    """Exact nearest-neighbour search.

    The query is never rounded: with int8 the scores are those of a float32 query and the stored embeddings, as if all
    of them were compared again after a search with 8 bits.

    Args:
        embeddings: `[rows, dim]` float32, float16 or int8, unit norm; may be memory-mapped.
    """

    def __init__(self, embeddings: Embeddings):
        self.embeddings = embeddings

    def search(self, query: np.ndarray, k: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` largest inner products, largest first; ties in the order of the rows.

        Args:
            query: `[dim]` float32.
            k: number of rows to find; all rows if there are fewer.
            rows: `[n]` ascending rows to search; None for all.

        Returns:
            `[k]` float32 inner products and `[k]` rows.
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
        self, embeddings: Embeddings, query: np.ndarray, k: int, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """`[n]` float32 inner products, exact wherever they may be among the `k` largest (of the given rows)."""
        if isinstance(embeddings, CodedEmbeddings):
            return embeddings.products(query)
        if embeddings.dtype == np.float32 or not len(embeddings):
            # One matrix product reads each number once, in the order of the file, on all cores.
            return embeddings @ query
        import torch  # NumPy has no half-precision product, and converting first takes ten times as long

        from ..utils.performance import one_thread

        half = torch.from_numpy(np.asarray(embeddings).view(np.int16)).view(torch.float16)
        # A forked process would wait forever for the threads that torch started in its parent.
        with one_thread() if os.getpid() != PROCESS else nullcontext():
            scores = (half @ torch.from_numpy(query).half()).float().numpy()
        candidates = scores if rows is None else scores[rows]
        bound = candidates[top_k_rows(candidates, k)[-1]] - HALF_MARGIN if len(candidates) else 0.0
        near = np.flatnonzero(scores >= bound)
        scores[near] = embeddings[near].astype(np.float32) @ query
        return scores


def top_k_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the `k` largest scores, largest first, ties in the order of the rows.

    Args:
        scores: `[n]` scores.
        k: number of rows; all rows if there are fewer.

    Returns:
        `[min(k, n)]` rows.
    """
    if k < len(scores):
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        above, equal = np.flatnonzero(scores > bound), np.flatnonzero(scores == bound)
        best = np.concatenate([above, equal[: k - len(above)]])
    else:
        best = np.arange(len(scores))
    return best[np.lexsort((best, -scores[best]))]
