"""Recognise what a file or folder is by its content: a kind that is read as a source, or why it is none of them."""

import json
import os
import re
import tarfile
import zipfile
from pathlib import Path

from ...errors import DataError, Problem
from ...utils.names import name_of
from ..listing import is_hidden, subfolders
from ..picture_formats import is_picture_file, picture_format
from .layouts import SAVED_DATASETS, find_caption_files, find_coco_files, find_karpathy_file

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# Kinds of files that are read as a source of images.
SOURCE_KINDS = {
    "text": "a text file",
    "tar": "a tar archive",
    "parquet": "a Parquet file",
    "image": "an image",
    "coco": "caption annotations in COCO's format",
    "karpathy": "one of Karpathy's splits",
}
# Kinds of folders besides these: "saved" by `datasets`, "shards", and "folder" for one of images.

START = 4096  # bytes that are looked at
JSON_START = 1 << 18  # bytes that are looked at to see what JSON says
JSON_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')
JSON_KEY = re.compile(r'"(\w+)"\s*:')
AS_LINES = "save it as a list of objects with an image and a caption, or one object per line in a .jsonl file"
COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ\0": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
SAVE_AS_CSV = "save it as CSV in UTF-8"
# Files that are no source: how they start, what they are, and what to do.
OTHERS = {
    b"\xd0\xcf\x11\xe0": ("an old Office file", SAVE_AS_CSV),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it and name the folder"),
    b"Rar!": ("a RAR archive", "unpack it and name the folder"),
    b"%PDF": ("a PDF", SAVE_AS_CSV),
    b"{\\rtf": ("a document (RTF)", SAVE_AS_CSV),
    b"SQLite format 3\0": ("an SQLite database", "export the table as CSV"),
    b"ARROW1": ("an Arrow file", "name the folder that Dataset.save_to_disk wrote, or save it as Parquet"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "name the folder that Dataset.save_to_disk wrote, or save it as Parquet"),
    b"\x93NUMPY": ("a NumPy array", "save the images as files"),
    b"\x89HDF": ("an HDF5 file", "save the images as files"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself: git lfs pull"),
}


def recognise_source(path: str | os.PathLike) -> str:
    """The kind of a file or folder: one of [`SOURCE_KINDS`], or `saved`, `shards` or `folder`.

    Raises:
        DataError: it is a workbook, an archive or another file that is no source, or it cannot be read.
    """
    path = Path(path)
    try:
        return _folder_kind(path) if path.is_dir() else recognise_file(path)
    except OSError as error:
        place = Path(error.filename or path)
        raise _unusable(place, f"cannot be read: {error.strerror or error}; check its permissions") from error


def _folder_kind(folder: Path) -> str:
    if any((folder / name).is_file() for name in SAVED_DATASETS):
        return "saved"
    if find_caption_files(folder):
        return "text"
    if find_coco_files(folder):
        return "coco"
    if find_karpathy_file(folder):
        return "karpathy"
    for path in (folder, *(folder / name for name in subfolders(folder))):  # where the first files are
        names = [name for name in os.listdir(path) if not is_hidden(name)]
        shards = sum(name.lower().endswith((*TAR_ENDINGS, ".parquet")) for name in names)
        pictures = sum(map(is_picture_file, names))
        if shards or pictures:
            return "shards" if shards > pictures else "folder"
    return "folder"


def recognise_file(path: str | os.PathLike) -> str:
    """The kind of a file, a key of [`SOURCE_KINDS`]. Its suffix matters only if its content shows nothing.

    Raises:
        DataError: it is a workbook, an archive or another file that is no source, or it cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(START)
        if start.startswith(b"PAR1"):
            return "parquet"
        if picture_format(start) is not None:
            return "image"
        if _is_tar(path, start):
            return "tar"
        if path.suffix.lower() != ".jsonl" and JSON_OBJECT.match(start):
            with path.open("rb") as file:
                kind = _json_object(file.read(JSON_START).decode("utf-8-sig", "replace"))
            if kind is not None:
                return kind
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror or error}; check its permissions") from error
    if (other := _other_kind(path, start)) is not None:
        raise _unusable(path, f"{other[0]}, not a caption file or another source; {other[1]}")
    name = path.name.lower()
    if name.endswith(TAR_ENDINGS):
        return "tar"
    if name.endswith(".parquet"):
        return "parquet"
    return "image" if is_picture_file(name) else "text"


def _json_object(start: str) -> str | None:
    """`karpathy` or `coco` if these are the first keys of such a file."""
    keys = set(JSON_KEY.findall(start))
    if {"images", "sentences", "filename"} <= keys:
        return "karpathy"
    if {"images", "file_name"} <= keys or {"annotations", "image_id"} <= keys or {"images", "annotations"} <= keys:
        return "coco"
    return None


def _unusable(path: Path, text: str) -> DataError:
    return DataError(Problem("unusable", text, name_of(path)))


def _is_tar(path: Path, start: bytes) -> bool:
    if start[257:262] != b"ustar" and not start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        return False
    try:
        return tarfile.is_tarfile(path)
    except EOFError:  # the end of a compressed file is missing
        return False


def _other_kind(path: Path, start: bytes) -> tuple[str, str] | None:
    """What a file is that is no source, and what to do; None for a text file."""
    for magic, unpack in COMPRESSED.items():
        if start.startswith(magic) and not path.name.lower().endswith(TAR_ENDINGS):
            return "a compressed file", f"unpack it: {unpack} {name_of(path.name)}"
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    found = next((each for magic, each in OTHERS.items() if start.startswith(magic)), None)
    if found is not None:
        return found
    odd = sum(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in start)
    if odd > 0.3 * len(start) and not start.startswith((b"\xff\xfe", b"\xfe\xff")):  # marks of UTF-16
        known = is_picture_file(path.name) or path.name.lower().endswith((*TAR_ENDINGS, ".parquet"))
        return None if known else ("a binary file", SAVE_AS_CSV)
    return _json_kind(start.decode("utf-8-sig", "replace")) if path.suffix.lower() != ".jsonl" else None


def _zip_kind(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            folders = {name.partition("/")[0] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        folders = set()
    if "xl" in folders or path.suffix.lower() in (".xlsx", ".xlsm", ".ods"):
        return "a workbook (Excel or similar)", SAVE_AS_CSV
    return "a ZIP archive", "unpack it and name the folder"


def _json_kind(text: str) -> tuple[str, str] | None:
    """JSON that is neither a list of objects nor one object per line of a `.jsonl` file."""
    inner = text.lstrip()
    if inner[:1] == "[" and inner[1:].lstrip()[:1] in ("[", '"', "]"):
        return "a JSON list", AS_LINES
    if inner[:1] != "{" or inner[1:].lstrip()[:1] not in ('"', "}"):
        return None
    try:
        json.loads(inner.splitlines()[0])
    except (ValueError, RecursionError):
        text = "neither COCO's format (images, annotations) nor Karpathy's (images with sentences)"
        return f"a JSON object, {text}", AS_LINES
    return "JSON Lines under another name", "let its name end in .jsonl"
