"""Which rows of a table show the same image: those with the same name, if their images are the same byte for byte."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm


class Identity(NamedTuple):
    """What tells the image of a row from others.

    Args:
        digest: hash of its content.
        qualifier: what to add to its name, because other images have the same name: "" for nothing, `split`, or the
            split and the number of a row.
    """

    digest: str
    split: bool = False
    row: int | None = None


class SameImages:
    """Finds the rows with the same image; opens only images of rows whose name occurs more than once.

    Args:
        hashes: hash of each row's name, int64 `[rows]`, or of anything else that is the same for equal images.
        has_image: whether a row has an image, bool `[rows]`.
        splits: number of each row's split, `[rows]`.
        content: function that returns the image of a row; None if it cannot be read.
        title: title of the progress bar, which is shown if this takes more than two seconds.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        has_image: np.ndarray,
        splits: np.ndarray,
        content: Callable[[int], bytes | None],
        title: str = "comparing images",
    ):
        order = np.argsort(hashes, kind="stable")
        order = order[has_image[order]]
        same = hashes[order[1:]] == hashes[order[:-1]]
        repeated = np.zeros(len(hashes), bool)
        repeated[order[1:][same]] = repeated[order[:-1][same]] = True
        rows = np.flatnonzero(repeated)
        bar = tqdm(rows.tolist(), desc=title, unit="image", delay=2, leave=False)
        digests = np.fromiter((_digest(content(row)) for row in bar), np.int64, len(rows))
        self.rows, self.digests = rows[digests != 0], digests[digests != 0]
        self._qualify(hashes[self.rows], splits[self.rows])

    def _qualify(self, hashes: np.ndarray, splits: np.ndarray) -> None:
        """Find the names that stand for several images; there are few, as a rule."""
        pairs = np.unique(np.stack([hashes, self.digests]), axis=1)[0]
        names, counts = np.unique(pairs, return_counts=True)
        self.qualified: dict[int, Identity] = {}
        ambiguous = np.flatnonzero(np.isin(hashes, names[counts > 1]))
        digests_of: dict[tuple[int, int], set[int]] = {}  # of each name in each split
        first: dict[tuple[int, int, int], int] = {}
        keys = [(int(hashes[i]), int(splits[i]), int(self.digests[i])) for i in ambiguous]
        for i, (name, split, digest) in zip(ambiguous, keys, strict=True):
            digests_of.setdefault((name, split), set()).add(digest)
            first.setdefault((name, split, digest), int(self.rows[i]))
        for i, (name, split, digest) in zip(ambiguous, keys, strict=True):
            row = first[name, split, digest] if len(digests_of[name, split]) > 1 else None
            self.qualified[int(self.rows[i])] = Identity(_text(digest), True, row)

    def of_rows(self, start: int, stop: int) -> dict[int, Identity]:
        """The identities of the rows from `start` to `stop` whose names occur more than once."""
        first, last = self.rows.searchsorted([start, stop])
        pairs = zip(self.rows[first:last].tolist(), self.digests[first:last].tolist(), strict=True)
        return {row: self.qualified.get(row) or Identity(_text(digest)) for row, digest in pairs}


def _digest(content: bytes | None) -> int:
    """64 bits of a hash of an image, never 0; 0 for no image."""
    if not content:
        return 0
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True) or 1


def _text(digest: int) -> str:
    return f"{digest & 0xFFFFFFFFFFFFFFFF:016x}"
