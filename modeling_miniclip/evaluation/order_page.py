"""The page of the order test: pairs of captions with their scores, those first that the model gets most wrong."""

from typing import Any

import torch

from ..utils.html import grid, heading, page, section, table, thumbnail, tile
from .order_pairs import OrderPairs
from .order_test import ORDER_NOTE, PairScores, order_table

SHOWN = 12  # pairs per kind, half of them those that the model gets most wrong, half drawn at random
SHOWN_KINDS = 8


def order_page(report: dict[str, Any], pairs: OrderPairs, scores: PairScores, source: str | None = None) -> str:
    """Build an HTML page with the figures and some pairs of each kind.

    Args:
        report: report of `evaluate_model` with `order_test`.
        pairs: pairs of captions.
        scores: their similarities.
        source: what the pairs are, by default as they say themselves.
    """
    parts = [table(*order_table(report["order_test"]))]
    margin = scores.right[:, 0] - scores.right[:, 1]
    for kind in list(dict.fromkeys(pairs.kind))[:SHOWN_KINDS]:
        rows = torch.tensor([i for i, other in enumerate(pairs.kind) if other == kind])
        worst = rows[margin[rows].argsort()][: SHOWN // 2].tolist()
        drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].tolist()
        others = [row for row in drawn if row not in worst][: SHOWN // 2]
        for title, chosen in (("the worst", worst), ("drawn at random", others)):
            parts.append(heading(f"{kind}: {title}"))
            parts += [_pair(row, pairs, scores) for row in chosen]
    name = pairs.source if source is None else source
    lead = f"{name}, {report['dataset']}, {len(pairs.image):,} pairs. Figures: {ORDER_NOTE}."
    return page(f"Does {report['model']} read word order?", "".join(parts), lead)


def _pair(row: int, pairs: OrderPairs, scores: PairScores) -> str:
    true, false = scores.right[row].tolist()
    is_right = true > false
    tiles = [
        tile("image", "", thumbnail(pairs.open(pairs.image[row]))),
        tile(f"{true:.3f}", "true", text=pairs.true[row], mark="right" if is_right else ""),
        tile(f"{false:.3f}", "swapped", text=pairs.false[row], mark="" if is_right else "wrong"),
    ]
    return section(pairs.true[row], f"swapped: {pairs.false[row]}", grid(tiles))
