"""Embeddings and numbers of other libraries as tensors or NumPy arrays. Torch is loaded only when it is needed."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def as_array(values: Any) -> np.ndarray:
    """A tensor (of any type, on any device, with or without a gradient), an array or a nested list as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return np.asarray(values.float() if str(values.dtype) == "torch.bfloat16" else values)
    if isinstance(values, list | tuple) and any(hasattr(value, "detach") for value in values):
        values = [as_array(value) for value in values]
    return np.asarray(values)


def as_tensor(values: Any) -> "Tensor":
    """A tensor as it is; an array or a nested list copied into one, as an array may be a read-only map of a file."""
    import torch

    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(as_array(values)))


def as_embeddings(*values: Any) -> "list[Tensor]":
    """Embeddings as tensors that can be multiplied: of one floating-point type, on the device of the first one.

    On `mps`, which has no float64, that is float32.
    """
    import torch

    tensors = [as_tensor(value) for value in values]
    kind = tensors[0].dtype
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    kind = kind if kind.is_floating_point else torch.float32
    device = tensors[0].device
    if device.type == "mps":
        kind = torch.float32 if kind == torch.float64 else kind
        return [tensor.to(kind).to(device) for tensor in tensors]
    return [tensor.to(device).to(kind) for tensor in tensors]
