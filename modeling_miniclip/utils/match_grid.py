"""The two pictures of a run: its curves, and what it finds for queries of the validation split."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageFont
from torch import Tensor

from ..errors import printable
from ..evaluation.metrics import RECALL_AT
from ..processing_miniclip import to_rgb

INK, GREY, GRID, FRAME = "#1a202c", "#718096", "#e2e8f0", "#cbd5e0"
BLUE, ORANGE, PURPLE, GREEN = "#2b6cb0", "#dd6b20", "#805ad5", "#15803d"
# (image, label under it, whether it is the right one)
Found = tuple[Image.Image, str, bool]


class MatchRow(NamedTuple):
    """A query, a remark on how it went (or nothing), and the images found for it, best first."""

    query: str
    remark: str
    found: list[Found]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- curves ---------------------------------------------------------------------------------------------------------


def draw_curves(metrics: list[dict[str, Any]], target: Path, best_step: int | None = None) -> None:
    """Loss, recall, learning rates and temperature over the steps of a run, as a PNG.

    Args:
        metrics: lines of `metrics.jsonl`.
        target: file to write.
        best_step: step of the exported model, marked with a vertical line.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    train = [line for line in metrics if line["split"] == "train"]
    validation = [line for line in metrics if line["split"] == "validation"]
    figure = Figure(figsize=(12, 7), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    panels = loss, recall, rate, scale = tuple(figure.subplots(2, 2).flat)
    _draw_loss(loss, train, validation)
    _draw_recall(recall, validation)
    _draw_rates(rate, train)
    scale.set_title("Inverse temperature (logit scale)")
    _line(scale, train, "logit_scale", PURPLE)
    for axes in panels:
        _finish(axes, best_step, "exported model" if axes in panels[:2] else "")
    figure.savefig(target, dpi=110)


def _draw_loss(axes: Any, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    axes.set_title("Contrastive loss (nats)")
    # Not comparable in height: a batch and a whole split differ in their number of candidates.
    _line(axes, train, "loss", BLUE, "training, among a batch")
    _line(axes, validation, "loss", ORANGE, "validation, among the whole split", marker="o")


def _draw_recall(axes: Any, validation: list[dict[str, Any]]) -> None:
    """Both directions in a colour each; the three K are named at the right end of their lines."""
    axes.set_title("Validation recall (%)")
    for name, color in (("text_to_image", BLUE), ("image_to_text", ORANGE)):
        for k, style in zip(RECALL_AT, ("-", "--", ":"), strict=True):
            label = name.replace("_", " ") if style == "-" else ""
            _line(axes, validation, f"{name}_R@{k}", color, label, marker="o", linestyle=style)
    if not validation:
        return
    axes.set_ylim(bottom=0)
    last = validation[-1]
    top, lowest = axes.get_ylim()[1], -1.0
    for k in RECALL_AT:
        height = (last[f"text_to_image_R@{k}"] + last[f"image_to_text_R@{k}"]) / 2
        lowest = max(height, lowest + 0.06 * top)  # labels of lines that lie together do not cover each other
        at = (1.01, lowest)
        axes.annotate(f"R@{k}", at, xycoords=axes.get_yaxis_transform(), va="center", fontsize=9, color=GREY)


def _draw_rates(axes: Any, train: list[dict[str, Any]]) -> None:
    axes.set_title("Learning rate")
    names_of: dict[tuple[float, ...], list[str]] = {}  # equal rates are one line with several names
    for key in (key for key in (train[-1] if train else {}) if key.endswith("learning_rate")):
        values = tuple(line.get(key, 0.0) for line in train)
        names_of.setdefault(values, []).append(key)
    for keys, color in zip(names_of.values(), (BLUE, ORANGE, PURPLE), strict=False):
        label = ", ".join(key.removesuffix("_learning_rate").replace("_", " ") for key in keys)
        _line(axes, train, keys[0], color, label)
    rates = [rate for values in names_of for rate in values if rate > 0]
    if rates:
        axes.set_yscale("log")
        # A cosine that ends at zero would fill the panel with its tail.
        axes.set_ylim(max(min(rates), max(rates) / 1000) / 2, max(rates) * 2)


def _line(axes: Any, lines: list[dict[str, Any]], key: str, color: str, label: str = "", **style: Any) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        style.setdefault("marker", "o" if len(points) < 5 else None)  # a line of one point is not seen
        axes.plot(*zip(*points, strict=True), label=label, color=color, markersize=3.5, linewidth=1.6, **style)


def _finish(axes: Any, best_step: int | None, best_label: str) -> None:
    axes.set_title(axes.get_title(), loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_title("")
    axes.tick_params(colors=GREY, labelsize=9, length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimiser step", fontsize=9, color=GREY)
    if best_step is not None:
        axes.axvline(best_step, color=GREEN, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5, label=best_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, labelcolor=INK)


# --- matches --------------------------------------------------------------------------------------------------------


def example_queries(captions: list[list[str]], count: int) -> list[tuple[int, str]]:
    """`count` rows evenly spread over a split, each with its first caption: the queries of `retrieval.png`."""
    count = min(count, len(captions))
    rows = [i * len(captions) // count for i in range(count)]
    return [(row, captions[row][0]) for row in rows]


def match_rows(
    queries: list[tuple[int, str]], scores: Tensor, image_at: Callable[[int], Image.Image], top: int = 6
) -> list[MatchRow]:
    """Rows for [`draw_matches`]: each query's best images with their scores, and the rank of the right one.

    Args:
        queries: (row of the right image, text).
        scores: `[queries, images]` cosine similarities.
        image_at: gives the image of a row.
        top: images a query.
    """
    rows = []
    for (right, text), score in zip(queries, scores, strict=True):
        best = score.topk(min(top, len(score))).indices.tolist()
        rank = int((~(score < score[right])).sum())  # ties count against the model, as in the metrics
        found = [(image_at(i), f"{score[i]:.2f}", i == right) for i in best]
        rows.append(MatchRow(text, f"right image: rank {rank:,} of {len(score):,}", found))
    return rows


# Measures of the grid in inches.
DPI = 120
MARGIN, GAP, LABEL, LINE = 0.2, 0.12, 0.22, 0.19


def draw_matches(target: Path, rows: list[MatchRow], heading: str = "") -> None:
    """A grid, one row a query with its text at the left and the found images in order; the right one is framed green.

    A single query stands above its images, three in a line. Captions are drawn as they are, never as markup.

    Args:
        target: PNG file to write.
        rows: queries with their images.
        heading: text above the grid.

    Raises:
        ValueError: no query, or none with an image.
    """
    rows = [MatchRow(_lines_of(query), remark, found) for query, remark, found in rows]
    if not any(row.found for row in rows):
        raise ValueError("nothing to draw: no images were found")
    if len(rows) == 1:
        query, remark, found = rows[0]
        lines = [MatchRow("", "", found[i : i + 3]) for i in range(0, len(found), 3)]
        _draw_grid(target, lines, "\n".join(part for part in (heading, query, remark) if part), 2.0, 0.0)
    else:
        _draw_grid(target, rows, heading, 1.45, 2.7)


def _lines_of(text: str) -> str:
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
        seen = any(is_right for *_, is_right in found)
        write(MARGIN, start + LINE * len(words) + 0.04, remark, va="top", fontsize=8.5, color=GREEN if seen else GREY)
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
    figure.savefig(target)


def _wrap(text: str, width: float, most_lines: int, points: int, weight: str = "normal") -> list[str]:
    """Lines that are no wider than `width` inches, the last one ending in an ellipsis where text was left out."""
    from matplotlib.font_manager import FontProperties, findfont

    font = ImageFont.truetype(findfont(FontProperties(weight=weight)), points * DPI / 72)
    parts = text[:2000].split("\n")
    characters = max(int(width * 40), 1)  # of the narrowest letters
    lines = [""]
    while characters > 0:
        lines = [line for part in parts for line in textwrap.wrap(part, characters)]
        if len(lines) > most_lines:
            lines = [*lines[: most_lines - 1], lines[most_lines - 1][: characters - 2].rstrip() + " …"]
        if all(font.getlength(line) <= 0.97 * width * DPI for line in lines):  # matplotlib rounds each letter
            break
        characters -= 1
    return lines


def _draw_image(figure: Any, image: Image.Image, place: tuple[float, float, float], is_right: bool) -> None:
    """An image in the middle of a square tile, at the pixels of the picture, with a frame around it."""
    from matplotlib.patches import Rectangle

    x, y, tile = place
    ratio = tile * DPI / max(image.size)
    size = (max(round(image.width * ratio), 4), max(round(image.height * ratio), 4))  # more than its frame
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
