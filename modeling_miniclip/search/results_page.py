"""The images that a search found, as a page that opens without network."""

from pathlib import Path

from ..errors import MiniClipError
from ..utils.files import replace_text
from ..utils.html import grid, page, thumbnail, tile
from ..utils.thumbnails import THUMBNAIL
from .exact import Match
from .index import ImageIndex
from .pictures import picture_of


def write_results_page(target: Path, index: ImageIndex, title: str, matches: list[Match]) -> None:
    """Write the page. A click on a picture opens its file.

    Args:
        target: HTML file; one that is there is replaced.
        index: that was searched.
        title: the query in words.
        matches: best first.

    Raises:
        MiniClipError: the file cannot be written.
    """
    lead = f"The nearest {len(matches)} of {len(index):,} images, by {index.model}"
    text = page(title, grid(_tile(index, match) for match in matches), lead)
    try:
        replace_text(target, text)
    except OSError as error:
        raise MiniClipError(f"--html {target} cannot be written: {error.strerror or error}") from error


def _tile(index: ImageIndex, match: Match) -> str:
    entry, picture = index.entry(match.index), picture_of(index, match.index, THUMBNAIL)
    name = ", ".join([*(said.rstrip(" .") for said in entry["captions"][:1]), Path(match.name).name])
    return tile(
        f"{match.score:.3f}",
        name,
        image=thumbnail(picture) if picture else "",
        text="no longer there, or not to be read",
        link=Path(entry["path"]).as_uri() if entry["path"] else "",
    )
