"""Recall of a validation with captions that belong to several images counted as right for all of them."""

from typing import Any

from torch import Tensor

from ...evaluation.metrics import DIRECTIONS, metrics_of_ranks, ranks
from ...evaluation.shared import find_shared_texts
from ..run import TrainingRun


def recall_with_shared(run: TrainingRun, embeddings: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any] | None:
    """Recall with equal captions and groups counted as right, for the log and the model card.

    Copies of an image under other names are not looked for: that would read all images again.

    Args:
        run: the run, on its main process.
        embeddings: image and text embeddings of the validation split, and the row of each text's image.

    Returns:
        The number of captions that belong to several images as `texts`, and `metrics`; None without such captions.
    """
    images, texts, text_image_id = embeddings
    split = run.validation_split.select(run.bad_images.good_rows("validation"))
    groups = list(split["group"]) if "group" in split.column_names else None
    shared = find_shared_texts(list(split["captions"]), text_image_id, groups)
    if shared is None:
        return None
    rank_of = {}
    for direction in DIRECTIONS:
        queries, answers = (texts, images) if direction == "text_to_image" else (images, texts)
        rank_of[direction] = ranks(queries, answers, *shared.sides(direction))
    metrics = metrics_of_ranks(rank_of)
    run.say(
        f"  with the {shared.texts} captions that belong to several images counted as right for all of these: rsum "
        f"{metrics['rsum']:.1f}"
    )
    return {"texts": shared.texts, "metrics": metrics}
