"""The training loss of a batch that is spread over processes, exact for any number of them.

An image and a text belong together if the image's id is that of the text, or if they share any other key. An
additional negative is a candidate in the image-to-text direction for every image, as in NegCLIP (Yuksekgonul et al.
2023, "When and Why Vision-Language Models Behave like Bags-of-Words"), but not for those with which it shares a key.
It is never a query, whatever its `text_image_id`. Rows with a negative id are fillers and are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..processes.distributed import add_over_processes, gather_rows, process_count
from .batch_rows import BatchRows, rows_of_batch, take
from .objectives import Distillation, Objective, Sigmoid, Sizes, Softmax
from .tiles import TiledLoss


@dataclass
class Teacher:
    """Embeddings of the batch by another model, whose similarities the student learns.

    Args:
        image_embeds: `[b, width]`, unit norm, of the images of this process.
        text_embeds: `[n, width]`, unit norm, of the texts of this process; those of negatives do not matter.
        scale: inverse temperature of the teacher's similarities.
        weight: weight of the distillation, above 0; that of the contrastive loss is 1.

    Attributes:
        divergence: this process's part of what the loss adds to the contrastive one, without the weight: the mean
            divergence of the student's distributions from the teacher's, in nats. Set by the loss.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    scale: float
    weight: float
    divergence: Tensor | None = field(default=None, init=False)


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
    by exactly one process, which compares its texts with all images in tiles. All pass the same optional arguments.

    Args:
        image_embeds: `[b, dim]`, unit norm, images of this process.
        text_embeds: `[n, dim]`, unit norm, texts of this process.
        logit_scale: inverse temperature.
        image_id: `[b]` ids of the images; ids and keys of one process may be on the CPU, to save waiting for a GPU.
        text_image_id: `[n]` id of each text's image.
        loss_type: loss type of the model's configuration.
        logit_bias: bias of the sigmoid loss.
        image_keys: `[b, K]` int64, further keys of the images, as many as the process likes, made by
            [`pair_key`][modeling_miniclip.data.loading.pair_keys.pair_key]; `NO_KEY` fills shorter rows.
        text_keys: `[n, L]` int64, further keys of the texts.
        is_negative: `[n]` bool, which texts are additional negatives.
        prefixes: for Matryoshka embeddings (Kusupati et al. 2022), the weight of each length: the loss is the weighted
            mean of those of the normalised first dimensions.
        teacher: embeddings of a teacher; for each prefix, the student's softmax is pulled towards the teacher's.
        tile: side of a tile; by default, it depends on the device.

    Returns:
        Scalar; the loss is the sum over the processes.
    """
    rows = rows_of_batch(image_id, text_image_id, image_keys, text_keys, is_negative, tile, image_embeds.device)
    images, texts = gather_rows(take(image_embeds, rows.images), True), take(text_embeds, rows.texts)
    sizes = _sizes(rows, images)
    taught = None if teacher is None else _taught(teacher, rows)
    bias = logit_bias if loss_type == "sigmoid" else None
    prefixes = prefixes or {images.shape[1]: 1.0}
    losses: list[Tensor] = []
    distillations: list[Distillation] = []
    for dim, weight in prefixes.items():
        share = weight / sum(prefixes.values())
        if teacher is not None and taught is not None:
            distillations.append(Distillation(sizes, share * teacher.weight, *taught, images))
        objectives = [_objective(loss_type, sizes, share, images), *distillations[-1:]]
        both = _first(images, dim), _first(texts, dim)
        losses.append(TiledLoss.apply(*both, logit_scale, bias, rows.tiles, objectives))
    if teacher is not None:
        teacher.divergence = torch.stack([each.found for each in distillations]).sum() / teacher.weight
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _taught(teacher: Teacher, rows: BatchRows) -> tuple[Tensor, Tensor]:
    """The teacher's embeddings of this process's texts, times its inverse temperature, and of all images."""
    of_texts = take(teacher.text_embeds, rows.texts) * teacher.scale
    return of_texts, gather_rows(take(teacher.image_embeds, rows.images))


def _sizes(rows: BatchRows, like: Tensor) -> Sizes:
    """Sizes of the batch over all processes."""
    processes, texts = process_count(), rows.own_texts
    if processes > 1:
        texts = int(add_over_processes(torch.tensor([texts], device=like.device)))
    return Sizes(rows.all_images, texts, rows.own_texts, processes)


def _objective(loss_type: str, sizes: Sizes, weight: float, like: Tensor) -> Objective:
    if loss_type == "sigmoid":
        return Sigmoid(sizes, weight, like)
    return Softmax(sizes, loss_type == "softmax_mean", weight, like)


def _first(embeds: Tensor, dim: int) -> Tensor:
    """The first dimensions, normalised."""
    return embeds if dim == embeds.shape[1] else normalize(embeds[:, :dim], dim=-1)
