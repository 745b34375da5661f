"""Find identical images of an index, byte for byte, and near-identical ones, by the cosine of their embeddings."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .embeddings_file import Embeddings
from .index import ImageIndex

BLOCK = 2_048  # rows and columns of similarities that are computed at a time

# For the default threshold: pairs per image between which the growth of their number is measured, the number of wrong
# pairs per image to allow, the number of images to sample, and the threshold of an index too small to measure.
FEW_PAIRS, MANY_PAIRS, WRONG_PAIRS = 1, 10, 1e-3
SAMPLE = 2_000
FALLBACK_THRESHOLD = 0.95


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


def default_threshold(index: ImageIndex) -> float:
    """Cosine that about one pair of distinct images per 1,000 images of the index exceeds.

    Models differ: for some, distinct photographs rarely exceed 0.82, for others 0.998. Among distinct images, the
    number of pairs closer than d grows like a power of d, whose exponent is the dimension that the embeddings fill
    (the correlation dimension of Grassberger and Procaccia, 1983). The growth is measured where there are 1 to 10
    pairs per image, few of which are copies, and extrapolated to one pair per 1,000 images.

    Args:
        index: index whose images are mostly distinct. Below 22 images there is nothing to measure: 0.95.
    """
    rows = np.array(list(_first_rows(index.entries["hash"].to_pylist()).values()), dtype=np.int64)
    return threshold_of(index.embeddings, rows)


def threshold_of(embeddings: Embeddings, rows: np.ndarray) -> float:
    """[`default_threshold`] of `[images, dim]` embeddings and the rows of images that are not identical."""
    most = MANY_PAIRS * 2  # a pair counts for both of its images
    if len(rows) < most + 2:
        return FALLBACK_THRESHOLD
    sample = rows[:: -(-len(rows) // SAMPLE)]
    cosines = _highest_cosines(embeddings, sample, rows, most * len(sample))
    # A distance of zero, between copies or by a model that sees no difference, has no logarithm.
    distances = (max(1 - float(cosines[2 * pairs * len(sample) - 1]), 1e-7) for pairs in (FEW_PAIRS, MANY_PAIRS))
    few, many = map(np.log, distances)
    log_distance_per_log_pairs = (many - few) / np.log(MANY_PAIRS / FEW_PAIRS)
    return float(1 - np.exp(few - log_distance_per_log_pairs * np.log(FEW_PAIRS / WRONG_PAIRS)))


def find_duplicates(index: ImageIndex, threshold: float | None = None, across_splits: bool = False) -> list[Group]:
    """Find groups of identical and near-identical images.

    Every pair of images is compared, in blocks: time grows with the square of the number of images, memory does not.

    Args:
        index: index to search.
        threshold: smallest cosine of two near-identical images, in (0, 1]; by default [`default_threshold`].
        across_splits: whether to return only groups that span several splits, such as train and validation.

    Returns:
        The groups, exact ones first, then by falling similarity.

    Raises:
        UsageError: the threshold is outside (0, 1].
    """
    if threshold is None:
        threshold = default_threshold(index)
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a cosine above 0 and at most 1")
    links = _Links(len(index))
    hashes = index.entries["hash"].to_pylist()
    first = _first_rows(hashes)
    for row, content in enumerate(hashes):
        if first[content] != row:
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


def _first_rows(hashes: list[str]) -> dict[str, int]:
    """The first row of each content, ascending."""
    first: dict[str, int] = {}
    for row, content in enumerate(hashes):
        first.setdefault(content, row)
    return first


def _highest_cosines(embeddings: Embeddings, sample: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """The highest `count` cosines between images of the sample and other images, falling."""
    highest = np.empty(0, dtype=np.float32)
    for top in range(0, len(sample), BLOCK):
        ones = sample[top : top + BLOCK]
        block = embeddings[ones].astype(np.float32)
        for left in range(0, len(rows), BLOCK):
            others = rows[left : left + BLOCK]
            cosines = block @ embeddings[others].astype(np.float32).T
            highest = np.concatenate([highest, cosines[ones[:, None] != others]])
            if len(highest) > count:
                highest = np.partition(highest, -count)[-count:]
    return np.sort(highest)[::-1]


def _near(embeddings: Embeddings, rows: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
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
