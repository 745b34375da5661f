"""Queries of text, an image or both, answered from an index. Only the towers that a query needs are loaded."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ModelError, UsageError
from .exact import Match
from .filters import EntryFilter
from .index import ImageIndex, folder_of_model, rebuild_command

NEGATIVE_WEIGHT = 0.5  # weight of each text to avoid; what is wanted has weight 1
FEW_TEXTS = 8  # texts that one thread embeds: on shared cores, a second one makes others wait longer than it helps


@dataclass(frozen=True)
class Query:
    """What to search for.

    Args:
        words: text to search for, or None.
        image: image to search for, in any form that [`open_image`][modeling_miniclip.inference.encode.open_image]
            takes, or None.
        image_weight: weight of the image when combined with words, 0 to 1; the words get 1 - image_weight.
        without: texts to avoid.
    """

    words: str | None = None
    image: Any = None
    image_weight: float = 0.5
    without: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (self.words or "").strip() and self.image is None:
            raise UsageError('nothing to search for: give words ("two dogs in the snow"), --image FILE or both')
        if not 0 <= self.image_weight <= 1:
            raise UsageError(
                f"--image_weight {self.image_weight}: expected a number between 0 (words only) and 1 (image only)"
            )
        if any(not text.strip() for text in self.without):
            raise UsageError("--not is empty: give the text to avoid")

    @property
    def texts(self) -> list[str]:
        """All texts to embed: the words, if there are any, and the texts to avoid."""
        words = (self.words or "").strip()
        return [*([words] if words else []), *self.without]

    def __str__(self) -> str:
        parts = [self.words or "", f"like {os.path.basename(self.image)}" if self.image is not None else ""]
        return ", ".join([part for part in parts if part] + [f"not {text}" for text in self.without])


@dataclass
class Timing:
    """Duration of a search in seconds.

    Args:
        imports: importing libraries.
        load: loading the towers.
        search: everything else.
    """

    imports: float = 0.0
    load: float = 0.0
    search: float = 0.0


def combine(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Combine several embeddings into one query.

    Args:
        parts: weights, negative for what to avoid, with `[dim]` unit-norm embeddings.

    Returns:
        `[dim]`, unit norm.

    Raises:
        UsageError: the embeddings cancel out.
    """
    total = np.sum([weight * embedding for weight, embedding in parts], axis=0)
    norm = float(np.linalg.norm(total))
    if norm < 1e-6:
        raise UsageError("the query and the texts to avoid (--not) cancel out: use other words")
    combined: np.ndarray = (total / norm).astype(np.float32)
    return combined


Load = Callable[[ImageIndex, Literal["image", "text"]], tuple[Any, Any]]


def load_checked(index: ImageIndex, side: Literal["image", "text"]) -> tuple[Any, Any]:
    """Load one tower of the model that built an index, and its processor.

    Args:
        index: index that the model built.
        side: tower to load.

    Raises:
        ModelError: the model is missing, or has changed since the index was built.
    """
    from ..configuration_miniclip import MiniClipConfig
    from ..inference.loading import load_tower
    from .fingerprints import describe_files, fingerprint

    folder = folder_of_model(index)
    if describe_files(folder) != index.manifest.files and fingerprint(folder) != index.manifest.fingerprint:
        width = MiniClipConfig.from_pretrained(folder).projection_dim
        rebuild = rebuild_command(index, index.model, width)
        raise ModelError(f"{index.model} has changed since {index.folder} was built; rebuild the index: {rebuild}")
    return load_tower(folder, side)


def embed_queries(
    index: ImageIndex, queries: Sequence[Query], timing: Timing | None = None, load: Load = load_checked
) -> np.ndarray:
    """Embed queries with the model of an index.

    Args:
        index: index to search.
        queries: texts, images or both.
        timing: object to which the seconds of imports and loading are added.
        load: function that loads a tower; by default [`load_checked`], which reads the model's files each time.

    Returns:
        `[queries, dim]`, unit norm, with the dimensions of the index.

    Raises:
        ModelError: the model is missing, or has changed since the index was built.
        DataError: an image cannot be read.
    """
    timing = timing or Timing()
    start = time.perf_counter()
    from ..inference.encode import encode_images, encode_texts, open_image
    from ..utils.performance import one_thread

    timing.imports += time.perf_counter() - start
    start = time.perf_counter()
    texts = [text for query in queries for text in query.texts]
    images = [open_image(query.image) for query in queries if query.image is not None]
    text_tower = load(index, "text") if texts else None
    image_tower = load(index, "image") if images else None
    timing.load += time.perf_counter() - start
    with one_thread() if len(texts) <= FEW_TEXTS else nullcontext():
        text_embeddings = _embedded(encode_texts, text_tower, texts, index.manifest.dim)
    image_embeddings = _embedded(encode_images, image_tower, images, index.manifest.dim)
    return np.stack([_combined(query, text_embeddings, image_embeddings) for query in queries])


def _embedded(encode: Callable[..., Any], tower: tuple[Any, Any] | None, items: list[Any], dim: int) -> Iterator[Any]:
    """`[dim]` embeddings of texts or images by a tower and its processor; none without a tower."""
    if tower is None:
        return iter(())
    return iter(encode(tower[0], items, tower[1], progress=False, truncate_dim=dim).numpy())


def _combined(
    query: Query, text_embeddings: Iterator[np.ndarray], image_embeddings: Iterator[np.ndarray]
) -> np.ndarray:
    """Combine the query's embeddings, which are the next ones of all texts and of all images."""
    has_words, has_image = len(query.texts) > len(query.without), query.image is not None
    parts: list[tuple[float, np.ndarray]] = []
    if has_words:
        parts.append((1 - query.image_weight if has_image else 1.0, next(text_embeddings)))
    parts += [(-NEGATIVE_WEIGHT, next(text_embeddings)) for _ in query.without]
    if has_image:
        parts.append((query.image_weight if has_words else 1.0, next(image_embeddings)))
    return combine(parts)


def default_cutoff(index: ImageIndex, query: Query) -> float | None:
    """1, which leaves no match out, for a text in an index that knows what unrelated captions score; else None."""
    return 1.0 if query.image is None and index.unrelated is not None else None


def search_index(
    folder: str | os.PathLike,
    query: Query,
    k: int = 10,
    filter: EntryFilter | None = None,
    timing: Timing | None = None,
    exact: bool = False,
    verify: bool | None = None,
    truncate_dim: int | None = None,
    cutoff: float | str | None = None,
) -> tuple[ImageIndex, list[Match]]:
    """Open an index and answer a query.

    Args:
        folder: folder of the index.
        query: text, image or both.
        k: number of images to find.
        filter: conditions on the images.
        timing: object to which the seconds of each part are added.
        exact: whether to search exactly even if there is an approximate index.
        verify: whether to compare checksums, as in [`ImageIndex.open`].
        truncate_dim: number of dimensions to search by, as in [`ImageIndex.truncate`]; by default all.
        cutoff: largest chance of a match, as in [`ImageIndex.search`]; only for texts. By default, none is left out.

    Returns:
        The index and at most `k` matches, best first. Those of a text have a chance, if the index knows it.

    Raises:
        DataError: there is no index, or it cannot be read.
        ModelError: the model is missing, or has changed since the index was built.
        UsageError: no image passes the filter, the parts of the query cancel out, the index has fewer than
            `truncate_dim` dimensions, or `cutoff` is not one, or is given for an image.
    """
    if cutoff is not None and query.image is not None:
        raise UsageError("--cutoff compares texts with unrelated captions: leave out --cutoff or --image")
    timing = timing or Timing()
    start, before = time.perf_counter(), timing.imports + timing.load
    index = ImageIndex.open(folder, verify)
    if truncate_dim is not None:
        index = index.truncate(truncate_dim)
    rows = filter.rows(index.entries) if filter else None
    if rows is not None and not len(rows):
        raise UsageError(f"no image of {folder} passes the filter {filter}; choose a less strict one")
    embedding = embed_queries(index, [query], timing)[0]
    matches = index.search(embedding, k, rows, exact, default_cutoff(index, query) if cutoff is None else cutoff)
    timing.search = time.perf_counter() - start - (timing.imports + timing.load - before)
    return index, matches
