"""Which texts and images belong together: those that share a key, such as the image's id or a hash of the caption.

This is not transitive: an image may share one key with a text, and another key with a second text that does not share
any with the first image's other texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .pair_keys import NO_KEY

COMPARED = 2**16  # comparisons of keys that take less time than sorting them


class Pairs:
    """Finds the pairs of a tile. Memory is that of the keys and of the tile, however many pairs there are.

    Args:
        text_keys: `[N, K]` int64 keys of the texts, or [`NO_KEY`].
        image_keys: `[B, L]` int64 keys of the images, or [`NO_KEY`], except for the first one of each image.
        columns: the parts that the images are divided into.
    """

    def __init__(self, text_keys: Tensor, image_keys: Tensor, columns: Sequence[slice]):
        if image_keys.shape[1] > 1:
            text_keys = text_keys.masked_fill(text_keys == NO_KEY, NO_KEY - 1)  # no image has this one
        self.wanted, self.image_keys = text_keys, image_keys
        self.may_repeat = text_keys.shape[1] > 1 or image_keys.shape[1] > 1
        self.compares = len(columns) == 1 and text_keys.numel() * image_keys.numel() <= COMPARED
        self.by_columns: dict[int, tuple[Tensor, Tensor]] = {}
        for part in () if self.compares else columns:
            keys, order = image_keys[part].flatten().sort()
            self.by_columns[part.start] = keys, order // image_keys.shape[1]

    def compared(self, rows: slice, columns: slice) -> Tensor | None:
        """`[texts, images]` booleans, which of a tile are pairs; None if all comparisons take too long."""
        if not self.compares:
            return None
        wanted, keys = self.wanted[rows], self.image_keys[columns]
        if not self.may_repeat:
            return wanted == keys.t()
        same = wanted[:, None, :, None] == keys[None, :, None, :]  # [texts, images, K, L]
        return same.flatten(2).any(dim=2)

    def in_tile(self, rows: slice, columns: slice) -> Tensor:
        """`[P]` ascending places of the pairs in a tile `[texts, images]` that is flattened; each pair once."""
        if (same := self.compared(rows, columns)) is not None:
            return same.flatten().nonzero().squeeze(1)
        wanted = self.wanted[rows]
        keys, owner = self.by_columns[columns.start]
        bounds = torch.stack([wanted, wanted + 1], dim=-1)  # [texts, K, 2]
        first, stop = torch.searchsorted(keys, bounds).flatten(0, 1).unbind(1)
        counts = stop - first
        query = torch.repeat_interleave(counts)
        found_at = (stop - counts.cumsum(0))[query] + torch.arange(len(query), device=query.device)
        width = columns.stop - columns.start
        places = query // wanted.shape[1] * width + owner[found_at]
        if not self.may_repeat or not len(places):
            return places
        found = torch.zeros((rows.stop - rows.start) * width, dtype=torch.bool, device=places.device)
        found[places] = True
        return found.nonzero().squeeze(1)
