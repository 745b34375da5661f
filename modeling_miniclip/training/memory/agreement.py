"""Several processes take a step together: all succeed, or none does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import MiniClipError
from ...utils.memory import NotEnoughMemory, is_out_of_memory
from ..processes.distributed import all_reduce_max, process_count


class Agreement:
    """Where the processes of a run find out whether one of them had too little memory in an attempt at a step.

    They meet before the loss, for which they exchange embeddings, and at the end. A process that failed before the
    first of these meets the others there and leaves; they follow it.

    Args:
        device: device for the communication between processes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.has_failed = False

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Within the block, every process is there to exchange embeddings.

        Raises:
            NotEnoughMemory: another process has failed.
            MiniClipError: this process had too little memory for the exchange itself, which the others wait for.
        """
        if process_count() == 1:
            yield
            return
        if all_reduce_max(0, self.device):
            self.has_failed = True
            raise NotEnoughMemory("another process has too little memory")
        try:
            # What the loss keeps is small. A count (activations.py) that stopped here would leave the others waiting.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _itself):
                yield
        except Exception as error:  # of many classes
            if is_out_of_memory(error):
                raise MiniClipError(
                    "not enough memory to compare the embeddings of all processes: lower --batch_size, or use more "
                    "processes"
                ) from error
            raise

    def end(self, succeeded: bool) -> bool:
        """Whether all processes succeeded, as this one did or not; each must ask once after an attempt."""
        if self.has_failed:
            return False  # all know
        return not all_reduce_max(int(not succeeded), self.device)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace gradients by their means over the processes, as DistributedDataParallel does in the backward pass."""
    world_size = process_count()
    if world_size == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.div_(world_size).contiguous()
            dist.all_reduce(gradient)
            if gradient.data_ptr() != parameter.grad.data_ptr():  # its memory has another order
                parameter.grad.copy_(gradient)


def _itself(held: Tensor) -> Tensor:
    return held
