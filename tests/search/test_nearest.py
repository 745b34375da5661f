"""Exact and approximate search against sorting all inner products."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_miniclip import ImageIndex, update_index
from modeling_miniclip.errors import MiniClipError, UsageError
from modeling_miniclip.search.approximate import (
    ApproximateNeighbours,
    build_neighbours,
    number_of_cells,
    uses_approximate_search,
)
from modeling_miniclip.search.exact import Neighbours, top_k_rows
from tests.helpers.indexes import write_pictures


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_sorting(scores: np.ndarray, rows: np.ndarray, k: int) -> list[int]:
    """Reference: sort by falling score, then by row."""
    return sorted(rows.tolist(), key=lambda row: (-scores[row], row))[:k]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_top_rows_are_sorted_with_ties_by_row(k: int) -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.9, 0.5], dtype=np.float32)
    assert top_k_rows(scores, k).tolist() == [1, 4, 0, 2, 5, 3][:k]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [None, 0.0, 0.02, 0.9])
def test_search_equals_sorting_all_products(dtype: str, share: float | None) -> None:
    rng = np.random.default_rng(0)
    centre = unit(rng.standard_normal(64))
    embeddings = unit(centre + 0.4 * rng.standard_normal((3000, 64))).astype(dtype)  # similar to each other
    query = unit(centre + 0.1 * rng.standard_normal(64)).astype(np.float32)
    rows = None if share is None else np.flatnonzero(rng.random(3000) < share)
    scores, found = Neighbours(embeddings).search(query, 25, rows)
    exact = embeddings.astype(np.float32) @ query
    wanted = by_sorting(exact, np.arange(3000) if rows is None else rows, 25)
    np.testing.assert_allclose(scores, exact[wanted], atol=2e-7)
    assert [int(row) for row in found] == wanted and len(found) == (0 if share == 0.0 else 25)


def test_k_above_the_row_count_returns_all() -> None:
    scores, found = Neighbours(np.eye(3, dtype=np.float32)).search(np.array([0, 1, 0], np.float32), 10)
    assert found.tolist() == [1, 0, 2] and scores.tolist() == [1, 0, 0]


# --- approximate search ---------------------------------------------------------------------------------------------

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="no FAISS: pip install faiss-cpu")


@needs_faiss
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_approximate_search_has_high_recall_and_exact_scores(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((60, 48)))
    embeddings = unit(centres[rng.integers(0, 60, 6000)] + 0.08 * rng.standard_normal((6000, 48))).astype(dtype)
    queries = unit(centres[:40] + 0.08 * rng.standard_normal((40, 48))).astype(np.float32)
    build_neighbours(embeddings, tmp_path / "neighbours")
    exact, approximate = Neighbours(embeddings), ApproximateNeighbours(embeddings, tmp_path / "neighbours")
    shares = []
    for query in queries:
        scores, found = approximate.search(query, 10)
        np.testing.assert_allclose(scores, embeddings[found].astype(np.float32) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
        shares.append(len(set(found) & set(exact.search(query, 10)[1])) / 10)
    assert np.mean(shares) > 0.9
    everything = ApproximateNeighbours(embeddings, tmp_path / "neighbours", probes=approximate.index.nlist)
    for query in queries:  # visiting every cell loses nothing, in spite of the 8 bits
        assert everything.search(query, 10)[1].tolist() == exact.search(query, 10)[1].tolist()
    rows = np.arange(0, 6000, 7)
    assert approximate.search(queries[0], 5, rows)[1].tolist() == exact.search(queries[0], 5, rows)[1].tolist()


@needs_faiss
@pytest.mark.parametrize("count", [1, 2, 30])
def test_few_vectors_are_all_found(tmp_path: Path, count: int) -> None:
    embeddings = unit(np.random.default_rng(0).standard_normal((count, 8))).astype(np.float32)
    build_neighbours(embeddings, tmp_path / "neighbours")
    found = ApproximateNeighbours(embeddings, tmp_path / "neighbours").search(embeddings[0], 50)[1]
    assert found[0] == 0 and sorted(found.tolist()) == list(range(count))


def test_kind_of_search_depends_on_size_and_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_miniclip.search import approximate

    monkeypatch.setattr(approximate, "find_spec", lambda name: object())
    assert [uses_approximate_search("auto", count) for count in (499_999, 500_000)] == [False, True]
    assert uses_approximate_search("approximate", 3) and not uses_approximate_search("exact", 10**9)
    monkeypatch.setattr(approximate, "find_spec", lambda name: None)
    assert not uses_approximate_search("auto", 10**9)
    with pytest.raises(MiniClipError, match=r"needs FAISS: pip install faiss-cpu"):
        uses_approximate_search("approximate", 10**9)
    with pytest.raises(UsageError, match="expected one of auto, exact, approximate"):
        uses_approximate_search("best", 1)
    counts = (0, 1, 1_000, 10_000, 100_000, 1_000_000)
    assert [number_of_cells(count) for count in counts] == [1, 1, 16, 128, 512, 2048]


@needs_faiss
def test_index_keeps_its_kind_of_search(tmp_path: Path, tiny_export: Path) -> None:
    write_pictures(tmp_path / "photos", "a.png b.png c.png")
    for choice, approximate in (("approximate", True), (None, True), ("exact", False), (None, False)):
        update_index(tmp_path / "index", [tmp_path / "photos"], tiny_export, neighbours=choice, progress=False)
        index = ImageIndex.open(tmp_path / "index")
        assert isinstance(index.neighbours, ApproximateNeighbours) == approximate
        assert (tmp_path / "index" / "neighbours.faiss").is_file() == approximate
        query = np.array(index.embeddings[1])
        assert index.search(query, 2) == index.search(query, 2, exact=True)


def test_queries_and_rows_may_be_arrays_lists_or_tensors(tiny_index: Path) -> None:
    index = ImageIndex.open(tiny_index)
    query = np.array(index.embeddings[2])
    expected, of_three = index.search(query, 4), index.search(query, 4, np.array([1, 2, 5]))
    assert expected[0].index == 2 and {match.index for match in of_three} == {1, 2, 5}
    for form in (query.tolist(), torch.tensor(query, requires_grad=True), torch.tensor(query)[None].double()):
        assert index.search(form, 4) == expected
    for rows in ([1, 2, 5], torch.tensor([5, 1, 2]), (2, 5, 1, 1), np.isin(np.arange(6), [1, 2, 5])):
        assert index.search(query, 4, rows) == of_three
    for rows in ([6], [-1], [0.5], [[1, 2]], [True]):
        with pytest.raises(UsageError, match="filter: expected rows from 0 to 5"):
            index.search(query, 4, rows)
