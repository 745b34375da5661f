"""The two pictures of a run: its curves, and what it finds for queries of the validation split."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

RIGHT, NEUTRAL, INK, GRID = "#1a9850", "#c8c8c8", "#333333", "#e6e6e6"
BLUE, ORANGE, PURPLE, GREY = "#2b6cb0", "#dd6b20", "#805ad5", "#718096"

# A query, and the images found for it: (image, label under it, whether it is the right one).
MatchRow = tuple[str, list[tuple[Image, str, bool]]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(metrics: list[dict[str, Any]], target: Path, best_step: int | None = None) -> None:
    """Loss, recall, learning rates and temperature over the steps of a run, as a PNG.

    Args:
        metrics: lines of `metrics.jsonl`.
        target: file to write.
        best_step: step of the exported model, marked with a vertical line.
    """
    from matplotlib.figure import Figure

    train = [line for line in metrics if line["split"] == "train"]
    validation = [line for line in metrics if line["split"] == "validation"]
    figure = Figure(figsize=(12, 7), layout="constrained")
    loss, recall, rate, scale = figure.subplots(2, 2).flat
    _lines(loss, train, {"loss": ("training batch", BLUE)}, alpha=0.6)
    _lines(loss, validation, {"loss": ("validation, whole split", ORANGE)}, marker="o")
    loss.set_title("Contrastive loss (nats; the two differ in their number of candidates)")
    _lines(
        recall, validation, {f"text_to_image_R@{k}": (f"text to image R@{k}", BLUE) for k in (1, 5, 10)}, marker="o"
    )
    _lines(
        recall, validation, {f"image_to_text_R@{k}": (f"image to text R@{k}", ORANGE) for k in (1, 5, 10)}, marker="s"
    )
    for lines in (recall.lines[:3], recall.lines[3:]):
        for line, style in zip(lines, ("-", "--", ":"), strict=False):
            line.set_linestyle(style)
    recall.set_title("Validation recall (%)")
    recall.set_ylim(bottom=0)
    rates = {
        key: (key.replace("_", " "), color)
        for key, color in zip(_rate_keys(train), (BLUE, ORANGE, PURPLE), strict=False)
    }
    _lines(rate, train, rates)
    rate.set_title("Learning rate")
    rate.set_yscale("log")
    _lines(scale, train, {"logit_scale": ("inverse temperature", PURPLE)})
    scale.set_title("Temperature (logit scale)")
    for axes in (loss, recall, rate, scale):
        axes.set_xlabel("optimiser step")
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        if best_step is not None:
            axes.axvline(
                best_step, color=GREY, linewidth=1, linestyle="--", label="exported" if axes is loss else None
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=110)


def _rate_keys(train: list[dict[str, Any]]) -> list[str]:
    return [key for key in (train[-1] if train else {}) if key.endswith("learning_rate")]


def _lines(axes: Any, lines: list[dict[str, Any]], keys: dict[str, tuple[str, str]], **style: Any) -> None:
    for key, (label, color) in keys.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, markersize=3, linewidth=1.4, **style)


def example_queries(captions: list[list[str]], count: int) -> list[tuple[int, str]]:
    """`count` rows evenly spread over a split, each with its first caption: the queries of `retrieval.png`."""
    count = min(count, len(captions))
    rows = [i * len(captions) // count for i in range(count)]
    return [(row, captions[row][0]) for row in rows]


def match_rows(
    queries: list[tuple[int, str]], scores: Tensor, image_at: Callable[[int], Image], top: int = 6
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
        rank = int((score > score[right]).sum()) + 1
        found = [(image_at(i), f"{score[i]:.2f}", i == right) for i in best]
        rows.append((f"{text}\n(right image: rank {rank} of {len(score)})", found))
    return rows


def draw_matches(target: Path, rows: list[MatchRow], heading: str = "") -> None:
    """A grid, one row a query with its text at the left and the found images in order; the right one is framed green.

    A single row is laid out over several lines of images. Captions are drawn as they are, never as markup.

    Args:
        target: PNG file to write.
        rows: queries with their images.
        heading: text above the grid.
    """
    from matplotlib.figure import Figure

    if len(rows) == 1:
        query, found = rows[0]
        columns = min(len(found), 3)
        lines = [("", found[i : i + columns]) for i in range(0, len(found), columns)]
        heading = heading or "\n".join(textwrap.wrap(query, 70))
    else:
        columns = max(len(found) for _, found in rows)
        lines = rows
    text_width = 0.0 if len(rows) == 1 else 1.9
    figure = Figure(figsize=(1.9 * columns + 1.5 * text_width, 2.05 * len(lines) + 0.5), layout="constrained")
    grid = figure.subplots(len(lines), columns + bool(text_width), squeeze=False,
                           width_ratios=[text_width] * bool(text_width) + [1] * columns)  # fmt: skip
    figure.suptitle(heading, fontsize=11, color=INK, parse_math=False)
    for (query, found), cells in zip(lines, grid, strict=True):
        for cell in cells:
            cell.set_axis_off()
        if text_width:
            text = "\n".join(line for part in query.split("\n") for line in textwrap.wrap(part, 34)[:6])
            cells[0].text(0.98, 0.5, text, ha="right", va="center", fontsize=9, color=INK, parse_math=False)
        for (image, label, is_right), cell in zip(found, cells[bool(text_width) :], strict=False):
            _draw_image(cell, image, label, is_right)
    figure.savefig(target, dpi=100)


def _draw_image(cell: Any, image: Image, label: str, is_right: bool) -> None:
    from matplotlib.patches import Rectangle

    thumbnail = image.copy()
    thumbnail.thumbnail((256, 256))
    cell.imshow(thumbnail, interpolation="antialiased" if min(thumbnail.size) > 128 else "nearest")
    width, height = thumbnail.size
    color, line = (RIGHT, 4) if is_right else (NEUTRAL, 1)
    frame = Rectangle((-0.5, -0.5), width, height, fill=False, clip_on=False, edgecolor=color, linewidth=line)
    cell.add_patch(frame)
    weight = "bold" if is_right else "normal"
    cell.set_title(label, fontsize=8, color=RIGHT if is_right else INK, fontweight=weight, parse_math=False, pad=3)
