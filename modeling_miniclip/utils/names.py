r"""Names of files as text that every format and every system can store, and back.

Linux allows any bytes in a file name. Python shows those that are not UTF-8 as lone surrogates, which JSON, Arrow,
HTML and terminals reject. In the names that this package writes, they are escaped: the byte 0xe9 becomes `\xe9`.
Names of data have `/` between their parts; Windows' paths may have `\`. Windows also reserves some names.
"""

import os
import re
from pathlib import Path

from ..errors import UsageError

ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
SURROGATE = re.compile("[\ud800-\udfff]")
SEPARATORS = frozenset(("/", os.sep))

RESERVES_NAMES = os.name == "nt"
PORTS = (f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³")
DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$", *PORTS))
NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def name_of(path: str | os.PathLike) -> str:
    r"""A path as text; different paths have different names.

    Examples:
        >>> name_of("caf\udce9.jpg")
        'caf\\xe9.jpg'
    """
    text = os.fspath(path)
    if os.sep == "/":  # a backslash that looks like an escaped byte is escaped, too
        text = ESCAPED.sub(lambda match: r"\x5c" + match[0][1:], text)
    return SURROGATE.sub(lambda match: escaped_surrogate(match[0]), text)


def path_of(name: str) -> str:
    r"""The path with this name, as `name_of` returned it.

    Examples:
        >>> ascii(path_of(r"caf\xe9.jpg"))
        "'caf\\udce9.jpg'"
    """
    if os.sep != "/":
        return name
    return ESCAPED.sub(lambda match: os.fsdecode(bytes.fromhex(match[1])), name)


def slashed(path: str | os.PathLike) -> str:
    """A path with `/` between its parts on every system, as the names of images in datasets have it."""
    return os.fspath(path).replace(os.sep, "/")


def is_portable(name: str) -> bool:
    r"""Whether every system can store a file of this name, without its folder.

    Windows reserves the names of devices, with any suffix, some characters, and a dot or a blank at the end.

    Examples:
        >>> [is_portable(name) for name in ("nul", "NUL.tar.gz", "null.csv", "a:b", "a.", ".a")]
        [False, False, True, False, False, True]
    """
    stem = name.partition(".")[0].rstrip(" ").lower()
    return not (stem in DEVICES or name[-1:] in (".", " ") or NOT_IN_NAMES.search(name))


def portable_name(text: str, longest: int = 80) -> str:
    """The end of a text, such as a URL, as a part of a file name on any system; other characters become `_`."""
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)[-longest:].rstrip(".")


def public_name(name: str) -> str:
    """A model, dataset or image as pages that people share name it: without the folders that it is in on this machine.

    An export keeps the name of the folder that it is in. Names on the Hub, URLs and relative paths stay as they are.

    Examples:
        >>> public_name("/home/me/photos/a.jpg"), public_name("/runs/my-clip/export"), public_name("user/model")
        ('a.jpg', 'my-clip/export', 'user/model')
    """
    if name.startswith("open_clip:"):  # before ARCHITECTURE/CHECKPOINT
        architecture, slash, checkpoint = name.partition("/")
        return architecture + slash + public_name(checkpoint)
    path = name.removeprefix("file://")
    if not os.path.isabs(path):
        return name
    *_, folder, last = ["", *slashed(path).rstrip("/").split("/")]
    return f"{folder}/{last}" if last == "export" else last


def relative_name(name: str, source: str) -> str:
    """An image of a source without the folders above the source, or above the file that lists the images.

    Examples:
        >>> relative_name("/photos/sea/a.jpg", "/photos"), relative_name("/data/Images/a.jpg", "/data/captions.csv")
        ('sea/a.jpg', 'Images/a.jpg')
    """
    for folder in (source, os.path.dirname(source)):
        inside = slashed(os.path.join(folder, ""))
        if folder and slashed(name).startswith(inside):
            return slashed(name).removeprefix(inside)
    return public_name(name)


def is_utf8(path: str | os.PathLike) -> bool:
    """Whether a path can be written as UTF-8."""
    return SURROGATE.search(os.fspath(path)) is None


def check_name(path: str | os.PathLike, label: str = "") -> None:
    """Check that the libraries that write files accept a path.

    Args:
        path: path of a file or folder to write.
        label: start of the error message, such as the flag that named the path.

    Raises:
        UsageError: it is not UTF-8, or on Windows has a reserved name.
    """
    if not is_utf8(path):
        raise UsageError(f"{label}{name_of(path)}: the name of what is written is not UTF-8; choose another name")
    parts = Path(path).parts if RESERVES_NAMES else ()
    for name in parts[1 if Path(path).anchor else 0 :]:
        if name != ".." and not is_portable(name):
            raise UsageError(f"{label}{path}: Windows stores no file or folder called {name!r}; choose another name")


def escaped_surrogate(character: str) -> str:
    """A lone surrogate as text: the byte that it stands for, or its number."""
    number = ord(character)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"
