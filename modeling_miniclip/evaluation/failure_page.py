"""The gallery of `miniclip eval`: the worst failures of a model, and the mistakes that it was most sure of."""

from collections.abc import Iterator
from typing import Any

import torch

from ..utils.html import grid, heading, page, section, thumbnail, tile
from .eval_sets import EvalSet
from .metrics import Ranking

SHOWN = 20  # queries a list
ANSWERS = 6  # first results of a query

TITLES = {
    "text_to_image": "From text to image",
    "image_to_text": "From image to text",
    "image_to_class": "From image to class",
}
WORST = "those whose right answer comes last of all; one query an image"
SUREST = "those whose first answer is wrong but scores highest: the model was sure, or the data has twins"


def failure_page(report: dict[str, Any], data: EvalSet, rankings: dict[str, Ranking], figures: str) -> str:
    """One HTML file with the figures and, for each direction, both lists of failed queries.

    Args:
        report: of `evaluate_model`.
        data: that was searched.
        rankings: of the model's queries.
        figures: HTML of their table.
    """
    lead = (
        f"{report['dataset']}, split {report['split']}: {report['images']:,} images and {report['texts']:,} texts. "
        "Scores are cosine similarities, figures in brackets the 95 % interval of a bootstrap over images."
    )
    parts = [figures]
    for direction, ranking in rankings.items():
        failed = int((ranking.rank > 1).sum())
        if failed == 0:
            parts.append(heading(TITLES[direction], f"All {len(ranking.rank):,} queries find a right answer first."))
            continue
        for name, note, order in (
            ("the worst failures", WORST, ranking.rank),
            ("the most confident mistakes", SUREST, ranking.scores[:, 0].masked_fill(ranking.rank == 1, -torch.inf)),
        ):
            rows = first_per_image(order, data.image_of_query(direction), ranking.rank > 1)
            about = f"{failed:,} of {len(ranking.rank):,} queries do not find a right answer first; here {note}."
            parts.append(heading(f"{TITLES[direction]}: {name}", about))
            parts += [_query(row, direction, data, ranking) for row in rows]
    return page(f"Where {report['model']} fails", "".join(parts), lead)


def first_per_image(order: torch.Tensor, image_of: torch.Tensor, failed: torch.Tensor) -> Iterator[int]:
    """Failed queries by descending `order`, the first of each image, [`SHOWN`] at most.

    Args:
        order: `[Q]`.
        image_of: `[Q]`, row of each query's image: captions of an image fail together, and would fill the list.
        failed: `[Q]` booleans.
    """
    seen: set[int] = set()
    for row in order.argsort(descending=True, stable=True).tolist():
        image = int(image_of[row])
        if bool(failed[row]) and image not in seen:
            seen.add(image)
            yield row
            if len(seen) == SHOWN:
                return


def _query(row: int, direction: str, data: EvalSet, ranking: Ranking) -> str:
    from_text = direction == "text_to_image"
    (queries, query_group), (_, answer_group) = data.sides(direction)
    rights = (answer_group == query_group[row]).nonzero().flatten().tolist()
    tiles = []
    if not from_text:
        tiles.append(tile("query", data.image_ids[row], thumbnail(data.open(row))))
    found = list(zip(ranking.indices[row].tolist(), ranking.scores[row].tolist(), strict=True))[:ANSWERS]
    right_label = f"right, rank {int(ranking.rank[row]):,}"
    if not {index for index, _ in found} & set(rights):
        tiles.append(_answer(rights[0], right_label, "right", from_text, data))
    for index, score in found:
        is_right = index in rights
        tiles.append(_answer(index, f"{score:.3f}", "right" if is_right else "wrong", from_text, data))
    note = f"{right_label} with {ranking.right_score[row]:.3f}; the first answer has {ranking.scores[row, 0]:.3f}"
    return section(queries[row], note, grid(tiles))


def _answer(index: int, label: str, mark: str, is_image: bool, data: EvalSet) -> str:
    if is_image:
        return tile(label, data.image_ids[index], thumbnail(data.open(index)), mark=mark)
    return tile(label, "", text=data.texts[index], mark=mark)
