"""Image files of a caption file: which folder holds them, which cannot be used, which are spelled otherwise."""

import errno
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ...errors import DataError, Problem
from ...utils.names import is_utf8, slashed
from ..picture_formats import unreadable_format
from ..problems import OnProblem
from ..rows import Row

# Where the images of a caption file may be, relative to its folder.
IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
    ".",
)

# What is wrong with an image file, by the kind of problem.
BAD_FILES = {
    "outside": "is outside {folder}; move it there, or allow this with --allow_outside_images",
    "missing": "is not in {folder}; name the right folder with image_dir, or delete its rows",
    "empty": "in {folder} is empty; replace it or delete its rows",
    "unreadable": "in {folder} cannot be read; check its permissions and its disk",
    "format": "in {folder} is in a format that is not read here",
}


BLOCK = 4096  # rows whose images are looked for at once
SAMPLE = 100  # names that show which folder holds the images
LISTINGS = 16  # folders whose listings are kept to find names that are spelled otherwise


def image_folder(root: Path, images: Iterable[str], more: Iterable[str] = ()) -> Path:
    """The one of [`IMAGE_FOLDERS`] in `root`, or of `more` such folders, that holds most of the first images.

    Without any, names that are spelled otherwise count, and else the first folder that exists.
    """
    sample = list(islice(images, SAMPLE))
    folders = [root / name for name in (*IMAGE_FOLDERS, *more)]
    counts = [sum(os.path.isfile(folder / name) for name in sample) for folder in folders]
    if not any(counts):
        existing = [folder for folder in folders if folder.is_dir()]
        loose = [(sum(Spellings(folder).find(name) is not None for name in sample), folder) for folder in existing]
        return max(loose, key=lambda pair: pair[0])[1] if loose else root
    return folders[counts.index(max(counts))]


def bad_files(folder: Path, bounds: Path, images: Iterable[str], allow_outside: bool) -> Iterator[tuple[str, str]]:
    """Find image files that cannot be used, without opening them.

    Args:
        folder: folder that the names are relative to.
        bounds: folder that no name may leave; it may itself be a symbolic link.
        images: names of the images.
        allow_outside: whether names may leave `bounds`.

    Returns:
        The name and the kind of problem, a key of [`BAD_FILES`], of each such file.
    """
    root = os.path.realpath(bounds)
    inside: dict[str, bool] = {}  # by folder, so that each file costs only one or two system calls

    def is_inside(path: str) -> bool:
        real = os.path.realpath(path)
        return real == root or real.startswith(os.path.join(root, ""))

    for name in images:
        parent, path = posixpath.dirname(name) if "/" in name else "", os.path.join(folder, name)
        try:
            if parent not in inside:
                inside[parent] = allow_outside or is_inside(os.path.join(folder, parent))
            if not inside[parent]:
                yield name, "outside"
                continue
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                if not allow_outside and not is_inside(path):
                    yield name, "outside"
                    continue
                info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                yield name, "missing"
            elif info.st_size == 0:
                yield name, "empty"
            elif unreadable_format(path) is not None:
                yield name, "format"
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
            yield name, "missing"
        except OSError as error:
            yield name, "missing" if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else "unreadable"


# --- names that are spelled otherwise -------------------------------------------------------------------------------


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Spellings:
    """Finds files whose names differ only in their Unicode form, or in case, from the names that are looked for.

    Args:
        folder: folder that the names are relative to.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = folder
        self._listing = lru_cache(maxsize=LISTINGS)(self._list)

    def find(self, name: str) -> str | None:
        """The only file that the name can mean; None if there is none, or several differ only in case."""
        if name.startswith("/") or ".." in name.split("/"):
            return None
        found = ""
        for part in name.split("/"):
            same = self._listing(found).get(_loose(part), [])
            if len(same) > 1:  # in one of them, only the Unicode form may differ
                form = unicodedata.normalize("NFC", part)
                same = [other for other in same if unicodedata.normalize("NFC", other) == form]
            if len(same) != 1:
                return None
            found = posixpath.join(found, same[0])
        return found

    def _list(self, parent: str) -> dict[str, list[str]]:
        """Names in a folder, by what they have in common with names that are spelled otherwise."""
        names: dict[str, list[str]] = {}
        try:
            for name in os.listdir(os.path.join(self.folder, parent)):
                if is_utf8(name):
                    names.setdefault(_loose(name), []).append(name)
        except OSError:  # no such folder, or it cannot be listed
            pass
        return names


# --- rows with their images -----------------------------------------------------------------------------------------


def rows_with_images(
    rows: Iterable[Row],
    folder: Path,
    allow_outside: bool,
    on_problem: OnProblem,
    bounds: Path | None = None,
    keep_bad: bool = False,
) -> Iterator[Row]:
    """Rows that name image files, with the paths of these; those whose image cannot be used are reported and left out.

    Args:
        rows: rows whose `name` is relative to `folder`. `name` and `key` become relative to `bounds`.
        folder: folder of the images.
        allow_outside: whether names may leave `bounds`.
        on_problem: function called with each image that is missing, empty, outside, or in a format that is not read;
            and once if names were matched with files that are spelled otherwise (kind `spelling`).
        bounds: folder that no name may leave; by default `folder`.
        keep_bad: whether to yield rows too whose image cannot be used.

    Raises:
        DataError: there is no such folder.
    """
    bounds = bounds or folder
    if not folder.is_dir():
        text = "no such folder of images; name the right one with image_dir"
        raise DataError(Problem("unusable", text, str(folder)))
    images = _Images(folder, bounds, allow_outside, on_problem)
    left = iter(rows)
    while block := list(islice(left, BLOCK)):
        other = images.check(block)
        for row in block:
            name = other.get(row.name, row.name) if other else row.name
            if name is None and keep_bad:
                name = row.name
            if name is not None:
                images.place(row, name)
                yield row
    images.report_spellings()


class _Images:
    """Looks for the images of rows; keeps only what it has reported."""

    def __init__(self, folder: Path, bounds: Path, allow_outside: bool, on_problem: OnProblem):
        self.folder, self.bounds, self.allow_outside, self.on_problem = folder, bounds, allow_outside, on_problem
        self.start = os.path.join(folder, "") if folder != Path() else ""
        relative = slashed(os.path.relpath(folder, bounds))
        self.prefix = "" if relative == "." else f"{relative}/"
        self.spellings = Spellings(folder)
        self.reported: set[str] = set()
        self.blocks = 0
        self.spelled: tuple[Row, str, str] | None = None  # the first row, its name and that of the file
        self.count_spelled = 0

    def place(self, row: Row, name: str) -> None:
        """Set image, name and key of a row whose image has this name in the folder."""
        is_simple = not self.allow_outside and not name.startswith("/")
        row.image = self.start + name if is_simple else os.path.join(self.folder, name)
        row.name = row.key = self._name(name) if self.prefix else name

    def _name(self, name: str) -> str:
        return posixpath.normpath(self.prefix + name) if not name.startswith("/") else name

    def check(self, block: list[Row]) -> dict[str, str | None]:
        """Report the images that cannot be used; the file names of those that differ, None for a bad one."""
        first: dict[str, Row] = {}
        for row in block:
            first.setdefault(row.name, row)
        other: dict[str, str | None] = {}
        by_kind: dict[str, list[str]] = {}
        for name, kind in self._bad(first):
            found = self.spellings.find(name) if kind == "missing" else None
            bad = next(self._bad([found]), None) if found is not None else (name, kind)
            if bad is None:
                self.count_spelled += 1
                self.spelled = self.spelled or (first[name], name, str(found))
                other[name] = found
            else:
                by_kind.setdefault(bad[1], []).append(name)
                other[name] = None
        self.blocks += 1
        has_no_rows = (self.blocks == 1 and len(block) < BLOCK) or block[0].number is None
        rows = "" if has_no_rows else f" in rows {block[0].number} to {block[-1].number}"
        for kind, names in by_kind.items():
            self._report(kind, {name: first[name] for name in names}, f"{len(first)} images{rows}")
        return other

    def _bad(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        return bad_files(self.folder, self.bounds, names, self.allow_outside)

    def _report(self, kind: str, rows: dict[str, Row], total: str) -> None:
        for name, row in rows.items():
            if name in self.reported:
                continue
            self.reported.add(name)
            reason = BAD_FILES[kind].format(folder=self.bounds if kind == "outside" else self.folder)
            if kind == "format" and (found := unreadable_format(os.path.join(self.folder, name))) is not None:
                reason = f"is {found.reason}"
            text = f"image file {name!r} {reason} ({len(rows)} of {total} are {kind})"
            self.on_problem(Problem(kind, text, row.file, row.number, row.column, self._name(name)))

    def report_spellings(self) -> None:
        """Report once that names were matched with files that are spelled otherwise."""
        if self.spelled is None:
            return
        row, name, found = self.spelled
        text = f"{name!r} is the file {found!r}: the names differ only in case or in their Unicode form"
        if self.count_spelled > 1:
            text += f", as do those of {self.count_spelled - 1} other images"
        self.on_problem(Problem("spelling", text, row.file, row.number, row.column))
