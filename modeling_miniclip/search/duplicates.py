"""Find identical images of an index, byte for byte, and near-identical ones, by the cosine of their embeddings."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .index import ImageIndex

BLOCK = 2_048  # rows and columns of similarities that are computed at a time


@dataclass(frozen=True)
class Group:
    """Images that are identical, or linked by near-identical pairs.

    Args:
        rows: rows of the images in the index, ascending.
        exact: whether all images have the same bytes.
        similarity: smallest cosine among the pairs that link the images.
    """

    rows: list[int]
    exact: bool
    similarity: float


class _Links:
    """Sets of linked rows (union-find; the smallest row represents its set)."""

    def __init__(self, count: int):
        self.parent = list(range(count))
        self.weakest: dict[int, float] = {}

    def find(self, row: int) -> int:
        while self.parent[row] != row:
            self.parent[row] = self.parent[self.parent[row]]
            row = self.parent[row]
        return row

    def join(self, one: int, other: int, similarity: float) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        if low != high:
            self.parent[high] = low
            self.weakest[low] = min(similarity, self.weakest.get(low, 1.0), self.weakest.pop(high, 1.0))


def find_duplicates(index: ImageIndex, threshold: float = 0.95, across_splits: bool = False) -> list[Group]:
    """Find groups of identical and near-identical images.

    Every pair of images is compared, in blocks: time grows with the square of the number of images, memory does not.

    Args:
        index: index to search.
        threshold: smallest cosine of two near-identical images, in (0, 1].
        across_splits: whether to return only groups that span several splits, such as train and validation.

    Returns:
        The groups, exact ones first, then by falling similarity.

    Raises:
        UsageError: the threshold is outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a cosine above 0 and at most 1")
    links = _Links(len(index))
    hashes = index.entries["hash"].to_pylist()
    first: dict[str, int] = {}
    for row, content in enumerate(hashes):
        if first.setdefault(content, row) != row:
            links.join(first[content], row, 1.0)
    for one, other, cosine in _near(index.embeddings, np.array(list(first.values()), dtype=np.int64), threshold):
        links.join(one, other, cosine)
    members: dict[int, list[int]] = defaultdict(list)
    for row in range(len(index)):
        members[links.find(row)].append(row)
    splits = index.entries["split"].to_pylist()
    groups = [
        Group(rows, len({hashes[row] for row in rows}) == 1, links.weakest[first])
        for first, rows in members.items()
        if len(rows) > 1 and (not across_splits or len({splits[row] for row in rows} - {""}) > 1)
    ]
    return sorted(groups, key=lambda group: (not group.exact, -group.similarity, group.rows))


def _near(embeddings: np.ndarray, rows: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
    """Pairs of these rows, smaller row first, with their cosine if it is at least `threshold`."""
    # For rounding, so that a threshold of 1 finds equal embeddings.
    tolerance = 1e-6 if embeddings.dtype == np.float32 else 1e-3
    for top in range(0, len(rows), BLOCK):
        block = embeddings[rows[top : top + BLOCK]].astype(np.float32)
        for left in range(top, len(rows), BLOCK):
            cosines = block @ embeddings[rows[left : left + BLOCK]].astype(np.float32).T
            ones, others = np.nonzero(cosines >= threshold - tolerance)
            for i, j in zip(ones, others, strict=True):
                if i + top < j + left:
                    yield int(rows[i + top]), int(rows[j + left]), min(float(cosines[i, j]), 1.0)
