"""Kinds of problems in a dataset, and the error that lists those that were found."""

from typing import NoReturn

from ..errors import DataError, Problem

# What each kind of problem is called in a summary.
KINDS = {
    "unusable": "nothing to go on with",
    "encoding": "rows with bytes that are not UTF-8",
    "separator": "files with another separator",
    "quotes": "rows with wrong quotation marks",
    "fields": "rows with too many or too few fields",
    "json": "rows that are not JSON objects",
    "no-name": "rows without an image name",
    "empty-caption": "captions that are empty or no text",
    "long-caption": "captions that are much too long",
    "odd-caption": "captions with control characters",
    "duplicate-caption": "captions that an image has twice",
    "outside": "images outside the folder of images",
    "missing": "image files that are not there",
    "empty": "image files of no bytes",
    "undecodable": "images that cannot be decoded",
    "huge": "images that are too large to decode safely",
    "duplicate-image": "images that look like another one of their split",
    "two-splits": "images in two splits",
    "no-captions": "images without captions, or captions without images",
    "small-split": "splits that are too small",
}


def raise_problem(problem: Problem) -> NoReturn:
    """What a reader does with a problem, unless it is told to go on without the row.

    Raises:
        DataError: always.
    """
    raise DataError(str(problem))
