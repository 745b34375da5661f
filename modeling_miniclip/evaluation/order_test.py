"""Word order, measured: how often a caption scores above the same caption with words swapped."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encoders import ClipEncoder
from .order_pairs import BOX, OrderPairs

SAMPLES = 1000  # of the bootstrap
SHOWN_KINDS = 12  # in the table; the report has all
ORDER_NOTE = (
    "percentage of pairs in which the true caption scores above the false one, with its image and with another image "
    "drawn at random. A model that only prefers fluent captions wins both, so what counts is the difference"
)


@dataclass(frozen=True)
class PairScores:
    """Similarities of the captions of each pair.

    Args:
        right: `[pairs, 2]`, of the true and the false caption with the pair's image.
        wrong: `[pairs, 2]`, with another image.
    """

    right: Tensor
    wrong: Tensor

    def wins(self) -> Tensor:
        """`[pairs, 2]` float64, for the right and the wrong image: 1 if the true caption wins, 0.5 for a tie."""
        scores = torch.stack([self.right, self.wrong], dim=1).cpu().double()  # [pairs, 2, 2]
        true, false = scores.unbind(dim=2)
        return (true > false).double() + 0.5 * (true == false)


def score_pairs(
    encoder: ClipEncoder,
    pairs: OrderPairs,
    images: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> PairScores:
    """Similarities of all pairs.

    Args:
        encoder: model to test.
        pairs: pairs of captions.
        images: `[images, dim]` embeddings of the images of the pairs, if they are known already.
        batch_size: number of images per forward pass; texts are encoded four times as many at a time.
        progress: whether to show progress bars.
        seed: random seed of the other images.

    Raises:
        DataError: there is only one image, or one cannot be read.
    """
    pairs.check_images()
    if images is None:
        images = encoder.encode_images(map(pairs.open, range(len(pairs.images))), batch_size, progress)
    texts = list(dict.fromkeys(pairs.true + pairs.false))
    position = {text: i for i, text in enumerate(texts)}
    embeds = encoder.encode_texts(texts, 4 * batch_size, progress)
    captions = torch.tensor([[position[a], position[b]] for a, b in zip(pairs.true, pairs.false, strict=True)])
    image = torch.tensor(pairs.image)
    generator = torch.Generator().manual_seed(seed)
    other = (image + torch.randint(1, len(images), (len(image),), generator=generator)) % len(images)
    both = embeds[captions]  # [pairs, 2, dim]
    right, wrong = ((both * images[rows].unsqueeze(1)).sum(dim=2) for rows in (image, other))
    return PairScores(right, wrong)


def order_report(pairs: OrderPairs, scores: PairScores) -> dict[str, Any]:
    """Figures in percent with 95 % intervals from a bootstrap over images, for each kind and for all pairs.

    Returns:
        `source`; `kinds`, for each kind and for `all` the number of `pairs`, and `right_image`, `wrong_image` and
        `difference` with their `intervals`.
    """
    wins, image = scores.wins(), torch.tensor(pairs.image)
    kinds: dict[str, Any] = {}
    for kind, _ in Counter(pairs.kind).most_common():
        rows = torch.tensor([other == kind for other in pairs.kind])
        kinds[kind] = _figures(wins[rows], image[rows])
    if len(kinds) > 1:
        kinds["all"] = _figures(wins, image)
    return {"source": pairs.source, "kinds": kinds}


def _figures(wins: Tensor, image: Tensor) -> dict[str, Any]:
    """Figures of some pairs.

    Args:
        wins: `[pairs, 2]`, see [`PairScores.wins`].
        image: `[pairs]`, image of each pair.
    """
    names = ("right_image", "wrong_image", "difference")
    _, image = image.unique(return_inverse=True)
    images = int(image.max()) + 1
    won = wins.new_zeros(images, 2).index_add(0, image, wins)
    count = wins.new_zeros(images).index_add(0, image, torch.ones_like(wins[:, 0]))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(images, (images,), generator=generator) for _ in range(SAMPLES)]
    samples = torch.stack([won[rows].sum(dim=0) / count[rows].sum() for rows in drawn])  # [samples, 2]
    values, samples = (_with_difference(100 * each) for each in (wins.mean(dim=0, keepdim=True), samples))
    spans = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype), dim=0).t().tolist()
    found = dict(zip(names, values[0].tolist(), strict=True))
    return {"pairs": len(wins), **found, "intervals": dict(zip(names, spans, strict=True))}


def _with_difference(shares: Tensor) -> Tensor:
    return torch.cat([shares, shares[:, :1] - shares[:, 1:]], dim=1)


def order_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of [`order_report`]; with more than [`SHOWN_KINDS`] kinds, the most frequent ones."""
    kinds = list(report["kinds"].items())
    shown = kinds[:SHOWN_KINDS] + ([] if len(kinds) <= SHOWN_KINDS else kinds[-1:])
    rows = []
    for kind, figures in shown:
        cells = [_cell(figures, name) for name in ("right_image", "wrong_image", "difference")]
        rows.append([kind, f"{figures['pairs']:,}", *cells])
    return ["swapped", "pairs", "right image", "wrong image", "difference"], rows


def _cell(figures: dict[str, Any], name: str) -> str:
    low, high = figures["intervals"][name]
    form = "+.1f" if name == "difference" else ".1f"
    return f"{figures[name]:{form}} [{low:{form}}, {high:{form}}]"


def write_pairs(path: Path, pairs: OrderPairs, scores: PairScores, names: Sequence[str] | None = None) -> None:
    """Write all pairs with their scores as a CSV, which `--order_test` reads too.

    Args:
        path: file to write.
        pairs: pairs of captions.
        scores: their similarities.
        names: names of the images; None if they are in the pairs.
    """
    figures = torch.cat([scores.right, scores.wrong], dim=1).tolist()
    boxes = [pairs.box(image) for image in range(len(pairs.images))] if names is None else []
    has_boxes = any(box is not None for box in boxes)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["image", *(BOX if has_boxes else ()), "kind", "true_caption", "false_caption"]
        scored = ["true_score", "false_score", "true_score_other_image", "false_score_other_image"]
        writer.writerow([*head, *scored])
        for i, values in enumerate(figures):
            image = pairs.image[i]
            place = [(names or pairs.names)[image], *(_box_cells(boxes[image]) if has_boxes else ())]
            writer.writerow([*place, pairs.kind[i], pairs.true[i], pairs.false[i], *values])


def _box_cells(box: tuple[int, ...] | None) -> list[int | None]:
    """The cells of the columns [`BOX`]."""
    if box is None:
        return [None] * len(BOX)
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
