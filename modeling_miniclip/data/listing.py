"""List the files of a folder and its subfolders: nothing is left out without a word, and no folder is listed twice."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import Problem
from ..utils.files import identity, is_link
from ..utils.names import name_of, slashed
from .picture_formats import is_picture_file, unreadable_format
from .problems import OnProblem

# Folders that systems and network drives keep for themselves. Files that start with a dot are hidden, too, such as the
# `._a.jpg` of a Mac.
SYSTEM_FOLDERS = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "@eadir", "#recycle", "lost+found"}
)


@dataclass(frozen=True)
class ListedFolder:
    """A folder with the names of its files that are not hidden, sorted."""

    path: str
    files: list[str]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or kept by the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_hidden_path(path: str) -> bool:
    """Whether any part of a relative path with `/` is hidden."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def walk_folders(
    root: str | os.PathLike, on_problem: OnProblem, whole: str | os.PathLike | None = None
) -> Iterator[ListedFolder]:
    """A folder and all folders below it, each once, in a fixed order. Linked folders come last.

    Args:
        root: folder to start with.
        on_problem: function called with each folder that cannot be listed (kind `unlisted`), each linked folder that
            is not followed, because it was listed already or holds this one (`link`), and each link that leads nowhere
            (`dangling`; links to images are left to whoever reads them).
        whole: the folder that `root` is a part of; links to what is hidden in it are left out. By default `root`.

    Raises:
        OSError: `root` cannot be listed.
    """
    seen: set[tuple[Any, ...]] = set()
    links: list[str] = []
    waiting, top = [os.fspath(root)], os.path.realpath(whole or root)
    while waiting or links:
        path = waiting.pop() if waiting else links.pop(0)
        try:
            found = identity(path)
            if found in seen:
                on_problem(Problem("link", "a link to a folder that is listed already; not followed", name_of(path)))
                continue
            seen.add(found)
            folder, folders, linked, dangling = _list_folder(path)
        except OSError as error:
            if path == os.fspath(root):
                raise
            if not isinstance(error, FileNotFoundError):  # which was deleted in the meantime
                text = f"this folder cannot be listed: {error.strerror or error}; check its permissions and its disk"
                on_problem(Problem("unlisted", text, name_of(path)))
            continue
        for link in dangling:
            on_problem(Problem("dangling", "a link that leads nowhere", name_of(link)))
        for link in linked:
            real = os.path.realpath(link)
            if _holds(top, real) and is_hidden_path(slashed(os.path.relpath(real, top))):
                continue  # it leads to what is hidden
            if _holds(real, os.path.realpath(path)):
                on_problem(Problem("link", "a link to a folder that holds it; not followed", name_of(link)))
            else:
                links.append(link)
        waiting += reversed(folders)
        yield folder


def _list_folder(path: str) -> tuple[ListedFolder, list[str], list[str], list[str]]:
    """A folder; the paths of its subfolders, links to folders, and links to nothing. What is hidden is left out."""
    files, folders, links, dangling = [], [], [], []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if not _is_folder(entry):
                files.append(entry.name)
                if is_link(entry) and not is_picture_file(entry.name) and not os.path.exists(entry.path):
                    dangling.append(entry.path)  # to a folder that was there before, perhaps
            elif is_link(entry):
                links.append(entry.path)
            else:
                folders.append(entry.path)
    return ListedFolder(path, files), folders, links, dangling


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to a place that may not be looked at
        return False


def _holds(folder: str, other: str) -> bool:
    return other == folder or other.startswith(os.path.join(folder, ""))


def subfolders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in a folder, sorted, without what is hidden; linked ones, too.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(os.fspath(folder)) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))


def images_of_folder(folder: ListedFolder, on_problem: OnProblem) -> Iterator[str]:
    """Paths of the image files of a listed folder.

    Args:
        folder: folder from [`walk_folders`].
        on_problem: function called with each picture in a format that cannot be read (kind `format`), and each
            picture that is no regular file (kind `missing`).
    """
    for name in folder.files:
        path = os.path.join(folder.path, name)
        if not is_picture_file(name):
            continue
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                on_problem(Problem("missing", "not a regular file", name_of(path), image=name_of(path)))
                continue
            unreadable = unreadable_format(path)
        except OSError:  # whoever reads the image reports it
            unreadable = None
        if unreadable is None:
            yield path
        else:
            on_problem(Problem("format", unreadable.reason, name_of(path), image=name_of(path)))


def list_images(
    root: str | os.PathLike, on_problem: OnProblem, whole: str | os.PathLike | None = None
) -> Iterator[str]:
    """Paths of all image files in a folder and below it; arguments as in [`walk_folders`] and [`images_of_folder`].

    Raises:
        OSError: `root` cannot be listed.
    """
    for folder in walk_folders(root, on_problem, whole):
        yield from images_of_folder(folder, on_problem)
