r"""Names of files as text that every format can store, and back.

Linux allows any bytes in a file name. Python shows those that are not UTF-8 as lone surrogates, which JSON, Arrow,
HTML and terminals reject. In the names that this package writes, they are escaped: the byte 0xe9 becomes `\xe9`.
"""

import os
import re

from ..errors import UsageError

ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
SURROGATE = re.compile("[\ud800-\udfff]")


def name_of(path: str | os.PathLike) -> str:
    r"""A path as text; different paths have different names.

    Example:
        >>> name_of("caf\udce9.jpg")
        'caf\\xe9.jpg'
    """
    text = os.fspath(path)
    if os.sep == "/":  # a backslash that looks like an escaped byte is escaped, too
        text = ESCAPED.sub(lambda match: r"\x5c" + match[0][1:], text)
    return SURROGATE.sub(lambda match: escaped_surrogate(match[0]), text)


def path_of(name: str) -> str:
    r"""The path with this name, as `name_of` returned it.

    Example:
        >>> ascii(path_of(r"caf\xe9.jpg"))
        "'caf\\udce9.jpg'"
    """
    if os.sep != "/":
        return name
    return ESCAPED.sub(lambda match: os.fsdecode(bytes.fromhex(match[1])), name)


def is_utf8(path: str | os.PathLike) -> bool:
    """Whether a path can be written as UTF-8."""
    return SURROGATE.search(os.fspath(path)) is None


def check_name(path: str | os.PathLike, label: str = "") -> None:
    """Check that the libraries that write files accept a path.

    Args:
        path: path of a file or folder to write.
        label: start of the error message, such as the flag that named the path.

    Raises:
        UsageError: it is not UTF-8.
    """
    if not is_utf8(path):
        raise UsageError(f"{label}{name_of(path)}: the name of what is written is not UTF-8; choose another name")


def escaped_surrogate(character: str) -> str:
    """A lone surrogate as text: the byte that it stands for, or its number."""
    number = ord(character)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"
