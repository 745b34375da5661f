"""The kinds of problems that a dataset can have, and what a reader does when it meets one."""

from collections.abc import Callable
from typing import Any, NoReturn

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
    "odd-caption": "captions with control characters",
    "duplicate-caption": "duplicate captions of an image",
    "outside": "images outside the folder of images",
    "missing": "missing image files",
    "empty": "empty image files",
    "undecodable": "images that cannot be decoded",
    "huge": "images that are too large to decode safely",
    "duplicate-image": "images that look like another one of their split",
    "two-splits": "images in two splits",
    "no-captions": "images without captions, or captions without images",
    "small-split": "splits that are too small",
}

# Called with each problem. If it returns, the reader skips the row and goes on.
OnProblem = Callable[[Problem], Any]


def raise_problem(problem: Problem) -> NoReturn:
    """Stop at the first problem: what a reader does by default.

    Raises:
        DataError: always.
    """
    raise DataError(problem)
