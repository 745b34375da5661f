"""How well a result fits: compared with what captions score that have nothing to do with the images.

A cosine says little by itself: some images score high with any text, some texts with any image, and models differ. So
the score of a result is compared three times, each time as a number of standard deviations above a mean: with the
scores of the unrelated captions for all images, with their scores for the same image, and with the scores of the
index's images for the same query. The *fit* of a result is the mean of the three. Its *chance* is the share of
unrelated captions that find an image in this index which fits them as well: what to expect of a query for which there
is nothing.
"""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .embeddings_file import Embeddings
from .exact import Match
from .unrelated_texts import CHECKSUM

FILE = "unrelated.safetensors"
FLOAT32 = np.dtype(np.float32)
AUTO = 0.325  # the strictest cutoff that keeps 95 % of the right first results, see benchmarks/cutoff.md
SAMPLE = 1_000  # images that stand for all of them
LEAST_IMAGES = 50  # fewer do not show what a query scores with images in general
IMAGES_AT_ONCE = 4_096
TAIL = 0.1  # share of the captions, those that fit best, from which smaller chances are extrapolated
LEAST_PERCENT = 0.001  # smallest chance that is written as a number


class UnrelatedCaptions:
    """What captions that have nothing to do with the images score in an index.

    Args:
        captions: `[captions, dim]` float32, unit norm.
        best: `[captions]` float32, ascending: the fit of the image that fits each caption best.
        embeddings: `[images, dim]` embeddings of the index.
        texts: checksum of the texts of the captions.
    """

    def __init__(self, captions: np.ndarray, best: np.ndarray, embeddings: Embeddings, texts: str = CHECKSUM):
        self.captions, self.best, self.embeddings, self.texts = captions, best, embeddings, texts

    @classmethod
    def compare(cls, captions: np.ndarray, embeddings: Embeddings) -> "UnrelatedCaptions":
        """Compare each image of an index with each caption.

        Args:
            captions: `[captions, dim]`, unit norm.
            embeddings: `[images, dim]`, unit norm; at least one.
        """
        captions = captions.astype(np.float32)
        best = np.full(len(captions), -np.inf, np.float32)
        found = cls(captions, best, embeddings)
        for start in range(0, len(embeddings), IMAGES_AT_ONCE):
            images = embeddings[start : start + IMAGES_AT_ONCE].astype(np.float32)
            np.maximum(best, found.fits(images, captions).max(axis=0), out=best)
        best.sort()
        return found

    @classmethod
    def load(cls, path: Path, embeddings: Embeddings) -> "UnrelatedCaptions":
        """Load what [`save`][modeling_miniclip.search.unrelated.UnrelatedCaptions.save] wrote.

        Args:
            path: file to read.
            embeddings: `[images, dim]` embeddings of the index.

        Raises:
            ValueError: the file does not belong to these embeddings.
        """
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            captions, best = file.get_tensor("captions"), file.get_tensor("best")
            texts = (file.metadata() or {}).get("texts", "")
        count, dim = len(captions), embeddings.shape[1]
        is_whole = (captions.shape, best.shape) == ((count, dim), (count,)) and count >= 2
        if not is_whole or {captions.dtype, best.dtype} != {FLOAT32}:
            raise ValueError(f"{path.name} has {captions.dtype} {captions.shape} and {best.dtype} {best.shape}")
        return cls(captions, best, embeddings, texts)

    def save(self, path: Path) -> None:
        """Write everything but the embeddings of the images to a safetensors file."""
        from safetensors.numpy import save

        # Written here, so that a full disk raises an OSError.
        path.write_bytes(save({"captions": self.captions, "best": self.best}, {"texts": self.texts}))

    def chances(self, images: np.ndarray, query: np.ndarray) -> np.ndarray:
        """How often an unrelated caption finds an image that fits as well, for images found for a query.

        Args:
            images: `[n, dim]` embeddings of these images.
            query: `[dim]` embedding of the query, a text.

        Returns:
            `[n]` shares of the captions, from 0 to 1.
        """
        return self.chance_of(self.fits(images.astype(np.float32), query[None])[:, 0])

    def fits(self, images: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """How well images fit texts, in standard deviations above what unrelated ones score.

        Args:
            images: `[n, dim]` float32 embeddings.
            queries: `[texts, dim]` float32 embeddings.

        Returns:
            `[n, texts]` float32.
        """
        scores = images @ queries.T
        compared = [
            _deviations(scores, *self._usual),
            _deviations(scores, *_mean_and_spread(images @ self.captions.T, axis=1)),
        ]
        if len(self.embeddings) >= LEAST_IMAGES:
            compared.append(_deviations(scores, *_mean_and_spread(self._sample @ queries.T, axis=0)))
        return np.stack(compared).mean(axis=0, dtype=np.float32)

    def chance_of(self, fits: np.ndarray) -> np.ndarray:
        """The share of unrelated captions whose best image fits as well as this.

        Counted among all captions; above what the best tenth of them reaches, where there is little to count, their
        share falls exponentially, by the mean distance of this tenth from its lower end.

        Args:
            fits: `[n]` fits.
        """
        captions = len(self.best)
        tail = max(2, round(TAIL * captions))
        end = self.best[-tail]
        counted = 1 - self.best.searchsorted(fits, "left") / captions
        distance = max(float((self.best[-tail + 1 :] - end).mean()), 1e-6)
        beyond = tail / captions * np.exp(np.minimum(end - fits, 0) / distance)
        return np.where(fits > end, beyond, counted)

    @cached_property
    def _sample(self) -> np.ndarray:
        """`[images, dim]` float32, images from all over the index."""
        rows = np.linspace(0, len(self.embeddings) - 1, min(len(self.embeddings), SAMPLE)).astype(int)
        return np.asarray(self.embeddings[rows], np.float32)

    @cached_property
    def _usual(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread of all scores of the unrelated captions with the sample: the same for all queries."""
        return _mean_and_spread(self._sample @ self.captions.T, axis=None)


def _mean_and_spread(scores: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of scores along an axis, or of all of them."""
    spread = np.maximum(scores.std(axis=axis, keepdims=True), 1e-6)  # equal scores have none
    return scores.mean(axis=axis, keepdims=True), spread


def _deviations(scores: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Scores as standard deviations above a mean."""
    deviations: np.ndarray = (scores - mean) / spread
    return deviations


def cut_matches(matches: list[Match], unrelated: UnrelatedCaptions, query: np.ndarray, cutoff: float) -> list[Match]:
    """The matches of a query of text whose chance is at most `cutoff`, with their chances.

    Args:
        matches: images found, by their rows among those of `unrelated`.
        unrelated: what unrelated captions score with these images.
        query: `[dim]` float32 embedding of the query.
        cutoff: from 0 to 1.
    """
    chances = unrelated.chances(unrelated.embeddings[[match.index for match in matches]], query).tolist()
    judged = (replace(match, chance=chance) for match, chance in zip(matches, chances, strict=True))
    return [match for match, chance in zip(judged, chances, strict=True) if chance <= cutoff]


def cutoff_of(value: Any) -> float:
    """The largest chance of a result that is kept.

    Args:
        value: a number from 0 to 1, as a text or not, or `auto`.

    Raises:
        UsageError: it is neither.
    """
    if value == "auto":
        return AUTO
    try:
        cutoff = float(value)
    except (TypeError, ValueError):
        cutoff = math.nan
    if not 0 <= cutoff <= 1:
        raise UsageError(f"cutoff {value!r}: expected auto, or a number from 0 to 1")
    return cutoff


def is_weak(chance: float | None) -> bool:
    """Whether a result fits no better than what an unrelated caption often finds."""
    return chance is not None and chance > AUTO


def percent(chance: float) -> str:
    """A chance in percent, with one or two digits.

    Examples:
        >>> percent(0.123), percent(0.0034), percent(1e-9)
        ('12 %', '0.3 %', '<0.001 %')
    """
    value = 100 * chance
    if value < LEAST_PERCENT:
        return f"<{LEAST_PERCENT} %"
    return f"{value:.{max(0, -math.floor(math.log10(value)))}f} %"
