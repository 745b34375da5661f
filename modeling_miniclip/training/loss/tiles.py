"""A loss over all pairs of texts and images, computed in tiles of the matrix of similarities.

The forward pass keeps some numbers per row and column; the backward pass computes each tile again. Memory is that of
the embeddings and one tile, as in Inf-CL (Cheng et al. 2024, "Breaking the Memory Barrier: Near Infinite Batch Size
Scaling for Contrastive Loss").
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...data.loading.pairs import Pairs
from .objectives import Objective, Tile

CPU_TILE, GPU_TILE = 1024, 8192  # side of a tile: it stays in a processor's cache, or is enough work for a GPU


class Tiles:
    """The tiles of a matrix of similarities, in the order in which they are computed.

    Args:
        text_keys: `[N + M, K]` keys of the texts, then of the additional negatives; see [`Pairs`].
        image_keys: `[B, L]` keys of the images.
        texts: N, the number of texts without the additional negatives.
        size: side of a square tile; with fewer images, a tile has more texts.
        device: device of the similarities.
    """

    def __init__(self, text_keys: Tensor, image_keys: Tensor, texts: int, size: int, device: torch.device):
        self.columns = parts(0, len(image_keys), size)
        rows = size * size // max(1, min(size, len(image_keys)))
        self.texts, self.negatives = parts(0, texts, rows), parts(texts, len(text_keys), rows)
        self.pairs, self.device = Pairs(text_keys, image_keys, self.columns), device

    def __len__(self) -> int:
        return (len(self.texts) + len(self.negatives)) * len(self.columns)

    def __iter__(self) -> Iterator[Tile]:
        for rows in (*self.texts, *self.negatives):
            for columns in self.columns:
                is_negative = rows.start >= self.negatives[0].start if self.negatives else False
                yield Tile(rows, columns, is_negative, self.pairs, self.device)


def parts(start: int, stop: int, size: int) -> list[slice]:
    """Divide a range into about equal parts of at most `size`."""
    number = -(-(stop - start) // size)
    edges = [start + (stop - start) * i // number for i in range(number)] + [stop] if number else []
    return [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]


class TiledLoss(torch.autograd.Function):
    """The sum of some objectives over all tiles, and its gradient.

    Every process passes all images, its own texts, and the same upstream gradient. It gets the gradient of the whole
    loss by its own texts, and its share of those by the images, the scale and the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        tiles: Tiles,
        objectives: Sequence[Objective],
    ) -> Tensor:
        """This process's part of the loss.

        Args:
            ctx: context of autograd.
            images: `[B, dim]`, unit norm.
            texts: `[N + M, dim]`, unit norm.
            scale: inverse temperature, one number.
            bias: what is added to all logits, one number, or None.
            tiles: the tiles of the matrix.
            objectives: what is computed from each tile.
        """
        ctx.tiles, ctx.objectives = tiles, objectives
        ctx.save_for_backward(images, texts, scale, bias)
        scaled, is_single = images * scale, len(tiles) == 1
        for tile in tiles:
            logits = _logits(texts, scaled, bias, None if is_single else tile)
            for objective in objectives:
                objective.add(logits, tile)
        ctx.only = (tile, logits, scaled) if is_single else None  # one tile is kept, not computed again
        loss = objectives[0].finish()
        for objective in objectives[1:]:
            loss = loss + objective.finish()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by the arguments of `forward`."""
        images, texts, scale, bias = ctx.saved_tensors
        if ctx.only is not None:
            tile, logits, scaled = ctx.only
            gradient = _gradient(ctx.objectives, logits, tile).mul_(upstream)
            of_texts, of_scaled = gradient @ scaled, gradient.t() @ texts
            of_bias = None if bias is None else gradient.sum().view_as(bias)
        else:
            scaled = images * scale
            of_texts, of_scaled = torch.zeros_like(texts), torch.zeros_like(images)
            of_bias = None if bias is None else torch.zeros_like(bias)
            for tile in ctx.tiles:
                gradient = _gradient(ctx.objectives, _logits(texts, scaled, bias, tile), tile)
                of_texts[tile.rows].addmm_(gradient, scaled[tile.columns])
                of_scaled[tile.columns].addmm_(gradient.t(), texts[tile.rows])
                if of_bias is not None:
                    of_bias += gradient.sum()
            for found in (of_texts, of_scaled, *([] if of_bias is None else [of_bias])):
                found.mul_(upstream)
        of_scale = (images * of_scaled).sum().view_as(scale)
        return of_scaled.mul_(scale), of_texts, of_scale, of_bias, None, None


def _gradient(objectives: Sequence[Objective], logits: Tensor, tile: Tile) -> Tensor:
    """`[r, c]`, the derivative of the sum of the objectives by the logits of a tile."""
    gradient = objectives[0].gradient(logits, tile)
    for objective in objectives[1:]:
        gradient += objective.gradient(logits, tile)
    return gradient


def _logits(texts: Tensor, images: Tensor, bias: Tensor | None, tile: Tile | None) -> Tensor:
    """`[r, c]`, the logits of a tile, or of all."""
    if tile is not None:
        texts, images = texts[tile.rows], images[tile.columns]
    return texts @ images.t() if bias is None else torch.addmm(bias, texts, images.t())
