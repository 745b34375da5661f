"""How many pairs a batch has. The loss of a model that cannot distinguish them, and the least one, depend on it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes.distributed import add_over_processes
from .batch_rows import rows_of_batch


@dataclass(frozen=True)
class PairCounts:
    """Numbers of a batch over all processes.

    Args:
        images: number of images.
        texts: number of texts without additional negatives.
        compared: number of images and texts that are compared, negatives included.
        pairs: number of these that belong together.
        log_of_texts: mean over the texts of the logarithm of the number of images that each belongs to.
        log_of_images: mean over the images of the logarithm of the number of texts that each belongs to.
        log_candidates: mean over the images of the logarithm of the number of texts that each is compared with.
    """

    images: float
    texts: float
    compared: float
    pairs: float
    log_of_texts: float
    log_of_images: float
    log_candidates: float


def plain_counts(images: float, texts: float) -> PairCounts:
    """Counts of a batch in which each image has the same number of texts, which belong to no other image."""
    return PairCounts(images, texts, images * texts, texts, 0.0, math.log(texts / images), math.log(texts))


def count_pairs(
    image_id: Tensor,
    text_image_id: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    is_negative: Tensor | None = None,
    tile: int | None = None,
) -> PairCounts:
    """Count the pairs of a batch, which are those of `global_contrastive_loss`, whose arguments these are.

    Every process must call it with its share of the batch, and gets the same counts. Memory is that of a tile.
    """
    rows = rows_of_batch(image_id, text_image_id, image_keys, text_keys, is_negative, tile)
    negatives = len(text_image_id if rows.texts is None else rows.texts) - rows.own_texts
    of_texts = torch.zeros(rows.own_texts, device=image_id.device)
    of_images, excluded = of_texts.new_zeros(2, rows.all_images)
    for each in rows.tiles:
        height, width = each.rows.stop - each.rows.start, each.columns.stop - each.columns.start
        by_image = torch.bincount(each.pairs % width, minlength=width)
        if each.is_negative:
            excluded[each.columns] += by_image
        else:
            of_images[each.columns] += by_image
            of_texts[each.rows] += torch.bincount(each.pairs // width, minlength=height)
    own = of_texts.new_tensor([rows.own_texts, negatives, of_texts.clamp(min=1).log().sum().item()])
    counted = add_over_processes(torch.cat([own, of_images, excluded])).cpu().double()
    all_texts, all_negatives, logs = counted[:3].tolist()
    of_images, excluded = counted[3:].view(2, -1)
    candidates = all_texts + all_negatives - excluded
    return PairCounts(
        images=rows.all_images,
        texts=all_texts,
        compared=candidates.sum().item(),
        pairs=of_images.sum().item(),
        log_of_texts=logs / max(1.0, all_texts),
        log_of_images=of_images.clamp(min=1).log().mean().item(),
        log_candidates=candidates.clamp(min=1).log().mean().item(),
    )


def counts_of_batch(batch: Mapping[str, Tensor], images: int, device: torch.device) -> PairCounts:
    """Counts of the global batch; every process must call it with its share.

    Args:
        batch: this process's share, collated.
        images: number of images in the global batch.
        device: device for the communication between processes.
    """
    names = ("image_keys", "text_keys", "is_negative")
    image_keys, text_keys, is_negative = (batch[name].to(device) if name in batch else None for name in names)
    if image_keys is None and text_keys is None and is_negative is None:
        return plain_counts(images, images * len(batch["text_image_id"]) / len(batch["image_id"]))
    ids = batch["image_id"].to(device), batch["text_image_id"].to(device)
    return count_pairs(*ids, image_keys, text_keys, is_negative)
