"""One batch over all processes: embeddings gathered with their gradient, and the loss of the global batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..modeling_miniclip import symmetric_contrastive_loss


class _GatherWithGradient(torch.autograd.Function):
    """All processes' rows, in the order of the ranks; the gradient of each row goes back to the process it is from."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather_rows(local, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)  # each process has the gradient of its own loss terms; together they are the whole
        rank, counts = dist.get_rank(), ctx.counts
        start = sum(counts[:rank])
        return gradient[start : start + counts[rank]], None


def _all_gather_rows(local: Tensor, counts: list[int]) -> Tensor:
    padded = local.new_zeros((max(counts), *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_rows(local: Tensor, with_gradient: bool = False) -> Tensor:
    """The rows of all processes, uneven numbers allowed; with one process the tensor itself.

    Args:
        local: `[n, ...]`, n may differ from process to process.
        with_gradient: let gradients flow back to the rows' own processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    if with_gradient:
        return _GatherWithGradient.apply(local, sizes)
    return _all_gather_rows(local.detach().contiguous(), sizes)


def largest(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather_lists(local: list[Any], device: torch.device) -> list[Any]:
    """The items of all processes' lists, in the order of the ranks; one number is sent where all lists are empty."""
    if not (dist.is_available() and dist.is_initialized()) or largest(len(local), device) == 0:
        return local
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP spread over the processes as one; any other as it is. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP spread over the processes; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the first one's buffers: batch-norm statistics differ, each process having seen its share.

    So that what is validated is what is exported.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def global_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_id: Tensor,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: Tensor | None = None,
) -> Tensor:
    """This process's part of the loss over the global batch.

    The sum of the parts over the processes is the loss of one process with the whole batch, and so are the gradients:
    similarities of local rows with the gathered columns are computed once in the whole system, and the memory of a
    process is local x global. Rows with a negative id are fillers and count for nothing.

    Args:
        image_embeds: `[b, dim]`, unit norm, of this process.
        text_embeds: `[n, dim]`, unit norm, of this process.
        logit_scale: inverse temperature.
        image_id: `[b]`.
        text_image_id: `[n]`.
        loss_type: that of the model's configuration.
        logit_bias: of the sigmoid loss.

    Returns:
        Scalar; its mean over processes times their number is the loss.
    """
    # Indexing by a mask also with nothing to drop keeps a filler's embeddings in the graph, as DDP needs.
    image_embeds, image_id = image_embeds[image_id >= 0], image_id[image_id >= 0]
    text_embeds, text_image_id = text_embeds[text_image_id >= 0], text_image_id[text_image_id >= 0]
    whole = (gather_rows(image_embeds, True), gather_rows(text_embeds, True), gather_rows(image_id),
             gather_rows(text_image_id))  # fmt: skip
    return symmetric_contrastive_loss(
        image_embeds, text_embeds, logit_scale, image_id, text_image_id, loss_type, logit_bias, whole
    )
