"""Search gives what sorting all inner products gives, for both types of numbers, with and without a choice of rows."""

import numpy as np
import pytest

from modeling_miniclip.nearest import Neighbours, largest


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_sorting(scores: np.ndarray, rows: np.ndarray, k: int) -> list[int]:
    """The independent answer: a plain sort by falling score, then by row."""
    return sorted(rows.tolist(), key=lambda row: (-scores[row], row))[:k]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_the_largest_are_in_order_and_of_equal_ones_the_first(k: int) -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.9, 0.5], dtype=np.float32)
    assert largest(scores, k).tolist() == [1, 4, 0, 2, 5, 3][:k]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [None, 0.0, 0.02, 0.9])
def test_search_is_a_sort_of_all_products(dtype: str, share: float | None) -> None:
    rng = np.random.default_rng(0)
    centre = unit(rng.standard_normal(64))
    embeddings = unit(centre + 0.4 * rng.standard_normal((3000, 64))).astype(dtype)  # close to one another
    query = unit(centre + 0.1 * rng.standard_normal(64)).astype(np.float32)
    rows = None if share is None else np.flatnonzero(rng.random(3000) < share)
    scores, found = Neighbours(embeddings).search(query, 25, rows)
    exact = embeddings.astype(np.float32) @ query
    wanted = by_sorting(exact, np.arange(3000) if rows is None else rows, 25)
    np.testing.assert_allclose(scores, exact[wanted], atol=2e-7)
    assert [int(row) for row in found] == wanted and len(found) == (0 if share == 0.0 else 25)


def test_more_than_there_are_is_all_there_are() -> None:
    scores, found = Neighbours(np.eye(3, dtype=np.float32)).search(np.array([0, 1, 0], np.float32), 10)
    assert found.tolist() == [1, 0, 2] and scores.tolist() == [1, 0, 0]
