"""Lines of a text file as an editor counts them, read one by one; bytes that are not UTF-8 are reported."""

import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError, Problem
from ..utils.names import name_of
from .problems import OnProblem

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
