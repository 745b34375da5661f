"""Filters of a search: folder, date, split, and words of the captions."""

import os
import re
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UsageError
from ..utils.names import SEPARATORS, name_of


@dataclass(frozen=True)
class EntryFilter:
    """Conditions on images, all of which must hold. None means no condition.

    Args:
        folder: folder, archive or dataset that contains the image, directly or further down.
        since: earliest date, included: `2024`, `2024-07`, `2024-07-14`, or with a time after `T`.
        until: latest date, included, in the same form.
        caption_contains: words that must all occur in the image's captions, as whole words, ignoring case.
        split: split of the image, such as `train`.
    """

    folder: str | None = None
    since: str | None = None
    until: str | None = None
    caption_contains: str | None = None
    split: str | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name} {value!r}" for name, value in given.items() if value is not None)

    def rows(self, entries: pa.Table) -> np.ndarray:
        """Find the entries that pass.

        Args:
            entries: [`ImageIndex.entries`].

        Returns:
            `[n]` ascending rows.

        Raises:
            UsageError: `since` or `until` is not a date.
        """
        passed = np.ones(entries.num_rows, dtype=bool)
        if self.folder is not None:
            passed &= _in_folder(entries["id"], self.folder)
        if self.since is not None:
            passed &= _numpy(pc.greater_equal(entries["date"], pa.scalar(_bounds(self.since)[0], pa.timestamp("s"))))
        if self.until is not None:
            passed &= _numpy(pc.less(entries["date"], pa.scalar(_bounds(self.until)[1], pa.timestamp("s"))))
        if self.split is not None:
            passed &= _numpy(pc.equal(entries["split"], self.split))
        for word in (self.caption_contains or "").split():
            passed &= _with_word(entries["captions"], word)
        return np.flatnonzero(passed)


def _in_folder(ids: pa.ChunkedArray, folder: str) -> np.ndarray:
    given = name_of(folder.rstrip("/\\"))
    whole = name_of(os.path.abspath(os.path.expanduser(folder)))
    found = [_numpy(pc.starts_with(ids, prefix + sep)) for prefix in {given, whole} for sep in SEPARATORS]
    return np.logical_or.reduce(found)


def _with_word(captions: pa.ChunkedArray, word: str) -> np.ndarray:
    # \b of Arrow's regular expressions (RE2) covers ASCII only.
    pattern = rf"(^|[^\pL\pN_]){re.escape(word)}($|[^\pL\pN_])"
    hits = pc.match_substring_regex(pc.list_flatten(captions), pattern, ignore_case=True)
    found = np.zeros(len(captions), dtype=bool)
    found[pc.list_parent_indices(captions).to_numpy()[_numpy(hits)]] = True
    return found


def _numpy(mask: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = pc.fill_null(mask, False).to_numpy()
    return values.astype(bool)


def _bounds(date: str) -> tuple[datetime, datetime]:
    """First moment of a year, month, day, minute or second, and the first moment after it."""
    for pattern, step in (("%Y", 366), ("%Y-%m", 31), ("%Y-%m-%d", 1)):
        try:
            first = datetime.strptime(date, pattern)
            following = first + timedelta(days=step)  # somewhere within the next year, month or day
        except (ValueError, OverflowError):
            continue
        return first, datetime.strptime(following.strftime(pattern), pattern)
    for pattern, length in (("%Y-%m-%dT%H:%M", timedelta(minutes=1)), ("%Y-%m-%dT%H:%M:%S", timedelta(seconds=1))):
        try:
            first = datetime.strptime(date, pattern)
        except ValueError:
            continue
        return first, first + length
    raise UsageError(f"{date!r} is not a date: expected 2024, 2024-07, 2024-07-14 or 2024-07-14T18:30")
