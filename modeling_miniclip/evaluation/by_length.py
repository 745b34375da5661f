"""Recall from text to image by the length of the caption."""

from typing import Any

import torch
from torch import Tensor

from .metrics import named_intervals, resampled_recalls

GROUPS = 4
FEWEST = 20  # captions of a group


def recall_by_length(texts: list[str], rank: Tensor, image_of: Tensor, at: tuple[int, ...]) -> dict[str, Any]:
    """Recall of captions in up to four groups of similar length, each with about as many captions as the others.

    Args:
        texts: captions.
        rank: `[texts]`, rank of the image of each.
        image_of: `[texts]`, row of that image.
        at: values of K.

    Returns:
        `unit`, `words` or, for captions without spaces, `characters`; and `groups`, shortest first: each with the
        lengths `from` and `to`, the number of `texts`, their `metrics` in percent by name, such as `R@1`, and 95 %
        `intervals` from a bootstrap over images.
    """
    words = [len(text.split()) for text in texts]
    unit = "characters" if 2 * sum(count > 1 for count in words) < len(texts) else "words"
    length = torch.tensor(words if unit == "words" else [len(text) for text in texts])
    names, groups = [f"R@{k}" for k in at], []
    for low, high in group_edges(length):
        rows = (length >= low) & (length <= high)
        images, image_row = image_of[rows].unique(return_inverse=True)
        found, owner = {"": rank[rows]}, {"": image_row}
        values = [100 * (rank[rows] <= k).double().mean().item() for k in at]
        groups.append(
            {
                "from": low,
                "to": high,
                "texts": int(rows.sum()),
                "metrics": dict(zip(names, values, strict=True)),
                "intervals": named_intervals(names, resampled_recalls(found, owner, len(images), at), None),
            }
        )
    return {"unit": unit, "groups": groups}


def group_edges(length: Tensor) -> list[tuple[int, int]]:
    """First and last length of each group; equal lengths are in one group."""
    count = max(1, min(GROUPS, len(length) // FEWEST))
    cuts = length.sort().values[[len(length) * i // count for i in range(1, count)]].unique().tolist()
    lowest, highest = int(length.min()), int(length.max())
    starts = [lowest, *(cut for cut in cuts if cut > lowest)]
    return list(zip(starts, [start - 1 for start in starts[1:]] + [highest], strict=True))


def length_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of `by_caption_length` and, if there is one, `baseline_by_caption_length`."""
    ours, theirs = report["by_caption_length"], report.get("baseline_by_caption_length")
    models = [report["model"]] + ([report["baseline"]] if theirs else [])
    names = list(ours["groups"][0]["metrics"])
    head = [f"{ours['unit']} per caption", "captions", *(f"{model} {name}" for model in models for name in names)]
    if theirs is None:
        head = head[:2] + names
    rows = []
    for i, group in enumerate(ours["groups"]):
        sides = [group] + ([theirs["groups"][i]] if theirs else [])
        cells = [_cell(side, name) for side in sides for name in names]
        span = f"{group['from']}" if group["from"] == group["to"] else f"{group['from']} to {group['to']}"
        rows.append([span, f"{group['texts']:,}", *cells])
    return head, rows


def _cell(group: dict[str, Any], name: str) -> str:
    low, high = group["intervals"][name]
    return f"{group['metrics'][name]:.1f} [{low:.1f}, {high:.1f}]"
