"""A picture of text queries and the images found for them, one query per row."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageFont
from torch import Tensor

from ..errors import printable
from ..pictures_miniclip import to_rgb
from .files import replaced_file

INK, GREY, GRID, FRAME = "#1a202c", "#718096", "#e2e8f0", "#cbd5e0"
BLUE, ORANGE, PURPLE, GREEN = "#2b6cb0", "#dd6b20", "#805ad5", "#15803d"

# Sizes in inches.
MARGIN, GAP, LABEL, LINE = 0.2, 0.12, 0.22, 0.19
DPI = 120


class LabelledImage(NamedTuple):
    """An image of the grid, the label under it, and whether it is the right answer."""

    image: Image.Image
    label: str
    is_right: bool


class MatchRow(NamedTuple):
    """A query, a remark under it (may be empty), and the images found for it, best first."""

    query: str
    remark: str
    found: list[LabelledImage]


def match_rows(
    queries: list[tuple[int, str]], scores: Tensor, image_at: Callable[[int], Image.Image], top: int = 6
) -> list[MatchRow]:
    """Rows for [`draw_matches`]: the best images of each query with their scores, and the rank of the right image.

    Args:
        queries: pairs of the right image's column in `scores` and the text.
        scores: `[queries, images]` cosine similarities.
        image_at: function that returns the image of a column.
        top: number of images per query.
    """
    rows = []
    for (right, text), score in zip(queries, scores, strict=True):
        best = score.topk(min(top, len(score))).indices.tolist()
        rank = int((~(score < score[right])).sum())  # ties count against the model, as in the metrics
        found = [LabelledImage(image_at(i), f"{score[i]:.2f}", i == right) for i in best]
        rows.append(MatchRow(text, f"right image: rank {rank:,} of {len(score):,}", found))
    return rows


def draw_matches(target: Path, rows: list[MatchRow], heading: str = "") -> None:
    """Draw a grid with one row per query: its text on the left, then its images. The right image has a green frame.

    A single query is drawn above its images, three per line. Captions are drawn literally, never as markup.

    Args:
        target: PNG file to write.
        rows: queries with their images.
        heading: text above the grid.

    Raises:
        ValueError: there is no query, or none of them has an image.
    """
    rows = [MatchRow(_printable_lines(query), remark, found) for query, remark, found in rows]
    if not any(row.found for row in rows):
        raise ValueError("nothing to draw: no images were found")
    if len(rows) == 1:
        query, remark, found = rows[0]
        lines = [MatchRow("", "", found[i : i + 3]) for i in range(0, len(found), 3)]
        _draw_grid(target, lines, "\n".join(part for part in (heading, query, remark) if part), 2.0, 0.0)
    else:
        _draw_grid(target, rows, heading, 1.45, 2.7)


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _draw_grid(target: Path, rows: list[MatchRow], heading: str, tile: float, text_width: float) -> None:
    from matplotlib.figure import Figure

    columns = max(len(row.found) for row in rows)
    width = max(2 * MARGIN + text_width + columns * (tile + GAP) - GAP, 4.5)
    title = _wrap(heading, width - 2 * MARGIN, 5, 11, "bold")
    top = MARGIN + (len(title) * LINE * 1.15 + GAP if title else 0.0)
    row_height = tile + LABEL + GAP
    figure = Figure(figsize=(width, top + len(rows) * row_height + MARGIN - GAP), dpi=DPI)
    height = figure.get_figheight()

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, parse_math=False, **style)

    if title:
        write(MARGIN, MARGIN, "\n".join(title), va="top", fontsize=11, fontweight="bold", color=INK, linespacing=1.3)
    for i, (query, remark, found) in enumerate(rows):
        y = top + i * row_height
        words = _wrap(query, text_width - GAP, 6, 10)
        start = y + (tile - LINE * (len(words) + bool(remark))) / 2
        write(MARGIN, start, "\n".join(words), va="top", fontsize=10, color=INK, linespacing=1.25)
        color = GREEN if any(item.is_right for item in found) else GREY
        write(MARGIN, start + LINE * len(words) + 0.04, remark, va="top", fontsize=8.5, color=color)
        for j, (image, label, is_right) in enumerate(found):
            x = MARGIN + text_width + j * (tile + GAP)
            _draw_image(figure, image, (x, y, tile), is_right)
            style = {"color": GREEN, "fontweight": "bold"} if is_right else {"color": GREY}
            write(
                x + tile / 2,
                y + tile + 0.07,
                printable(label) + " ✓" * is_right,
                ha="center",
                va="top",
                fontsize=8.5,
                **style,
            )
    with replaced_file(target) as fresh:
        figure.savefig(fresh, format=target.suffix[1:] or "png")


def _wrap(text: str, width: float, most_lines: int, points: int, weight: str = "normal") -> list[str]:
    """Lines no wider than `width` inches; the last one ends in an ellipsis if text was left out."""
    from matplotlib.font_manager import FontProperties, findfont

    font = ImageFont.truetype(findfont(FontProperties(weight=weight)), points * DPI / 72)
    parts = text[:2000].split("\n")
    characters = max(int(width * 40), 1)  # number of the narrowest letters that fit
    lines = [""]
    while characters > 0:
        lines = [line for part in parts for line in textwrap.wrap(part, characters)]
        if len(lines) > most_lines:
            lines = [*lines[: most_lines - 1], lines[most_lines - 1][: characters - 2].rstrip() + " …"]
        # Not the full width, because matplotlib rounds the width of each letter.
        if all(font.getlength(line) <= 0.97 * width * DPI for line in lines):
            break
        characters -= 1
    return lines


def _draw_image(figure: Any, image: Image.Image, place: tuple[float, float, float], is_right: bool) -> None:
    """Draw a framed image in the middle of a square tile, aligned to the pixels of the picture."""
    from matplotlib.patches import Rectangle

    x, y, tile = place
    ratio = tile * DPI / max(image.size)
    size = (max(round(image.width * ratio), 4), max(round(image.height * ratio), 4))  # wider than its frame
    image = image if image.mode == "RGB" else to_rgb(image)
    width, height = figure.get_size_inches()
    left, bottom = x + (tile - size[0] / DPI) / 2, height - y - (tile + size[1] / DPI) / 2
    axes = figure.add_axes(
        (left / width, bottom / height, size[0] / DPI / width, size[1] / DPI / height), frame_on=False
    )
    axes.set_axis_off()
    axes.imshow(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), aspect="auto", interpolation="none")
    color, line = (GREEN, 4) if is_right else (FRAME, 0.8)
    axes.add_patch(
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, clip_on=False, edgecolor=color, linewidth=line)
    )
