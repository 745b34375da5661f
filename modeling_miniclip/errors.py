"""The package's errors: what is wrong, where, what was expected and how to fix it."""

import difflib
import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")

# What a status code of the Hub means for the user. The Hub's own messages for other codes are clear enough.
HUB_STATUS_MESSAGES = {
    401: "the Hub rejected this token",
    403: "this token does not have permission",
    412: "somebody else committed in the meantime",
    429: "too many requests to the Hub",
    **dict.fromkeys((500, 502, 503, 504), "the Hub is temporarily unavailable"),
}

# Error numbers of a file system that cannot store more data, for files written by any library.
DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})

# torch.save names its own source line and not the file system's reason.
TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs \d+")

EXIT_CODES = (
    "Exit codes: 0 for success, 2 if the command or recipe is wrong, 130 after Ctrl-C, 1 for any other failure (data, "
    "model, disk or network)."
)


def printable(text: object) -> str:
    r"""Text from outside (a file name, a caption), made safe for one line of a terminal, a log or a card.

    Control characters, line breaks and changes of the writing direction are escaped as in Python source code.

    Examples:
        >>> print(printable("cat\x1b[2J\n.jpg"))
        cat\x1b[2J\n.jpg
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    number = ord(character) - 0xDC00  # of a byte that is not UTF-8, as Python shows it in a file name
    return f"\\x{number:02x}" if 0x80 <= number <= 0xFF else character.encode("unicode_escape").decode()


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """End of a message about an unknown name: the most similar known name, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


@dataclass(frozen=True)
class Problem:
    """Something wrong at one place of a dataset.

    Args:
        kind: a key of `data.problems.KINDS`.
        text: what is wrong, what was expected and how to fix it.
        file: file, or dataset and split on the Hub.
        row: row of the file as an editor counts it, from 1; for a dataset on the Hub, from 0.
        column: name of the column.
        image: name of the image that cannot be used because of the problem.
    """

    kind: str
    text: str
    file: str
    row: int | None = None
    column: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        place = self.file
        if self.row is not None:
            place += f", row {self.row}"
        if self.column is not None:
            place += f", column {self.column!r}"
        return f"{place}: {self.text}"


class MiniClipError(Exception):
    """Base class of the package's errors. A message may quote the user's input.

    Raised directly when something outside the package fails: the disk, the Hub, a library that is not installed.
    """

    exit_code: ClassVar[int] = 1  # of a command that ends with this error

    def __str__(self) -> str:
        """The message on one line, made safe with [`printable`] and without tokens of the Hub."""
        return HUB_TOKEN.sub("hf_***", printable(re.sub(r"\s*\n\s*", " ", super().__str__())))


class DataError(MiniClipError, ValueError):
    """A dataset, a caption file or an image is not as expected.

    Args:
        problem: what is wrong and where; a plain sentence if it is at no particular place of a dataset.

    Attributes:
        problem: the [`Problem`], or None after a plain sentence.
    """

    def __init__(self, problem: Problem | str):
        super().__init__(str(problem))
        self.problem = problem if isinstance(problem, Problem) else None


class ModelError(MiniClipError, ValueError):
    """A model, an export or a checkpoint is missing, damaged or of the wrong kind."""


class UsageError(MiniClipError, ValueError):
    """A flag, an argument, a recipe key or a combination of them is wrong."""

    exit_code: ClassVar[int] = 2


def one_line(error: BaseException | str) -> str:
    """An error of another library as part of a sentence: on one line, without tokens and signed URLs.

    Libraries that load from the Hub often say only what they did not find, and keep the network's error as the cause:
    its text is added.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    text = str(error) or type(error).__name__
    link = error if isinstance(error, BaseException) else None
    while link is not None and not isinstance(link, HTTPError):
        link = link.__cause__ or link.__context__
    if link is not None and str(link) not in text:
        text += f" ({type(link).__name__}: {link})"
    if isinstance(link, HfHubHTTPError) and not isinstance(link, RepositoryNotFoundError):
        meaning = HUB_STATUS_MESSAGES.get(link.response.status_code)
        text = f"{meaning}: {text}" if meaning and meaning not in text else text
    for pattern, replacement in (
        (r"\s+", " "),
        (r"Bearer [^'\"]*", "Bearer ***"),
        (r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1"),  # a signed URL works like a token
        (r" ?\(Request ID: [^)]*\)|For more information check: \S+ ?", ""),
    ):
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(".")


def disk_error_message(error: BaseException) -> str | None:
    """Why a file could not be written, from an error of any library that writes files; None for other errors.

    Errors from which this one was raised count too: torch.save raises a second one while it closes the file.
    """
    link: BaseException | None = error
    while link is not None:
        text = one_line(link)
        if isinstance(link, OSError) and link.errno is not None:
            number = link.errno
        else:  # safetensors is written in Rust, and Arrow in C++: they pass on the number only in their texts
            in_text = re.search(r"\(os error (\d+)\)|\[errno (\d+)\]", text, re.IGNORECASE)
            number = int(in_text[1] or in_text[2]) if in_text else 0
        if number in DISK_ERRNOS:
            return f"cannot write: {text}"
        if TORCH_CANNOT_WRITE.search(text):
            return "cannot write: torch could not write a file"
        link = link.__cause__ or link.__context__
    return None
