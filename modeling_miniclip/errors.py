"""The package's own errors: each message says what is wrong, where, what was expected and how to mend it."""

import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar


def printable(text: object) -> str:
    r"""Text from outside (a file name, a caption) as it may stand in a line of a terminal, a log or a card.

    What would control a terminal, break the line or turn the direction of writing is shown as Python writes it.

    Example:
        >>> print(printable("cat\x1b[2J\n.jpg"))
        cat\x1b[2J\n.jpg
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a sentence about an unknown name: the known one that is most like it, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else otherwise


TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


class MiniClipError(Exception):
    """Base of all errors that the package raises for its user's input, which its text may quote.

    Of itself: something outside failed, the disk, the Hub, a library that is not there.
    """

    exit_code: ClassVar[int] = 1  # of a command that ends with it

    def __str__(self) -> str:
        """The message in one line, [`printable`] whatever names it quotes, and without tokens of the Hub."""
        return TOKEN.sub("hf_***", printable(re.sub(r"\s*\n\s*", " ", super().__str__())))


class DataError(MiniClipError, ValueError):
    """A data set, a caption file or an image is not as expected."""


class ModelError(MiniClipError, ValueError):
    """A model, an export or a checkpoint is missing, damaged, of another kind or other than the one that is needed."""


class UsageError(MiniClipError, ValueError):
    """A flag, an argument, a recipe key or a combination of them is wrong: the command has to be written otherwise."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Problem:
    """Something wrong at a place of a data set.

    Args:
        kind: a key of `checking.KINDS`.
        text: what is wrong, what was expected and how to mend it.
        file: or split of a data set on the Hub.
        row: as an editor counts them, from 1; of a data set on the Hub from 0.
        column: name.
        image: that is of no use because of it.
    """

    kind: str
    text: str
    file: str
    row: int | None = None
    column: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        place = [self.file, *([f"row {self.row}"] if self.row is not None else [])]
        return f"{', '.join(place + ([f'column {self.column!r}'] if self.column else []))}: {self.text}"


# What an answer of the Hub means to its user; other ones explain themselves.
HUB_STATUS_MESSAGES = {
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
        meaning = HUB_STATUS_MESSAGES.get(link.response.status_code)
        text = f"{meaning}: {text}" if meaning else text
    for pattern, instead in (
        (r"\s+", " "),
        (r"Bearer [^'\"]*", "Bearer ***"),
        (r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1"),  # a signature is as good as a token
        (r" ?\(Request ID: [^)]*\)|For more information check: \S+ ?", ""),
    ):
        text = re.sub(pattern, instead, text)
    return text.strip().rstrip(".")


# What a file system answers when it takes no more, by whatever library the file is written.
DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


def disk_error_message(error: BaseException) -> str | None:
    """What a file system refused, of an error of any library that writes files; None for other errors."""
    text = one_line(error)
    by_rust = re.search(r"\(os error (\d+)\)", text)  # safetensors
    number = error.errno if isinstance(error, OSError) else int(by_rust[1]) if by_rust else None
    if number in DISK_ERRNOS:
        return f"the disk refused: {text}"
    # torch.save tells its own place and not the file system's reason.
    return "the disk refused: torch could not write a file" if "PytorchStreamWriter" in text else None


EXIT_CODES = (
    "Exit codes: 2 where the command or its recipe has to be written otherwise, 1 for any other failure: of data, a "
    "model, the disk, the network."
)


def run_command(command: Callable[[], object], debug: bool) -> int:
    """Run what a command line asks for. The package's errors, and a full disk, are told in one line on stderr.

    Args:
        command: what to run; it may return an exit code.
        debug: raise the error instead, for its traceback.

    Returns:
        The exit code: the command's own, else 0; of an error its `exit_code`, which is 2 for [`UsageError`], and 1 for
        all others.
    """
    try:
        done = command()
        return done if isinstance(done, int) else 0
    except MiniClipError as error:
        if debug:
            raise
        line, code = f"error: {error}", error.exit_code
    except Exception as error:
        reason = None if debug else disk_error_message(error)
        if reason is None:
            raise
        line, code = f"error: {printable(reason)}; make room there or write elsewhere, and start again", 1
    print(line, file=sys.stderr)  # now that the error is gone, and with it the progress bar of its frame
    return code
