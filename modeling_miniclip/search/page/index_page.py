"""What the search page does, without its layout: answers, thumbnails, similar images, and a sample to begin with."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from threading import get_ident
from typing import Any

import numpy as np
from PIL import Image

from ...errors import MiniClipError
from ...utils.files import replace_file
from ...utils.performance import one_thread, release_freed_memory
from ...utils.processes import usable_cpus
from ..exact import Match
from ..filters import EntryFilter
from ..formatting import CHANCE_NOTE, NOTHING
from ..index import ImageIndex
from ..query import Query, default_cutoff, embed_queries, load_checked
from ..unrelated import AUTO, is_weak, percent
from .pictures import picture_of

RESULTS, NEIGHBOURS, EXAMPLES = 24, 12, 6
THUMBNAIL_PIXELS, LARGE_PIXELS = 320, 1600  # longer side in pixels
MAX_FOLDERS = 500  # entries of the drop-down list
MAX_KNOWN = 1_000  # texts whose embeddings are kept: visitors change filters, and search for the same
RELEASED_EVERY = 10.0  # seconds after which freed memory is returned; it takes about as long as a small search
# Example queries for an index without captions.
GENERAL_EXAMPLES = ("a dog", "people outdoors", "food on a table", "a building", "water and sky", "a child playing")

# A thumbnail file and the caption below it.
Thumbnail = tuple[Path, str]


class IndexPage:
    """What the page does, without its layout. Rows of the index never leave the server.

    Args:
        index: index to search.
        pictures: folder for thumbnails.
    """

    def __init__(self, index: ImageIndex, pictures: Path):
        self.index = index
        self.pictures = pictures
        self.threads = ThreadPoolExecutor(usable_cpus())
        # One thread, because torch keeps working memory for each thread that ever computed.
        self.embedder = ThreadPoolExecutor(1)
        self.load: Callable[..., Any] = lru_cache(maxsize=2)(load_checked)  # keeps both towers
        self.embed_words: Callable[[str], np.ndarray] = lru_cache(MAX_KNOWN)(lambda words: self._embed(Query(words)))
        self._released = time.monotonic()

    def warm_up(self) -> None:
        """Load both towers and compute with them once, so that the first visitors do not wait for it.

        A model that cannot be loaded is reported by each search.
        """
        with suppress(MiniClipError):
            self.embedder.submit(self._embed, Query("a photo", Image.new("RGB", (64, 64)))).result()

    def sample(self) -> tuple[list[Thumbnail], list[int], str]:
        """Images from all over the index, before anything is searched; as `search` returns them."""
        rows = np.unique(np.linspace(0, len(self.index) - 1, RESULTS).astype(int)).tolist()
        names = [_name(self.index.entry(row)["id"]) for row in rows]
        count = len(self.index)
        sentence = f"{count:,} images" + (f", here are {len(rows)} of them." if len(rows) < count else ".")
        return self._thumbnails(rows, names), rows, sentence

    def search(
        self,
        words: str | None,
        picture: Image.Image | None,
        folder: str | None = None,
        since: str | None = None,
        until: str | None = None,
        caption: str | None = None,
        split: str | None = None,
        only_fitting: bool = False,
    ) -> tuple[list[Thumbnail], list[int], str]:
        """Answer a query. Strings that are None or blank mean no condition.

        Args:
            words: text to search for.
            picture: image to search for.
            folder: folder that contains the images; this and the following conditions are those of [`EntryFilter`].
            since: earliest date of the images.
            until: latest date of the images.
            caption: words that the captions must contain.
            split: split of the images.
            only_fitting: whether to leave out what fits the words no better than unrelated captions; it makes no
                difference to a search by image.

        Returns:
            Thumbnails of the images found, best first, their rows, and a status line, which may report an error.
        """
        given = [(value or "").strip() or None for value in (words, folder, since, until, caption, split)]
        if given[0] is None and picture is None:
            return [], [], "Nothing to search for: enter words, add an image, or both."
        try:
            query = Query(given[0], picture)
            chosen = EntryFilter(*given[1:])
            rows = chosen.rows(self.index.entries) if chosen else None
            if rows is not None and not len(rows):
                return [], [], "No image passes the filters."
            cutoff = default_cutoff(self.index, query)
            matches = self.index.search(self._embedding(query), RESULTS, rows, cutoff=cutoff)
            kept = [match for match in matches if not (only_fitting and is_weak(match.chance))]
            shown = self._thumbnails([match.index for match in kept], [_caption(match) for match in kept])
        except MiniClipError as error:
            return [], [], str(error)
        candidates = len(self.index) if rows is None else len(rows)
        return shown, [match.index for match in kept], _status(kept, candidates)

    def show(self, rows: list[int], place: int) -> tuple[Image.Image | None, str, list[Thumbnail], list[int]]:
        """Show one of the images found, with up to `LARGE_PIXELS` pixels, and similar images.

        Args:
            rows: rows of the images on the page.
            place: position among them; it comes from the browser.

        Returns:
            The image, a text about it, thumbnails of similar images, and their rows.
        """
        if not 0 <= place < len(rows):
            return None, "", [], []
        row = rows[place]
        entry = self.index.entry(row)
        near = self._nearest(row, NEIGHBOURS + 1)
        others = [match for match in near if match.index != row][:NEIGHBOURS]
        facts = [
            *entry["captions"],
            *([f"{entry['date']:%Y-%m-%d %H:%M}"] if entry["date"] else []),
            *([f"{entry['width']} x {entry['height']} pixels"] if entry["width"] else []),
            entry["id"] if entry["path"] else _name(entry["id"]),
        ]
        found = [match.index for match in others]
        return (
            picture_of(self.index, row, LARGE_PIXELS),
            "\n".join(facts),
            self._thumbnails(found, [_caption(match) for match in others]),
            found,
        )

    def more_like(self, row: int | None) -> tuple[list[Thumbnail], list[int], str]:
        """The images most similar to one of the index, as `search` returns them; the first is the image itself.

        Args:
            row: row of the image; None if none was chosen.
        """
        if row is None:
            return [], [], "Choose an image first."
        matches = self._nearest(row, RESULTS)
        found = [match.index for match in matches]
        status = f"Best {len(found)} of {len(self.index):,} images, like {_name(self.index.entry(row)['id'])}."
        return self._thumbnails(found, [_caption(match) for match in matches]), found, status

    def thumbnail_file(self, row: int) -> Path:
        """Thumbnail file of an image. It is blank for an unreadable image, so that the others keep their places."""
        path = self._thumbnail_path(row)
        if not _is_shown_again(path):
            picture = picture_of(self.index, row, THUMBNAIL_PIXELS) or Image.new(
                "RGB", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), "#cbd5e0"
            )
            fresh = path.with_suffix(f".{get_ident()}")
            picture.save(fresh, "JPEG", quality=82)
            replace_file(fresh, path)
        return path

    def _thumbnail_path(self, row: int) -> Path:
        return self.pictures / f"{row}.jpg"

    def _thumbnails(self, rows: Sequence[int], captions: Sequence[str]) -> list[Thumbnail]:
        missing = [row for row in rows if not _is_shown_again(self._thumbnail_path(row))]
        list(self.threads.map(self.thumbnail_file, missing))
        return [(self._thumbnail_path(row), caption) for row, caption in zip(rows, captions, strict=True)]

    def _nearest(self, row: int, k: int) -> list[Match]:
        return self.index.search(np.asarray(self.index.embeddings[row]), k)

    def _embedding(self, query: Query) -> np.ndarray:
        """`[dim]` embedding of a query, computed by the thread for it."""
        if query.image is None:
            return self.embedder.submit(self.embed_words, query.words or "").result()
        return self.embedder.submit(self._embed, query).result()

    def _embed(self, query: Query) -> np.ndarray:
        with one_thread():  # with many users there are many small computations at once
            embedding: np.ndarray = embed_queries(self.index, [query], load=self.load)[0]
        if time.monotonic() - self._released > RELEASED_EVERY:
            release_freed_memory()  # otherwise each of the server's threads keeps some
            self._released = time.monotonic()
        return embedding

    def folders(self) -> list[str]:
        """Folders and other sources of the images, in alphabetical order, at most `MAX_FOLDERS`."""
        parents = {os.path.dirname(name) for name in self.index.entries["id"].to_pylist()}
        return sorted(parents - {""})[:MAX_FOLDERS]

    def splits(self) -> list[str]:
        """Splits of the images."""
        return sorted(name for name in self.index.entries["split"].unique().to_pylist() if name)

    def captions(self) -> list[str]:
        """First caption of each image that has captions."""
        return [several[0] for several in self.index.entries["captions"].to_pylist() if several]

    def examples(self) -> list[str]:
        """Example queries: captions from all over the index."""
        captions = self.captions()
        if not captions:
            return list(GENERAL_EXAMPLES)
        step = max(1, len(captions) // EXAMPLES)
        return list(dict.fromkeys(captions[::step]))[:EXAMPLES]


def _is_shown_again(thumbnail: Path) -> bool:
    """Whether there is a thumbnail; it is marked as recently shown."""
    try:
        os.utime(thumbnail)
    except FileNotFoundError:
        return False
    return True


def _name(id: str) -> str:
    return PurePath(id).name


def _caption(match: Match) -> str:
    """What is written below the thumbnail of an image that was found."""
    chance = "" if match.chance is None else f", {percent(match.chance)}{' ?' if is_weak(match.chance) else ''}"
    return f"{match.score:.3f}{chance}  {_name(match.name)}"


def _status(matches: list[Match], candidates: int) -> str:
    """How many images were found among all candidates, and whether they fit."""
    sentences = [f"Best {len(matches)} of {candidates:,} images."] if matches else []
    if all(is_weak(match.chance) for match in matches):
        sentences.append(f"{NOTHING[0].upper()}{NOTHING[1:]} in more than {percent(AUTO)} of all cases.")
    if any(match.chance is not None for match in matches):
        sentences.append(f"{CHANCE_NOTE}.")
    return " ".join(sentences)
