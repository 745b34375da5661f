"""On a CPU nothing fails when memory is short: the kernel kills the process. So what a step takes is counted.

What autograd keeps for the backward pass is most of the memory of a step. It grows during the forward pass and is
known exactly, so that a step that does not fit is stopped long before its end. The outputs of frozen layers, which are
not kept, come on top.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...inference.fit import PER_OUTPUT, each_output
from ...utils.memory import USABLE, NotEnoughMemory

# Bytes that a step takes at its peak for each byte that autograd keeps: gradients of activations, and the gaps between
# tensors, come on top. EfficientNet-Lite0 and MiniLM take 94 MiB per image and caption, of which 79 are kept.
PER_KEPT = 1.25


def bytes_to_come(model: nn.Module, has_moments: bool) -> int:
    """Bytes that trained parameters will take in addition: gradients, and AdamW's two moments if it has none yet."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return trained if has_moments else 3 * trained


def most_of_step(free: int, processes: int, to_come: int) -> int:
    """Bytes that a step may take in each process.

    Args:
        free: bytes that are free on the machine.
        processes: processes that share them.
        to_come: bytes that the parameters of each process will take.
    """
    return max(0, int(USABLE * free / processes) - to_come)


def bytes_of_pixels(batch: dict[str, Any], images: int) -> int:
    """What the pixels of some images of a batch take as float32 in two memory layouts; 0 for stored features."""
    pixels = batch.get("pixel_values")
    return 0 if pixels is None else 2 * 4 * pixels[0].numel() * images


@contextmanager
def step_within(most: int, model: nn.Module, at_once: int = 0) -> Iterator[None]:
    """Within the block, a step takes about this many bytes at most, besides parameters and buffers.

    Args:
        most: most bytes.
        model: model whose parameters and buffers do not count.
        at_once: bytes that the step takes in any case before it keeps anything.

    Raises:
        NotEnoughMemory: it would take more; raised out of the forward pass, or at the start.
    """
    known = (*model.parameters(), *model.buffers())
    counted = _Counted(most, (tensor.untyped_storage().data_ptr() for tensor in known))
    if at_once > most:
        raise counted.too_much()
    with each_output(counted.note), torch.autograd.graph.saved_tensors_hooks(counted.add, _Holder.held):
        yield


class _Counted:
    """The memory that autograd holds at the moment, and the largest output of a layer so far.

    Tensors with common memory count once.

    Args:
        most: most bytes that a step may take.
        known: addresses that do not count.
    """

    def __init__(self, most: int, known: Iterable[int]):
        self.most, self.known = most, frozenset(known)
        self.bytes = self.largest = 0
        self.holders: Counter[int] = Counter()  # of each address

    def add(self, tensor: Tensor) -> "_Holder":
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.known:
            return _Holder(tensor, None, 0, 0)
        if not self.holders[address]:
            self.bytes += size
        self.holders[address] += 1
        holder = _Holder(tensor, self, address, size)
        self.check()
        return holder

    def note(self, output: int) -> None:
        """Count an output of this many bytes, which autograd may not keep."""
        self.largest = max(self.largest, output)
        self.check()

    def check(self) -> None:
        if PER_KEPT * self.bytes + PER_OUTPUT * self.largest > self.most:
            raise self.too_much()

    def too_much(self) -> NotEnoughMemory:
        return NotEnoughMemory(f"the step would take more than {self.most} bytes")

    def remove(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            self.bytes -= size


class _Holder:
    """What autograd holds in the place of a tensor, until the backward pass has used it."""

    __slots__ = ("address", "counted", "size", "tensor")

    def __init__(self, tensor: Tensor, counted: _Counted | None, address: int, size: int):
        self.tensor = tensor.detach()  # with its history, the tensor would hold itself
        self.counted, self.address, self.size = counted, address, size

    def held(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        if self.counted is not None:
            self.counted.remove(self.address, self.size)
