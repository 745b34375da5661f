"""Search results as an HTML page that works offline."""

from pathlib import Path

from ...errors import MiniClipError
from ...utils.files import replace_text
from ...utils.html import grid, page, thumbnail, tile
from ...utils.names import path_of
from ...utils.thumbnails import THUMBNAIL
from ..exact import Match
from ..index import ImageIndex
from .pictures import picture_of


def write_results_page(target: Path, index: ImageIndex, title: str, matches: list[Match]) -> None:
    """Write the page. A click on a picture opens its file.

    Args:
        target: HTML file; an existing one is replaced.
        index: index that was searched.
        title: the query in words.
        matches: images found, best first.

    Raises:
        MiniClipError: the file cannot be written.
    """
    lead = f"Best {len(matches)} of {len(index):,} images, found with {index.model}"
    text = page(title, grid(_tile(index, match) for match in matches), lead)
    try:
        replace_text(target, text)
    except OSError as error:
        raise MiniClipError(f"--html {target} cannot be written: {error.strerror or error}") from error


def _tile(index: ImageIndex, match: Match) -> str:
    entry, picture = index.entry(match.index), picture_of(index, match.index, THUMBNAIL)
    name = ", ".join([*(caption.rstrip(" .") for caption in entry["captions"][:1]), Path(match.name).name])
    return tile(
        f"{match.score:.3f}",
        name,
        image=thumbnail(picture) if picture else "",
        text="missing or unreadable",
        link=Path(path_of(entry["path"])).as_uri() if entry["path"] else "",
    )
