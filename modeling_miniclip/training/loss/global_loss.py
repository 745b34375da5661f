"""The training loss of a batch that is spread over processes, exact for any number of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...data.loading.pair_keys import NO_KEY
from ..processes.distributed import add_over_processes, all_reduce_max, gather_rows, process_count
from .objectives import Distillation, Objective, Sigmoid, Sizes, Softmax
from .tiles import CPU_TILE, GPU_TILE, TiledLoss, Tiles


@dataclass
class Teacher:
    """Embeddings of the batch by another model, whose similarities the student learns.

    Args:
        image_embeds: `[b, width]`, unit norm, of the images of this process.
        text_embeds: `[n, width]`, unit norm, of the texts of this process; those of negatives do not matter.
        scale: inverse temperature of the teacher's similarities.
        weight: weight of the distillation; that of the contrastive loss is 1.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    scale: float
    weight: float


def global_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_id: Tensor,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: Tensor | None = None,
    *,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    is_negative: Tensor | None = None,
    prefixes: Mapping[int, float] | None = None,
    teacher: Teacher | None = None,
    tile: int | None = None,
) -> Tensor:
    """This process's part of the loss over the global batch.

    The sum of the parts over the processes is the loss of one process with the whole batch, and the same holds for the
    gradients, if all processes multiply their part by the same number before `backward`. Each similarity is computed
    by exactly one process, which compares its texts with all images in tiles. Rows with a negative id are fillers and
    are ignored. Every process must pass the same optional arguments.

    An image and a text belong together if the image's id is that of the text, or if they share any other key. An
    additional negative is a candidate in the image-to-text direction for every image, as in NegCLIP (Yuksekgonul et
    al. 2023, "When and Why Vision-Language Models Behave like Bags-of-Words"), but not for those with which it shares
    a key. It is never a query, whatever its `text_image_id`.

    Args:
        image_embeds: `[b, dim]`, unit norm, images of this process.
        text_embeds: `[n, dim]`, unit norm, texts of this process.
        logit_scale: inverse temperature.
        image_id: `[b]` ids of the images.
        text_image_id: `[n]` id of each text's image.
        loss_type: loss type of the model's configuration.
        logit_bias: bias of the sigmoid loss.
        image_keys: `[b, K]` int64, further keys of the images, as many as the process likes, made by
            [`pair_key`][modeling_miniclip.data.loading.pair_keys.pair_key]; `NO_KEY` fills shorter rows.
        text_keys: `[n, L]` int64, further keys of the texts.
        is_negative: `[n]` bool, which texts are additional negatives.
        prefixes: for Matryoshka embeddings (Kusupati et al. 2022), the weight of each length: the loss is the weighted
            mean of those of the normalised first dimensions.
        teacher: embeddings of a teacher. For each prefix, the student's softmax over all texts and over all images is
            pulled towards the teacher's.
        tile: side of a tile; by default, it depends on the device.

    Returns:
        Scalar; the loss is the sum over the processes.
    """
    kept, kept_texts, own_texts = _rows_in_order(image_id, text_image_id, is_negative)
    images, texts = gather_rows(image_embeds[kept], True), text_embeds[kept_texts]
    all_keys = _image_keys(image_id[kept], None if image_keys is None else image_keys[kept])
    own_keys = _text_keys(text_image_id, text_keys, is_negative)[kept_texts]
    size = tile or (CPU_TILE if images.device.type == "cpu" else GPU_TILE)
    tiles = Tiles(own_keys, all_keys, own_texts, size)

    counted = add_over_processes(torch.tensor([own_texts], device=images.device))
    sizes = Sizes(len(images), int(counted), own_texts, process_count())
    if teacher is not None:
        taught = (teacher.text_embeds[kept_texts] * teacher.scale, gather_rows(teacher.image_embeds[kept]))
    bias = logit_bias if loss_type == "sigmoid" else None
    prefixes = prefixes or {images.shape[1]: 1.0}
    loss = images.new_zeros(())
    for dim, weight in prefixes.items():
        share = weight / sum(prefixes.values())
        objectives = [_objective(loss_type, sizes, share, images)]
        if teacher is not None:
            objectives.append(Distillation(sizes, share * teacher.weight, *taught, images))
        loss = loss + TiledLoss.apply(_first(images, dim), _first(texts, dim), logit_scale, bias, tiles, objectives)
    return loss


def _objective(loss_type: str, sizes: Sizes, weight: float, like: Tensor) -> Objective:
    if loss_type == "sigmoid":
        return Sigmoid(sizes, weight, like)
    return Softmax(sizes, loss_type == "softmax_mean", weight, like)


def _first(embeds: Tensor, dim: int) -> Tensor:
    """The first dimensions, normalised."""
    return embeds if dim == embeds.shape[1] else normalize(embeds[:, :dim], dim=-1)


def _rows_in_order(
    image_id: Tensor, text_image_id: Tensor, is_negative: Tensor | None
) -> tuple[Tensor | slice, Tensor | slice, int]:
    """The images and the texts that are no fillers, additional negatives last, and the number of the other texts.

    If these are all rows as they come, they are a slice, which copies nothing.
    """
    kept: list[Tensor | slice] = []
    for ids in (image_id, text_image_id):
        is_filler = ids < 0
        kept.append((~is_filler).nonzero().squeeze(1) if is_filler.any() else slice(0, len(ids)))
    if is_negative is None or not is_negative.any():
        texts = kept[1].stop if isinstance(kept[1], slice) else len(kept[1])
        return kept[0], kept[1], texts
    order = torch.arange(len(text_image_id), device=is_negative.device)[kept[1]]
    order = order[is_negative[order].int().argsort(stable=True)]
    return kept[0], order, int((~is_negative[order]).sum())


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
