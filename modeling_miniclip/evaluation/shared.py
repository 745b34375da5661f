"""Texts that belong to several images, as in training: equal captions, images of a group, images with equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.loading.pair_keys import NO_KEY, keys_of_row, keys_tensor
from .metrics import BLOCK

SHARED_NOTE = (
    "shared: an image also counts as right for the captions of images of its group and of those with the same bytes, "
    "and for any caption that equals one of its own"
)


@dataclass(frozen=True)
class SharedTexts:
    """Which texts and images belong together: those that have a key in common.

    Args:
        image_keys: `[images, K]` int64, [`NO_KEY`] in shorter rows.
        text_keys: `[texts, L]` int64, filled in the same way.
        texts: number of texts that belong to another image than their own, too.
    """

    image_keys: Tensor
    text_keys: Tensor
    texts: int

    def sides(self, direction: str) -> tuple[Tensor, Tensor]:
        """Keys of the queries and of the answers of a direction."""
        texts, images = self.text_keys, self.image_keys
        return (texts, images) if direction == "text_to_image" else (images, texts)

    def belong(self, direction: str, results: Tensor) -> Tensor:
        """`[Q, top]` booleans, whether each of the `[Q, top]` answers to the queries belongs to its query."""
        queries, answers = self.sides(direction)
        found = torch.zeros(results.shape, dtype=torch.bool)
        for start in range(0, len(results), BLOCK):
            here = slice(start, start + BLOCK)
            found[here] = _have_common(queries[here, None], answers[results[here]])
        return found

    def belong_to(self, direction: str, query: int, results: Tensor) -> Tensor:
        """`[top]` booleans, whether each of the `[top]` answers to one query belongs to it."""
        queries, answers = self.sides(direction)
        return _have_common(queries[query].unsqueeze(0), answers[results])


def _have_common(keys: Tensor, others: Tensor) -> Tensor:
    """`[...]` booleans, whether any of the keys `[..., K]` is one of the others `[..., L]`."""
    same = (keys.unsqueeze(-1) == others.unsqueeze(-2)) & (keys != NO_KEY).unsqueeze(-1)  # [..., K, L]
    return same.flatten(-2).any(dim=-1)


def find_shared_texts(
    captions: Sequence[Sequence[str]],
    text_image: Tensor,
    groups: Sequence[object] | None = None,
    marks: Sequence[str | None] | None = None,
) -> SharedTexts | None:
    """Find the texts that belong to several images; None if there are none.

    Args:
        captions: the captions of each image.
        text_image: `[texts]`, row of each text's image; the texts of an image are in the order of its captions.
        groups: group of each image, None for an image without one; None if there are no groups.
        marks: what images with equal bytes have in common, such as a hash; None for an image that was not read.
    """
    of_images: list[list[int]] = []
    of_texts: list[list[int]] = []
    for row, several in enumerate(captions):
        group = None if groups is None or groups[row] is None else str(groups[row])
        keys = keys_of_row(several, range(len(several)), group=group, content=None if marks is None else marks[row])
        of_images.append([row, *keys.image])
        of_texts += ([row, *of_text] for of_text in keys.texts)
    image_keys, by_image = keys_tensor(of_images), keys_tensor(of_texts)
    text_keys = torch.empty_like(by_image)
    text_keys[text_image.argsort(stable=True)] = by_image
    values, images = image_keys.unique(return_counts=True)  # an image has each of its keys once
    is_shared = (images[torch.searchsorted(values, text_keys)] > 1) & (text_keys != NO_KEY)
    texts = int(is_shared.any(dim=1).sum())
    return SharedTexts(image_keys, text_keys, texts) if texts else None
