"""The package's own errors: each message says what is wrong, where, what was expected and how to mend it."""

import re


class MiniClipError(Exception):
    """Base of all errors that the package raises for its user's input.

    Its text may quote that input: what would move a terminal's cursor or turn the direction of writing is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class DataError(MiniClipError, ValueError):
    """A data set, a caption file or an image is not as expected."""


class UsageError(MiniClipError, ValueError):
    """A flag, a recipe key or a combination of them is wrong."""


def printable(text: str) -> str:
    """Text with its control characters (but line feeds), halves of characters and the like as Python escapes them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# What an answer of the Hub means to its user; other ones explain themselves.
MEANINGS = {
    401: "the Hub does not know this token",
    403: "this token does not allow it",
    412: "somebody else committed in the meantime",
    429: "these were too many requests for the Hub",
    **dict.fromkeys((500, 502, 503, 504), "the Hub is out of order"),
}


def one_line(error: BaseException | str) -> str:
    """An error of a library as part of a sentence: one line, no token, no signed address; what the network said.

    Libraries that load from the Hub often tell only what they did not find, and keep the reason as the error's cause.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    text = str(error) or type(error).__name__
    link = error if isinstance(error, BaseException) else None
    while link is not None and not isinstance(link, HTTPError):
        link = link.__cause__ or link.__context__
    if link is not None and str(link) not in text:
        text += f" ({type(link).__name__}: {link})"
    if isinstance(link, HfHubHTTPError) and not isinstance(link, RepositoryNotFoundError):
        meaning = MEANINGS.get(link.response.status_code)
        text = f"{meaning}: {text}" if meaning else text
    for pattern, instead in (
        (r"\s+", " "),
        (r"Bearer [^'\"]*", "Bearer ***"),
        (r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1"),  # a signature is as good as a token
        (r" ?\(Request ID: [^)]*\)|For more information check: \S+ ?", ""),
    ):
        text = re.sub(pattern, instead, text)
    return text.strip().rstrip(".")
