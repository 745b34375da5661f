"""The rows of a batch that count, over all processes, and the tiles of their similarities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.loading.pair_keys import NO_KEY
from ..processes.distributed import all_reduce_max, gather_rows
from .tiles import CPU_TILE, GPU_TILE, Tiles


@dataclass
class BatchRows:
    """The images and the texts of a batch that are no fillers.

    Args:
        images: which images of this process these are; None if all.
        texts: which texts of this process these are, the additional negatives last; None if all as they come.
        own_texts: number of texts of this process that are no negatives.
        all_images: number of images of all processes.
        tiles: the tiles of the similarities of this process's texts with all images.
    """

    images: Tensor | None
    texts: Tensor | None
    own_texts: int
    all_images: int
    tiles: Tiles


def rows_of_batch(
    image_id: Tensor,
    text_image_id: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    is_negative: Tensor | None = None,
    tile: int | None = None,
    device: torch.device | None = None,
) -> BatchRows:
    """Find the rows of a batch that count. Every process must call it.

    The arguments are those of `global_contrastive_loss`, and the device of its embeddings (that of the ids).
    """
    device = device or image_id.device
    images, texts = _without_fillers(image_id), _without_fillers(text_image_id)
    own_texts = len(text_image_id if texts is None else texts)
    if is_negative is not None and is_negative.any():
        rows = torch.arange(len(text_image_id), device=is_negative.device) if texts is None else texts
        texts = rows[is_negative[rows].int().argsort(stable=True)]
        own_texts = int((~is_negative[texts]).sum())
    keys_of_images = _image_keys(take(image_id, images), None if image_keys is None else take(image_keys, images))
    keys_of_texts = take(_text_keys(text_image_id, text_keys, is_negative), texts)
    size = tile or (CPU_TILE if device.type == "cpu" else GPU_TILE)
    tiles = Tiles(keys_of_texts, keys_of_images, own_texts, size, device)
    return BatchRows(images, texts, own_texts, len(keys_of_images), tiles)


def take(rows: Tensor, chosen: Tensor | None) -> Tensor:
    """Some rows of a tensor; itself if all are chosen."""
    return rows if chosen is None else rows[chosen]


def _without_fillers(ids: Tensor) -> Tensor | None:
    """`[n]` places of the ids that are no fillers; None if none is a filler."""
    if not len(ids) or int(ids.min()) >= 0:
        return None
    return (ids >= 0).nonzero().squeeze(1)


def _image_keys(image_id: Tensor, keys: Tensor | None) -> Tensor:
    """`[B, 1 + K]` ids and further keys of the images of all processes."""
    ids = gather_rows(image_id).unsqueeze(1)
    if keys is None:
        return ids
    filled = keys.new_full((len(keys), all_reduce_max(keys.shape[1], keys.device)), NO_KEY)
    filled[:, : keys.shape[1]] = keys
    return torch.cat([ids, gather_rows(filled)], dim=1)


def _text_keys(text_image_id: Tensor, keys: Tensor | None, is_negative: Tensor | None) -> Tensor:
    """`[n, 1 + L]` ids and further keys of the texts; the image that a negative was made for is none of its own."""
    ids = text_image_id.unsqueeze(1)
    if is_negative is not None:
        ids = ids.masked_fill(is_negative.unsqueeze(1), NO_KEY)
    return ids if keys is None else torch.cat([ids, keys], dim=1)
