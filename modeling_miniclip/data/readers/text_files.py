"""Text files piece by piece: lines as an editor counts them, and objects of a JSON list. Bad bytes are reported."""

import io
import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError, Problem, one_line
from ...utils.names import name_of
from ..problems import OnProblem

PIECE = 1 << 20  # characters of a JSON list that are read at a time
LONGEST = 1 << 24  # characters of one field or object: a longer one has no end
BETWEEN = re.compile(r"[\s,]*")  # what separates the objects of a list
LIST = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
MARK = b"\xef\xbb\xbf"  # that Windows writes at the start of UTF-8


class Lines:
    """The lines of a text file, with their ends: `\\n`, `\\r\\n` or `\\r`, as an editor splits them.

    Bytes that are not UTF-8 become lone surrogates, and their line a problem.

    Args:
        path: path of the file.
        on_problem: function called with each line that is not UTF-8.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path, on_problem: OnProblem):
        self.path, self.on_problem = path, on_problem
        self.undecoded: deque[int] = deque()  # numbers of the lines that are not UTF-8, from 1

    def __iter__(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                position = len(MARK) if file.peek(len(MARK)).startswith(MARK) else 0
                text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
                for number, line in enumerate(text, 1):
                    if line.isascii():
                        position += len(line)
                    else:
                        try:
                            position += len(line.encode())
                        except UnicodeEncodeError as error:
                            data = line.encode("utf-8", "surrogateescape")
                            offset = len(line[: error.start].encode())
                            self._report(number, position + offset, data[offset], number == 1 and data)
                            position += len(data)
                    yield line
        except OSError as error:
            text_of_error = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
            raise DataError(Problem("unusable", text_of_error, name_of(self.path))) from error

    def _report(self, number: int, position: int, byte: int, start: bytes | bool) -> None:
        problem = f"byte {position} (0x{byte:02x}) is not UTF-8; save the file as UTF-8 (it is probably "
        is_utf16 = isinstance(start, bytes) and start[:2] in (b"\xff\xfe", b"\xfe\xff")
        problem += "UTF-16)" if is_utf16 else "Windows-1252: iconv -f CP1252 -t UTF-8)"
        self.undecoded.append(number)
        self.on_problem(Problem("encoding", problem, str(self.path), number))

    def are_undecoded(self, first: int, last: int) -> bool:
        """Whether one of these lines, which come after those of earlier calls, is not UTF-8."""
        while self.undecoded and self.undecoded[0] < first:
            self.undecoded.popleft()
        return bool(self.undecoded) and self.undecoded[0] <= last


def check_surrogates(value: Any) -> None:
    """Check the texts in a JSON value, which may be any half of a character by its number, such as "\\ud800".

    Raises:
        ValueError: a text cannot be written as UTF-8.
    """
    json.dumps(value, ensure_ascii=False).encode()


def is_json_list(path: Path) -> bool:
    """Whether a file is a JSON list of objects, by its start."""
    with path.open("rb") as file:
        return LIST.match(file.read(100)) is not None


def json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list, each with the number of the line on which it starts.

    Raises:
        DataError: the file cannot be read, or is not valid JSON in UTF-8.
    """
    decoder, number = json.JSONDecoder(), 1
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            text = _piece(file, path, number)
            at = text.index("[") + 1
            while True:
                between = BETWEEN.match(text, at)
                end = between.end() if between else at
                number, at = number + text.count("\n", at, end), end
                if at == len(text):
                    text, at = _piece(file, path, number), 0
                    if not text:
                        raise DataError(
                            Problem(
                                "json",
                                "the end of the list is missing; copy or download the file again",
                                str(path),
                                number,
                            )
                        )
                    continue
                if text[at] == "]":
                    return
                try:
                    value, end = decoder.raw_decode(text, at)
                    if text.find("\\u", at, end) >= 0:
                        check_surrogates(value)
                except (ValueError, RecursionError) as error:
                    more = _piece(file, path, number, len(text)) if len(text) - at < LONGEST else ""
                    if not more:
                        text = f"not valid JSON: {one_line(error)}"
                        raise DataError(Problem("json", text, str(path), number)) from error
                    text, at = text[at:] + more, 0
                    continue
                yield number, value
                number, at = number + text.count("\n", at, end), end
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
        raise DataError(Problem("unusable", text, name_of(path))) from error


def _piece(file: io.TextIOWrapper, path: Path, number: int, size: int = 0) -> str:
    text = file.read(max(PIECE, size))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        row = number + text.count("\n", 0, error.start)
        text = f"a byte (0x{ord(text[error.start]) - 0xDC00:02x}) is not UTF-8; save the file as UTF-8"
        raise DataError(Problem("encoding", text, str(path), row)) from error
    return text
