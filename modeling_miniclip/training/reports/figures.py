"""Draw a run's curves and the images that its model finds."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as UndecodedImage
from torch import Tensor

from ...evaluation.metrics import RECALL_AT, ZERO_SHOT_METRICS
from ...inference.encode import encode_batches, encode_images, encode_texts, open_image
from ...modeling_miniclip import MiniClipModel
from ...utils.files import replaced_file
from ...utils.match_grid import BLUE, FRAME, GREEN, GREY, GRID, INK, ORANGE, PURPLE, draw_matches, match_rows
from ..run import TrainingRun


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(metrics: list[dict[str, Any]], target: Path, best_step: int | None = None) -> None:
    """Loss, recall, learning rates and temperature over the steps of a run, as a PNG.

    With `--retention_dataset`, also recall on it, and with `--blend` what was measured of each blend.

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
    further = [name for name in ("retention", "blend") if any(line["split"] == name for line in metrics)]
    if further:
        figure.set_size_inches(18, 7)
    grid = figure.subplots(2, 3 if further else 2)
    panels = loss, recall, rate, scale = tuple(grid[:, :2].flat)
    _draw_loss(loss, train, validation)
    _draw_recall(recall, validation)
    _draw_rates(rate, train)
    scale.set_title("Inverse temperature (logit scale)")
    _line(scale, train, "logit_scale", PURPLE)
    for axes in panels:
        _finish(axes, best_step, "exported model" if axes in panels[:2] else "")
    if further:
        _draw_further(grid[:, 2], metrics, best_step)
    with replaced_file(target) as fresh:
        figure.savefig(fresh, dpi=110, format="png")


def _draw_loss(axes: Any, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    axes.set_title("Contrastive loss (nats)")
    # Not comparable in height: a batch and a whole split differ in their number of candidates.
    _line(axes, train, "loss", BLUE, "training, among a batch")
    _line(axes, validation, "loss", ORANGE, "validation, among the whole split", marker="o")


def _draw_recall(axes: Any, validation: list[dict[str, Any]], what: str = "Validation recall") -> None:
    """One colour per direction and one line style per K, which is named at the right end of its lines."""
    classified = any(name in line for line in validation for name in ZERO_SHOT_METRICS)
    axes.set_title(f"{what} and zero-shot accuracy (%)" if classified else f"{what} (%)")
    for name, color in (("text_to_image", BLUE), ("image_to_text", ORANGE)):
        for k, style in zip(RECALL_AT, ("-", "--", ":"), strict=True):
            label = name.replace("_", " ") if style == "-" else ""
            _line(axes, validation, f"{name}_R@{k}", color, label, marker="o", linestyle=style)
    for name, style in zip(ZERO_SHOT_METRICS, ("-", "--"), strict=True):
        label = name.replace("_", "-", 1).replace("_", " ")
        _line(axes, validation, name, PURPLE, label, marker="o", linestyle=style)
    if not validation:
        return
    axes.set_ylim(bottom=0)
    last = validation[-1]
    top, lowest = axes.get_ylim()[1], -1.0
    for k in RECALL_AT:
        height = (last[f"text_to_image_R@{k}"] + last[f"image_to_text_R@{k}"]) / 2
        lowest = max(height, lowest + 0.06 * top)  # labels of neighbouring lines must not overlap
        at = (1.01, lowest)
        axes.annotate(f"R@{k}", at, xycoords=axes.get_yaxis_transform(), va="center", fontsize=9, color=GREY)


def _draw_further(panels: Any, metrics: list[dict[str, Any]], best_step: int | None) -> None:
    """Recall on the dataset that must not be forgotten, and on blends with the model before training."""
    retained, blends = ([line for line in metrics if line["split"] == name] for name in ("retention", "blend"))
    if retained:
        _draw_recall(panels[0], retained, "Recall on the retention dataset")
        _finish(panels[0], best_step, "exported model")
    else:
        panels[0].set_axis_off()
    if not blends:
        panels[1].set_axis_off()
        return
    axes, chosen = panels[1], [line["share"] for line in metrics if line["split"] == "chosen blend"]
    axes.set_title("Blends: share of the best model")
    for key, color, label in (("rsum", BLUE, "validation, rsum"), ("retained_rsum", ORANGE, "retention, rsum")):
        _line(axes, blends, key, color, label, x="share", marker="o")
    _finish(axes, chosen[-1] if chosen else None, "exported model", "share; the rest is the model before training")


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


def _line(
    axes: Any, lines: list[dict[str, Any]], key: str, color: str, label: str = "", x: str = "step", **style: Any
) -> None:
    points = [(line[x], line[key]) for line in lines if key in line]
    if points:
        style.setdefault("marker", "o" if len(points) < 5 else None)  # a line of one point is invisible
        axes.plot(*zip(*points, strict=True), label=label, color=color, markersize=3.5, linewidth=1.6, **style)


def _finish(axes: Any, best_step: float | None, best_label: str, x_label: str = "optimizer step") -> None:
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
    if x_label == "optimizer step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_label, fontsize=9, color=GREY)
    if best_step is not None:
        axes.axvline(best_step, color=GREEN, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5, label=best_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, labelcolor=INK)


def draw_retrieval(run: TrainingRun, model: MiniClipModel, target: Path) -> None:
    """Draw validation captions with the images that the exported model finds for them.

    The features of a frozen image tower are used again, so the tower does not run.

    Args:
        run: a run with an export.
        model: the exported model, on the device of the run.
        target: PNG file to write.
    """

    def project(features: list[Tensor]) -> Tensor:
        return model(vision_pooler_output=torch.stack(features).to(model.device)).image_embeds

    good = run.bad_images.good_rows("validation")
    split = run.validation_split.select(good).cast_column("image", UndecodedImage(decode=False))
    features = run.validation_image_features()  # [rows, width]
    if features is None:
        images = encode_images(model, (row["image"] for row in split), run.processor, progress=False)
    else:
        images = encode_batches(model, features.take(good), project, 256, "images", progress=False)
    queries = example_queries(split, 6)
    texts = encode_texts(model, [text for _, text in queries], run.processor, progress=False)
    rows = match_rows(queries, texts @ images.T, lambda i: open_image(split[i]["image"]))
    draw_matches(target, rows, "Validation captions and the images found for them")


def example_queries(split: Dataset, count: int) -> list[tuple[int, str]]:
    """`count` rows evenly spread over a split, each with its first caption: the queries of `retrieval.png`."""
    count = min(count, len(split))
    rows = [i * len(split) // count for i in range(count)]
    return [(row, captions[0]) for row, captions in zip(rows, split.select(rows)["captions"], strict=True)]
