"""A query in words, by a picture or both, answered from an index by the one or two towers that it needs."""

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ModelError, UsageError
from .exact import Match
from .filters import EntryFilter
from .index import ImageIndex

NEGATIVE_WEIGHT = 0.5  # of what is not wanted, against the 1 of what is


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Args:
        words: text, or None.
        image: a picture, as [`open_image`][modeling_miniclip.inference.encode.open_image] takes it, or None.
        image_weight: weight of the image when combined with words, 0 to 1; the words get 1 - image_weight.
        without: texts that the images shall not fit.
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
                f"--image_weight {self.image_weight}: expected a number between 0 (words alone) and 1 (picture alone)"
            )
        if any(not text.strip() for text in self.without):
            raise UsageError("--not needs words")

    @property
    def texts(self) -> list[str]:
        """Everything that is to be embedded as text: the words, if there are some, and what is not wanted."""
        words = (self.words or "").strip()
        return [*([words] if words else []), *self.without]

    def __str__(self) -> str:
        parts = [self.words or "", f"like {os.path.basename(self.image)}" if self.image is not None else ""]
        return ", ".join([part for part in parts if part] + [f"not {text}" for text in self.without])


@dataclass
class Timing:
    """Seconds of the parts of a search: imports, loading the towers, and the rest, which is the search's own."""

    imports: float = 0.0
    load: float = 0.0
    search: float = 0.0


def combine(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """One query of several weighted unit-norm embeddings; what is not wanted has a negative weight.

    Args:
        parts: weight and `[dim]` embedding.

    Returns:
        `[dim]`, unit norm.

    Raises:
        UsageError: they cancel out.
    """
    total = np.sum([weight * embedding for weight, embedding in parts], axis=0)
    norm = float(np.linalg.norm(total))
    if norm < 1e-6:
        raise UsageError("what is wanted and what is not (--not) cancel out: say something else")
    combined: np.ndarray = (total / norm).astype(np.float32)
    return combined


Load = Callable[[ImageIndex, Literal["image", "text"]], tuple[Any, Any]]


def load_checked(index: ImageIndex, side: Literal["image", "text"]) -> tuple[Any, Any]:
    """One tower of the model that made an index, and its processor.

    Args:
        index: whose model it is.
        side: which of the two.

    Raises:
        ModelError: the model is not there any more, or has changed since.
    """
    from ..inference.loading import load_tower, model_folder
    from .fingerprints import describe_files, fingerprint

    folder = model_folder(index.model)
    if describe_files(folder) != index.manifest.files and fingerprint(folder) != index.manifest.fingerprint:
        words = ["miniclip", "index", index.model, *index.manifest.sources, "-o", str(index.folder), "--overwrite"]
        raise ModelError(
            f"{index.model} has changed since {index.folder} was built; rebuild the index: {shlex.join(words)}"
        )
    return load_tower(folder, side)


def embed_queries(
    index: ImageIndex, queries: Sequence[Query], timing: Timing | None = None, load: Load = load_checked
) -> np.ndarray:
    """`[queries, dim]` by the index's model, of which only the towers are loaded that the queries need.

    Args:
        index: whose model it is.
        queries: words, picture or both.
        timing: filled with the seconds of imports and loading.
        load: gives a tower; by default it is read anew from the files of the model.

    Raises:
        ModelError: the model is not there any more, or has changed since.
        DataError: a picture cannot be read.
    """
    timing = timing or Timing()
    start = time.perf_counter()
    from ..inference.encode import encode_images, encode_texts, open_image

    timing.imports += time.perf_counter() - start
    start = time.perf_counter()
    texts = [text for query in queries for text in query.texts]
    images = [open_image(query.image) for query in queries if query.image is not None]
    text_tower = load(index, "text") if texts else None
    image_tower = load(index, "image") if images else None
    timing.load += time.perf_counter() - start
    text_embeddings = iter(
        encode_texts(text_tower[0], texts, text_tower[1], progress=False).numpy() if text_tower else ()
    )
    image_embeddings = iter(
        encode_images(image_tower[0], images, image_tower[1], progress=False).numpy() if image_tower else ()
    )
    return np.stack([_combined(query, text_embeddings, image_embeddings) for query in queries])


def _combined(
    query: Query, text_embeddings: Iterator[np.ndarray], image_embeddings: Iterator[np.ndarray]
) -> np.ndarray:
    """One embedding of a query's weighted parts, taken from those of all texts and all images."""
    words, image = bool(query.texts[: len(query.texts) - len(query.without)]), query.image is not None
    parts: list[tuple[float, np.ndarray]] = []
    if words:
        parts.append((1 - query.image_weight if image else 1.0, next(text_embeddings)))
    parts += [(-NEGATIVE_WEIGHT, next(text_embeddings)) for _ in query.without]
    if image:
        parts.append((query.image_weight if words else 1.0, next(image_embeddings)))
    return combine(parts)


def search_index(
    folder: str | os.PathLike,
    query: Query,
    k: int = 10,
    filter: EntryFilter | None = None,
    timing: Timing | None = None,
    exact: bool = False,
    verify: bool | None = None,
) -> tuple[ImageIndex, list[Match]]:
    """Open an index and answer a query.

    Args:
        folder: of the index.
        query: words, picture or both.
        k: how many images.
        filter: which images may be found.
        timing: filled with what took how long.
        exact: leave an approximate index aside.
        verify: as for [`ImageIndex.open`].

    Returns:
        The index and at most `k` matches, best first.

    Raises:
        DataError: there is no index, or none that can be read.
        UsageError: a query that says nothing, or nothing that passes the filter.
    """
    timing = timing or Timing()
    start, before = time.perf_counter(), timing.imports + timing.load
    index = ImageIndex.open(folder, verify)
    rows = filter.rows(index.entries) if filter else None
    if rows is not None and not len(rows):
        raise UsageError(f"no image of {folder} passes the filter {filter}; choose a wider one")
    embedding = embed_queries(index, [query], timing)[0]
    matches = index.search(embedding, k, rows, exact)
    timing.search = time.perf_counter() - start - (timing.imports + timing.load - before)
    return index, matches


# --- what is printed ------------------------------------------------------------------------------------------------
