"""Train one batch on several processes: gather embeddings with their gradients, and add up numbers."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import MiniClipError
from ...modeling_miniclip import MiniClipModel
from .deepspeed import gathered

T = TypeVar("T")


class _GatherWithGradient(torch.autograd.Function):
    """Rows of all processes in rank order; the gradient of each row goes back to the process that it came from."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _all_gather_rows(local, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)  # each process has the gradient of its own loss terms; their sum is the whole
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
    """Rows of all processes in rank order; with one process, the tensor itself.

    Args:
        local: `[n, ...]` rows of this process; n may differ between processes.
        with_gradient: whether gradients flow back to the processes that the rows came from.

    Returns:
        `[sum of n, ...]`, the same in every process.
    """
    if process_count() == 1:
        return local
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    if with_gradient:
        return _GatherWithGradient.apply(local, sizes)
    return _all_gather_rows(local.detach().contiguous(), sizes)


def all_reduce_max(number: int, device: torch.device) -> int:
    """Maximum of a number over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def exchange_device(accelerator: Accelerator) -> torch.device:
    """Where ids and keys of a batch are: on the device if several processes exchange them.

    Those of one process stay on the CPU, which then never has to wait for a GPU to know which rows are pairs.
    """
    return accelerator.device if accelerator.num_processes > 1 else torch.device("cpu")


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_over_processes(local: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without a gradient; with one process, the tensor itself."""
    if process_count() == 1:
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total


def logsumexp_over_processes(local: Tensor) -> Tensor:
    """Logarithm of the sum of the exponentials over all processes, without a gradient, for each element."""
    if process_count() == 1:
        return local
    largest = local.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    shift = largest.masked_fill(largest == -torch.inf, 0)
    return add_over_processes((local - shift).exp()).log() + shift


def gather_lists(local: list[Any], device: torch.device) -> list[Any]:
    """Items of all processes' lists in rank order; if all lists are empty, only one number is sent."""
    if not (dist.is_available() and dist.is_initialized()) or all_reduce_max(len(local), device) == 0:
        return local
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def compute_on_main(compute: Callable[[], T], is_main: bool) -> T:
    """Compute something on rank 0 and broadcast it, so that all processes decide alike; every process must call it."""
    result: list[Any] = [compute() if is_main else None]
    return broadcast_object_list(result)[0]


def check_on_main(check: Callable[[], object], is_main: bool) -> None:
    """Check something on rank 0; every process must call it, and raises the error of the package that rank 0 found."""

    def error_of_check() -> MiniClipError | None:
        try:
            check()
        except MiniClipError as error:
            return error
        return None

    if (error := compute_on_main(error_of_check, is_main)) is not None:
        raise error


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP spread over processes; other tensors unchanged. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP or ZeRO-3 spread over processes; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def spreads_weights(model: torch.nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 spread the weights of a model, so that its forward pass needs all processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())


def scale_and_bias(model: MiniClipModel) -> tuple[float, float | None]:
    """A model's inverse temperature and the bias of its logits, None if it has none; every process must call it."""
    with gathered(model.logit_scale, model.logit_bias):
        bias = None if model.logit_bias is None else full_tensor(model.logit_bias).item()
        return full_tensor(model.inverse_temperature()).item(), bias


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Copy rank 0's buffers to all processes, so that the validated model is the exported one.

    Batch-norm statistics differ between processes, as each has seen its share of the batches.
    """
    if process_count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
