"""Search results as an HTML page that works offline and can be shared."""

from pathlib import Path

from ...errors import MiniClipError
from ...utils.files import replace_text
from ...utils.html import grid, page, paragraph, thumbnail, tile
from ...utils.names import path_of, public_name, relative_name
from ...utils.thumbnails import THUMBNAIL
from ..exact import Match
from ..formatting import NOTHING
from ..index import ImageIndex
from ..unrelated import is_weak, percent
from .pictures import picture_of

CHANCE_NOTE = "Percentages: how often an unrelated caption scores as high; pictures that are no better are dimmed."


def write_results_page(
    target: Path, index: ImageIndex, title: str, matches: list[Match], absolute_paths: bool = False
) -> None:
    """Write the page.

    Args:
        target: HTML file; an existing one is replaced.
        index: index that was searched.
        title: the query in words.
        matches: images found, best first.
        absolute_paths: whether to name the model's folder, and to open the file of a picture that is clicked. By
            default the page does not say where they are on this machine.

    Raises:
        MiniClipError: the file cannot be written.
    """
    model = index.model if absolute_paths else public_name(index.model)
    lead = f"Best {len(matches)} of {len(index):,} images, found with {model}."
    if any(match.chance is not None for match in matches):
        lead += f" {CHANCE_NOTE}"
    tiles = grid(_tile(index, match, absolute_paths) for match in matches)
    text = page(title, tiles if matches else paragraph(f"{NOTHING[0].upper()}{NOTHING[1:]}."), lead)
    try:
        replace_text(target, text)
    except OSError as error:
        raise MiniClipError(f"--html {target} cannot be written: {error.strerror or error}") from error


def _tile(index: ImageIndex, match: Match, absolute_paths: bool) -> str:
    entry, picture = index.entry(match.index), picture_of(index, match.index, THUMBNAIL)
    place = entry["id"] if absolute_paths else relative_name(entry["id"], entry["source"] or "")
    name = ", ".join([*(caption.rstrip(" .") for caption in entry["captions"][:1]), place])
    weak = is_weak(match.chance)
    chance = "" if match.chance is None else f", {percent(match.chance)}{' ?' if weak else ''}"
    return tile(
        f"{match.score:.3f}{chance}",
        name,
        image=thumbnail(picture) if picture else "",
        text="missing or unreadable",
        mark="weak" if weak else "",
        link=Path(path_of(entry["path"])).as_uri() if absolute_paths and entry["path"] else "",
    )
