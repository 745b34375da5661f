"""The kinds of problems that a dataset can have, and what a reader does when it meets one."""

import warnings
from collections.abc import Callable
from typing import Any

from ..errors import DataError, Problem

# Name of each kind of problem in a summary, after its count.
KINDS = {
    "unusable": "problems that make the dataset unusable",
    "encoding": "rows with bytes that are not UTF-8",
    "separator": "files with another separator",
    "quotes": "rows with wrong quotation marks",
    "fields": "rows with too many or too few fields",
    "json": "rows that are not JSON objects",
    "no-name": "rows without an image name",
    "empty-caption": "captions that are empty or not text",
    "long-caption": "captions that are much too long",
    "data-caption": "captions that look like lists, JSON or missing values",
    "odd-caption": "captions with control characters",
    "negatives": "wrong captions that look like lists but are none",
    "duplicate-caption": "duplicate captions of an image",
    "spelling": "files whose image names are spelled otherwise than the image files",
    "outside": "images outside the folder of images",
    "unlisted": "folders that cannot be listed",
    "link": "links to folders that are not followed",
    "dangling": "links that lead nowhere",
    "missing": "missing image files",
    "unreadable": "image files that cannot be read",
    "empty": "empty image files",
    "format": "images in formats that are not read here",
    "undecodable": "images that cannot be decoded",
    "metadata": "images whose EXIF data cannot be read",
    "huge": "images that are too large to decode safely",
    "duplicate-image": "images that look like another one of their split",
    "two-splits": "images in two splits",
    "no-captions": "images without captions, or captions without images",
    "small-split": "splits that are too small",
    "shard": "shards that cannot be read",
    "damaged-shard": "shards that are damaged",
    "row-groups": "tables with large row groups",
    "left-out": "files with rows that are left out: they have no caption, or no image",
}

# Problems that do no harm: what they are about is used, or is used elsewhere. `miniclip check` names them.
HARMLESS = frozenset({"link", "dangling", "metadata", "spelling", "left-out", "row-groups"})

# Problems of whole shards.
SHARD_PROBLEMS = frozenset({"shard", "damaged-shard"})

# Called with each problem. If it returns, the reader skips the row and goes on.
OnProblem = Callable[[Problem], Any]


def raise_problem(problem: Problem) -> None:
    """Stop at the first problem: what a reader does by default. A [`HARMLESS`] one is only a warning.

    Raises:
        DataError: the problem is not harmless.
    """
    if problem.kind not in HARMLESS:
        raise DataError(problem)
    warnings.warn(str(problem), stacklevel=2)
