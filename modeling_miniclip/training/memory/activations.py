"""On a CPU nothing fails when memory is short: the kernel kills the process. So what a step keeps is counted.

What autograd keeps for the backward pass is most of the memory of a step. It grows during the forward pass and is
known exactly, so that a step that does not fit is stopped long before its end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.memory import USABLE, NotEnoughMemory

# Bytes that a step takes at its peak for each byte that autograd keeps: gradients of activations, and the gaps between
# tensors, come on top. EfficientNet-Lite0 and MiniLM take 94 MiB per image and caption, of which about 57 are kept.
PER_KEPT = 2.0


def bytes_to_come(model: nn.Module, has_moments: bool) -> int:
    """Bytes that trained parameters will take in addition: gradients, and AdamW's two moments if it has none yet."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return trained if has_moments else 3 * trained


def most_kept(free: int, processes: int, to_come: int) -> int:
    """Bytes that autograd may keep in each process.

    Args:
        free: bytes that are free on the machine.
        processes: processes that share them.
        to_come: bytes that the parameters of each process will take.
    """
    return max(0, int((USABLE * free / processes - to_come) / PER_KEPT))


def bytes_of_pixels(batch: dict[str, Any], images: int) -> int:
    """What the pixels of some images of a batch take as float32 in two memory layouts; 0 for stored features."""
    pixels = batch.get("pixel_values")
    return 0 if pixels is None else 2 * 4 * pixels[0].numel() * images


@contextmanager
def kept_within(most: int, model: nn.Module, at_once: int = 0) -> Iterator[None]:
    """Within the block, autograd keeps at most this many bytes for the backward pass, besides parameters and buffers.

    Args:
        most: most bytes.
        model: model whose parameters and buffers do not count.
        at_once: bytes that the step takes in any case before it keeps anything.

    Raises:
        NotEnoughMemory: it would keep more; raised out of the forward pass, or at the start.
    """
    known = (*model.parameters(), *model.buffers())
    kept = _Kept(most, (tensor.untyped_storage().data_ptr() for tensor in known))
    if at_once > most:
        raise kept.too_much()
    with torch.autograd.graph.saved_tensors_hooks(kept.add, _Holder.held):
        yield


class _Kept:
    """The memory that autograd holds at the moment. Tensors with common memory count once.

    Args:
        most: most bytes.
        known: addresses that do not count.
    """

    def __init__(self, most: int, known: Iterable[int]):
        self.most, self.known = most, frozenset(known)
        self.bytes = 0
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
        if self.bytes > self.most:
            raise self.too_much()
        return holder

    def too_much(self) -> NotEnoughMemory:
        return NotEnoughMemory(f"the step would keep more than {self.most} bytes for its backward pass")

    def remove(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            self.bytes -= size


class _Holder:
    """What autograd holds in the place of a tensor, until the backward pass has used it."""

    __slots__ = ("address", "kept", "size", "tensor")

    def __init__(self, tensor: Tensor, kept: _Kept | None, address: int, size: int):
        self.tensor = tensor.detach()  # with its history, the tensor would hold itself
        self.kept, self.address, self.size = kept, address, size

    def held(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        if self.kept is not None:
            self.kept.remove(self.address, self.size)
