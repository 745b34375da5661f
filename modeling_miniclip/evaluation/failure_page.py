"""The failure page of `miniclip eval`: a model's worst failures, and its most confident mistakes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..utils.html import grid, heading, page, section, thumbnail, tile
from .eval_sets import EvalSet
from .metrics import Ranking
from .shared import SHARED_NOTE

SHOWN = 20  # queries per list
ANSWERS = 6  # results shown per query

TITLES = {
    "text_to_image": "From text to image",
    "image_to_text": "From image to text",
    "image_to_class": "From image to class",
}
WORST = "those whose right answer ranks lowest, one query per image"
SUREST = "those with the highest-scoring wrong answer: the model was confident, or the data has duplicates"


def failure_page(
    report: dict[str, Any],
    data: EvalSet,
    rankings: dict[str, Ranking],
    figures: str,
    with_shared: Mapping[str, Ranking] | None = None,
) -> str:
    """Build an HTML page with the scores and, for each direction, both lists of failed queries.

    If texts belong to several images, a query fails if the first answer is none of those that belong to it.

    Args:
        report: report of `evaluate_model`.
        data: split that was evaluated.
        rankings: rankings of the model, by direction.
        figures: HTML table of the scores.
        with_shared: rankings with all the answers that belong to a query counted as right, if `data.shared` has them.
    """
    lead = (
        f"{report['dataset']}, split {report['split']}: {report['images']:,} images and {report['texts']:,} texts. "
        "Scores are cosine similarities; brackets hold 95 % confidence intervals (bootstrap over images)."
    )
    if with_shared is not None:
        lead += f" {SHARED_NOTE.capitalize()}."
    parts = [figures]
    for direction, ranking in rankings.items():
        rank = (with_shared or rankings)[direction].rank
        failed = int((rank > 1).sum())
        if failed == 0:
            parts.append(heading(TITLES[direction], f"All {len(rank):,} queries have a right answer at rank 1."))
            continue
        for name, note, order in (
            ("the worst failures", WORST, rank),
            ("the most confident mistakes", SUREST, ranking.scores[:, 0].masked_fill(rank == 1, -torch.inf)),
        ):
            rows = first_per_image(order, data.image_of_query(direction), rank > 1)
            about = f"{failed:,} of {len(rank):,} queries have a wrong answer at rank 1. Shown here: {note}."
            parts.append(heading(f"{TITLES[direction]}: {name}", about))
            parts += [_query(row, direction, data, ranking, int(rank[row])) for row in rows]
    return page(f"Where {report['model']} fails", "".join(parts), lead)


def first_per_image(order: torch.Tensor, image_of: torch.Tensor, failed: torch.Tensor) -> Iterator[int]:
    """Yield failed queries by descending `order`, one per image, at most [`SHOWN`].

    One per image, because captions of an image often fail together and would fill the list.

    Args:
        order: `[Q]` sort key.
        image_of: `[Q]`, row of each query's image.
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


def _query(row: int, direction: str, data: EvalSet, ranking: Ranking, shared_rank: int) -> str:
    """A failed query with its first answers; `shared_rank` is that of the first one that belongs to it."""
    from_text = direction == "text_to_image"
    (queries, query_group), (_, answer_group) = data.sides(direction)
    rights = (answer_group == query_group[row]).nonzero().flatten().tolist()
    tiles = []
    if not from_text:
        tiles.append(tile("query", data.image_ids[row], thumbnail(data.open(row))))
    results, rank = ranking.indices[row, :ANSWERS], int(ranking.rank[row])
    found = list(zip(results.tolist(), ranking.scores[row].tolist(), strict=False))
    right_label = f"right, rank {rank:,}"
    if not {index for index, _ in found} & set(rights):
        tiles.append(_answer(rights[0], right_label, "right", from_text, data))
    shared = [False] * len(found) if data.shared is None else data.shared.belong_to(direction, row, results).tolist()
    for (index, score), is_shared in zip(found, shared, strict=True):
        is_right = index in rights
        label = f"{score:.3f}" + (", also right" if is_shared and not is_right else "")
        tiles.append(_answer(index, label, "right" if is_right or is_shared else "wrong", from_text, data))
    more = f" ({shared_rank:,} with shared ones)" if shared_rank < rank else ""
    note = (
        f"{right_label}{more}, scores {ranking.right_score[row]:.3f}; the first answer scores "
        f"{ranking.scores[row, 0]:.3f}"
    )
    return section(queries[row], note, grid(tiles))


def _answer(index: int, label: str, mark: str, is_image: bool, data: EvalSet) -> str:
    if is_image:
        return tile(label, data.image_ids[index], thumbnail(data.open(index)), mark=mark)
    return tile(label, "", text=data.texts[index], mark=mark)
