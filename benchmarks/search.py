"""Exact and approximate search of 10 thousand to 10 million vectors that resemble those of a real index.

    miniclip index EXPORT FLICKR8K -o flickr8k.index
    python benchmarks/search.py flickr8k.index --rows 10000 100000 1000000

Each vector mixes two neighbouring images of the index and adds noise. The noise is chosen so that an equal number of
mixtures has the same mean cosine to the 10th neighbour as the images themselves. Queries are captions of the index
(which are hard for an approximate index, because texts are embedded away from images) and more mixtures. On a busy
machine, `--clock cpu` measures CPU time.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeling_miniclip.search.approximate import FILE, ApproximateNeighbours, build_neighbours
from modeling_miniclip.search.embeddings_file import (
    DTYPES,
    CodedEmbeddings,
    Embeddings,
    map_embeddings,
    write_embeddings,
)
from modeling_miniclip.search.exact import Neighbours
from modeling_miniclip.search.index import ImageIndex
from modeling_miniclip.search.query import Query, embed_queries

K = 10
BLOCK = 100_000  # rows generated at a time
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    lengths: np.ndarray = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / lengths


def tenth_neighbour(rows: np.ndarray, sample: int = 1_000) -> float:
    """Mean cosine of rows to their 10th neighbour."""
    cosines = rows[:sample] @ rows.T
    return float(np.partition(cosines, -K - 1, axis=1)[:, -K - 1].mean())


class Mixtures:
    """Any number of vectors that resemble real ones.

    Args:
        real: `[n, dim]` real embeddings, unit norm.
    """

    def __init__(self, real: np.ndarray):
        self.real = real
        blocks = (real[i : i + 1000] @ real.T for i in range(0, len(real), 1000))
        self.near = np.concatenate([np.argpartition(-block, 20, axis=1)[:, :20] for block in blocks])
        self.goal, low, high = tenth_neighbour(real), 0.0, 4.0
        for _ in range(12):
            self.noise = (low + high) / 2
            self.reached = tenth_neighbour(self.draw(len(real), np.random.default_rng(1)))
            low, high = (self.noise, high) if self.reached > self.goal else (low, self.noise)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`[count, dim]` mixtures."""
        dim = self.real.shape[1]
        one = rng.integers(0, len(self.real), count)
        other = self.near[one, rng.integers(0, self.near.shape[1], count)]
        weight = rng.random((count, 1), dtype=np.float32)
        noise = rng.standard_normal((count, dim), dtype=np.float32) * np.float32(self.noise / dim**0.5)
        return unit(weight * self.real[one] + (1 - weight) * self.real[other] + noise)

    def blocks(self, count: int, seed: int) -> Iterator[np.ndarray]:
        """`count` mixtures, block by block."""
        rng = np.random.default_rng(seed)
        for start in range(0, count, BLOCK):
            yield self.draw(min(BLOCK, count - start), rng)


def timed(search: Callable[[np.ndarray], Any], queries: np.ndarray, clock: Callable[[], float]) -> tuple[list, str]:
    """Answers to all queries, and the median and 99th percentile of their times in milliseconds."""
    search(queries[0])
    answers, seconds = [], []
    for query in queries:
        start = clock()
        answers.append(search(query))
        seconds.append(clock() - start)
    median, slow = 1000 * np.quantile(seconds, [0.5, 0.99])
    return answers, f"{median:.2f} | {slow:.2f}"


def recall(answers: list, truth: np.ndarray) -> float:
    """Fraction of the true nearest neighbours that were found."""
    return float(np.mean([len(set(map(int, a)) & set(t)) / K for a, t in zip(answers, truth.tolist(), strict=True)]))


def exact_truth(vectors: Embeddings, queries: np.ndarray) -> np.ndarray:
    """`[queries, K]` true nearest rows, from matrix products in blocks."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    rows = np.zeros((len(queries), K), np.int64)
    for start in range(0, len(vectors), BLOCK):
        scores = queries @ vectors[start : start + BLOCK].astype(np.float32).T
        some = np.argpartition(-scores, K - 1, axis=1)[:, :K]
        scores = np.concatenate([best, np.take_along_axis(scores, some, 1)], axis=1)
        candidates = np.concatenate([rows, some + start], axis=1)
        order = np.argsort(-scores, axis=1)[:, :K]
        best, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
    return rows


def streaming_read(vectors: Embeddings, clock: Callable[[], float], repeats: int = 9) -> float:
    """Milliseconds of the fastest of several multi-threaded reads of all vectors (torch sums them)."""
    import torch

    numbers = vectors.codes if isinstance(vectors, CodedEmbeddings) else vectors
    flat = torch.from_numpy(np.asarray(numbers).reshape(-1).view(np.float32))  # smaller numbers are read together
    seconds = []
    for _ in range(repeats):
        start = clock()
        flat.sum()
        seconds.append(clock() - start)
    return 1000 * min(seconds)


def measure(mixtures: Mixtures, texts: np.ndarray, rows: int, args: argparse.Namespace, folder: Path) -> None:
    """Print the rows of the table for one number of vectors."""
    clock = CLOCKS[args.clock]
    dim = mixtures.real.shape[1]
    write_embeddings(folder / "vectors", rows, dim, args.dtype, mixtures.blocks(rows, seed=2))
    vectors = map_embeddings(folder / "vectors")
    kinds = {"captions": texts, "images": mixtures.draw(len(texts), np.random.default_rng(3))}
    few = {name: queries[: args.exact_queries] for name, queries in kinds.items()}
    truth = {name: exact_truth(vectors, queries) for name, queries in kinds.items()}

    def report(what: str, build: str, search: Callable[[np.ndarray], Any], queries: dict[str, np.ndarray]) -> None:
        for name, some in queries.items():
            answers, times = timed(search, some, clock)
            print(f"| {rows:,} | {what} | {build} | {name} | {times} | "
                  f"{recall(answers, truth[name][: len(some)]):.3f} |", flush=True)  # fmt: skip

    exact = Neighbours(vectors)
    print(f"| {rows:,} | a streaming read of the vectors | | | {streaming_read(vectors, clock):.2f} (fastest) | | |")
    one = {"captions": few["captions"]}
    report("exact, this package", "", lambda query: exact.search(query, K)[1], one)
    if args.dtype == "float32":
        plain = np.asarray(vectors)
        report("plain NumPy: product and argsort", "", lambda query: np.argsort(-(plain @ query))[:K], one)
    start = clock()
    build_neighbours(vectors, folder / FILE)
    build = f"{clock() - start:.0f} s, {(folder / FILE).stat().st_size / 1e6:.0f} MB"
    approximate = ApproximateNeighbours(vectors, folder / FILE)
    probes = approximate.parameters.nprobe
    name = f"approximate, this package ({approximate.index.nlist} cells, {probes} probed)"
    report(name, build, lambda query: approximate.search(query, K)[1], kinds)
    direct, parameters = approximate.index, approximate.parameters
    report("FAISS called directly, no refinement", "same file",
           lambda query: direct.search(query[None], K, params=parameters)[1][0], kinds)  # fmt: skip
    for library in args.compare:
        COMPARED[library](vectors, report, clock, kinds)


def compare_usearch(vectors: Embeddings, report: Callable[..., None], clock: Callable[[], float], kinds: Any) -> None:
    """USearch's graph with half-precision numbers."""
    from usearch.index import Index

    start = clock()
    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=16, expansion_add=80)
    index.add(np.arange(len(vectors)), np.asarray(vectors), threads=0)
    build = f"{clock() - start:.0f} s, {index.memory_usage / 1e6:.0f} MB"
    for effort in (32, 64, 128):
        index.expansion_search = effort
        report(f"USearch HNSW f16, effort {effort}", build, lambda query: index.search(query, K).keys, kinds)


def compare_hnsw(vectors: Embeddings, report: Callable[..., None], clock: Callable[[], float], kinds: Any) -> None:
    """FAISS's graph."""
    import faiss

    start = clock()
    index: Any = faiss.index_factory(vectors.shape[1], "HNSW16", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.add(np.asarray(vectors, dtype=np.float32))
    build = f"{clock() - start:.0f} s, {len(vectors) * (4 * vectors.shape[1] + 4 * 32) / 1e6:.0f} MB"
    for effort in (32, 64, 128):
        index.hnsw.efSearch = effort
        report(f"FAISS HNSW16, effort {effort}", build, lambda query: index.search(query[None], K)[1][0], kinds)


COMPARED = {"usearch": compare_usearch, "hnsw": compare_hnsw}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="real index with captions")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--queries", type=int, default=250, help="of each kind")
    parser.add_argument("--exact_queries", type=int, default=30, help="of exact search")
    parser.add_argument(
        "--compare", nargs="*", choices=list(COMPARED), default=[], help="other indexes, slow to build"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    index = ImageIndex.open(args.index)
    captions = [several[0] for several in index.entries["captions"].to_pylist() if several]
    captions = [captions[i] for i in np.linspace(0, len(captions) - 1, args.queries).astype(int)]
    texts = embed_queries(index, [Query(text) for text in captions])
    mixtures = Mixtures(np.asarray(index.embeddings, dtype=np.float32))
    print(f"{len(index)} real images; mean cosine to the 10th neighbour: images {mixtures.goal:.3f}, as many "
          f"mixtures {mixtures.reached:.3f}; {args.clock} time, {args.dtype}\n")  # fmt: skip
    print("| vectors | search | build | queries | p50, ms | p99, ms | recall@10 |\n|---|---|---|---|---|---|---|")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            measure(mixtures, texts, rows, args, Path(folder))
    print(f"\npeak memory of the whole script: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
