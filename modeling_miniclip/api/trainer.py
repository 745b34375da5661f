"""For transformers' `Trainer`: a collator, a loss over the batches of all processes, and recall."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..evaluation.metrics import retrieval_metrics
from ..processing_miniclip import MiniClipProcessor
from ..training.loss.global_loss import global_contrastive_loss
from ..training.processes.distributed import process_count

PROCESS = 2**40  # distance of the ids of two processes that number their images from 0


class PairCollator:
    """Turns rows of captioned images into the batch of a `MiniClipModel` that computes its loss.

    For `Trainer(data_collator=...)`, with `remove_unused_columns=False` in its arguments.

    Args:
        processor: processor of the model.
        captions_per_image: most captions of an image in a batch.
        random_captions: whether to draw them each time; False takes the first ones.

    Returns from a call:
        `pixel_values` `[B, 3, H, W]`, `input_ids` and `attention_mask` `[N, L]`, `image_id` `[B]` and `text_image_id`
        `[N]`, and `return_loss=True`. Rows with the same value in their column `image_id` show the same image, in
        whichever process they are.

    Raises:
        ValueError: a row has no image or no caption.
    """

    def __init__(self, processor: MiniClipProcessor, captions_per_image: int = 1, random_captions: bool = False):
        self.processor = processor
        self.captions_per_image, self.random_captions = captions_per_image, random_captions

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        captions = [self._draw(_captions(row)) for row in rows]
        if nameless := next((row for row in rows if row.get("image") is None), None):
            raise ValueError(f"a row without an image: it has {', '.join(nameless)}; name its column image")
        ids = torch.tensor([_number(row["image_id"]) if "image_id" in row else i for i, row in enumerate(rows)])
        counts = torch.tensor([len(texts) for texts in captions])
        batch = self.processor(
            images=[row["image"] for row in rows],
            text=[text for texts in captions for text in texts],
            return_tensors="pt",
        )
        return {**batch, "image_id": ids, "text_image_id": ids.repeat_interleave(counts), "return_loss": True}

    def _draw(self, captions: list[str]) -> list[str]:
        if not self.random_captions:
            return captions[: self.captions_per_image]
        order = torch.randperm(len(captions))[: self.captions_per_image]
        return [captions[i] for i in order.tolist()]


def _captions(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row: its column `captions` or `caption`, a text or a list of texts."""
    found = next((row[name] for name in ("captions", "caption") if row.get(name)), None)
    if not found:
        raise ValueError(f"a row without a caption: it has {', '.join(row)}; name its column caption or captions")
    return [found] if isinstance(found, str) else list(found)


def _number(image_id: Any) -> int:
    """A number that stands for an image in every process; never one of the first numbers."""
    digest = blake2b(str(image_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 2 | PROCESS


def gathered_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_id: Tensor,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: Tensor | None = None,
) -> Tensor:
    """The loss of the batch of all processes, for `model.loss_function`, under which `Trainer` trains as the script.

    With one process, it is [`symmetric_contrastive_loss`]. With several, the mean of what the processes return is the
    loss of the whole batch, and so are its gradients, of which DistributedDataParallel (and FSDP and DeepSpeed)
    take the mean. Every process must compute it equally often.

    Args:
        image_embeds: `[b, dim]`, unit norm, images of this process.
        text_embeds: `[n, dim]`, unit norm, texts of this process.
        logit_scale: inverse temperature.
        image_id: `[b]` ids of the images, the same in all processes for the same image; 0, 1, ..., b - 1, as where the
            model gets no ids, are ids within this process.
        text_image_id: `[n]` ids of the texts' images.
        loss_type: loss type of the model's configuration.
        logit_bias: bias of the sigmoid loss.

    Returns:
        Scalar in nats.

    Examples:
        >>> model.loss_function = gathered_loss  # doctest: +SKIP
    """
    processes = process_count()
    if processes > 1 and torch.equal(image_id, torch.arange(len(image_id), device=image_id.device)):
        image_id, text_image_id = (ids + PROCESS * (dist.get_rank() + 1) for ids in (image_id, text_image_id))
    part = global_contrastive_loss(
        image_embeds.float(), text_embeds.float(), logit_scale, image_id, text_image_id, loss_type, logit_bias
    )
    return part * processes


def recall_of_prediction(prediction: Any) -> dict[str, float]:
    """Recall of an evaluation by `Trainer`, for its `compute_metrics`.

    Args:
        prediction: `EvalPrediction` with the embeddings of all texts and of all images as predictions; each image has
            the same number of texts, which follow each other.

    Returns:
        The metrics of [`retrieval_metrics`].

    Raises:
        ValueError: images have different numbers of texts.
    """
    texts, images = (torch.as_tensor(part) for part in prediction.predictions[:2])
    if not len(images) or len(texts) % len(images):
        raise ValueError(
            f"{len(texts)} texts of {len(images)} images: evaluate with the same number of captions for each image"
        )
    return retrieval_metrics(images, texts, torch.arange(len(images)).repeat_interleave(len(texts) // len(images)))
