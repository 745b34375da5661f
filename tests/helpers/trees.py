"""Folders of pictures and other files with any names, links and permissions, as hypothesis draws them."""

import io
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from tests.helpers.fuzzing import PATHS

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X"
FOLDERS = st.sampled_from([b"a", b"b", b"album", b"train", b"__MACOSX", b".cache"]) | PATHS.filter(
    lambda name: name not in (b".", b"..")
)
OUTSIDE = b"/outside"
SUFFIXES = (b".png", b".JPG", b".jpeg", b".heic", b".cr2", b".txt", b".pdf", b"")
PICTURES = frozenset({b".png", b".jpg", b".jpeg", b".heic", b".cr2"})  # what is in the file does not matter


@cache
def picture(seed: int) -> bytes:
    """A small PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 44), (seed % 256, 7 * seed % 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Tree:
    """What a folder holds.

    Args:
        files: content of each file, by its path.
        links: target of each link to a folder, by the path of the link; `OUTSIDE` is a folder next to the tree, with
            one picture.
        closed: folders that cannot be listed.
    """

    files: dict[bytes, bytes] = field(default_factory=dict)
    links: dict[bytes, bytes] = field(default_factory=dict)
    closed: frozenset[bytes] = frozenset()

    def write(self, root: Path) -> None:
        """Write it to a new folder."""
        for name, content in self.files.items():
            path = os.path.join(os.fsencode(root), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
        for link, target in self.links.items():
            if target == OUTSIDE:
                self.outside(root).mkdir()
                (self.outside(root) / "far.png").write_bytes(picture(200))
            there = self.outside(root) if target == OUTSIDE else os.path.join(os.fsencode(root), target)
            os.symlink(os.fsencode(there), os.path.join(os.fsencode(root), link))

    def outside(self, root: Path) -> Path:
        """The folder next to the tree."""
        return root.with_name(f"{root.name}.outside")

    def readable(self, root: Path) -> set[bytes]:
        """Real paths, relative to the tree's folder, of the pictures that can be read."""
        far = {os.fsencode(os.path.relpath(self.outside(root) / "far.png", root))}
        return self.good | (far if OUTSIDE in self.links.values() else set())

    def visible(self, name: bytes) -> bool:
        """Whether no part of a path is hidden."""
        return not any(part.startswith(b".") or part == b"__MACOSX" for part in name.split(b"/"))

    @property
    def good(self) -> set[bytes]:
        """Paths of the pictures that can be read."""
        return {
            name
            for name, content in self.files.items()
            if content.startswith(b"\x89PNG") and self.visible(name) and os.path.splitext(name)[1].lower() in PICTURES
        }

    @property
    def bad(self) -> set[bytes]:
        """Paths of the pictures that cannot be read: damaged, or in a format without a reader."""
        return {
            name
            for name, content in self.files.items()
            if self.visible(name) and os.path.splitext(name)[1].lower() in PICTURES
            if not content.startswith(b"\x89PNG")
        }


@st.composite
def trees(draw: Any, folders: st.SearchStrategy[list[bytes]] | None = None) -> Tree:
    """Trees with at least one good picture at their top, or in each of the given folders."""
    given = draw(folders) if folders is not None else [b""]
    more = st.sampled_from(given)
    places = [*given, *draw(st.lists(st.builds(os.path.join, more, FOLDERS), max_size=3))]
    files = {os.path.join(folder, b"good.png"): picture(i) for i, folder in enumerate(given)}
    kinds = ("picture", "picture", "damaged", "heic", "apple")
    for place in places:
        for name, suffix, kind in draw(
            st.lists(st.tuples(PATHS, st.sampled_from(SUFFIXES), st.sampled_from(kinds)), max_size=3)
        ):
            name = b"._" + name if kind == "apple" else name
            content = {"heic": HEIC, "apple": APPLE_DOUBLE, "damaged": picture(0)[4:60]}.get(kind, picture(len(files)))
            files[os.path.join(place, name + suffix)] = content
    occupied = {parent for name in files for parent in _parents(name)}
    files = {name: content for name, content in files.items() if name not in occupied}
    linkable = sorted({os.path.dirname(name) for name in files})
    links = draw(st.dictionaries(st.builds(os.path.join, st.sampled_from(given), st.just(b"link")),
                                 st.sampled_from([*linkable, OUTSIDE]), max_size=1))  # fmt: skip
    inner = sorted(occupied - {b"", *given})
    closed = draw(st.sets(st.sampled_from(inner), max_size=2)) if inner else ()
    return Tree(files, links, frozenset(closed))


def _parents(name: bytes) -> list[bytes]:
    parts = name.split(b"/")[:-1]
    return [b"/".join(parts[: i + 1]) for i in range(len(parts))]
