"""The package's own errors: each message says what is wrong, where, what was expected and how to mend it."""

import re


class MiniClipError(Exception):
    """Base of all errors that the package raises for its user's input."""


class DataError(MiniClipError, ValueError):
    """A data set, a caption file or an image is not as expected."""


class UsageError(MiniClipError, ValueError):
    """A flag, a recipe key or a combination of them is wrong."""


def one_line(error: BaseException | str) -> str:
    """An error of a library as part of a sentence: one line, no token, no signed address; what the network said.

    Libraries that load from the Hub often tell only what they did not find, and keep the reason as the error's cause.
    """
    from huggingface_hub.errors import HTTPError

    told = [str(error) or type(error).__name__]
    link = error if isinstance(error, BaseException) else None
    while link is not None and not isinstance(link, HTTPError):
        link = link.__cause__ or link.__context__
    if link is not None and str(link) not in told[0]:
        told.append(f"({type(link).__name__}: {link})")
    text = " ".join(" ".join(told).split())
    text = re.sub(r"Bearer [^'\"]*", "Bearer ***", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", text)
    return re.sub(r"For more information check: \S+ ?", "", text).rstrip(".")
