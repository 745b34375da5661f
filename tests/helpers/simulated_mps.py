"""Tensors that behave as those on a Mac's GPU (`mps`) in two respects: no float64, no NumPy. They are on the CPU."""

from typing import Any

import torch
from torch import Tensor

TO_CPU = (Tensor.cpu, Tensor.tolist, Tensor.item)  # what brings numbers to the CPU
TO_NUMPY = (Tensor.numpy, Tensor.__array__)


class MpsTensor(Tensor):
    """A tensor "on the device": what is computed from it is there, too, until `cpu()` or `to("cpu")`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TO_NUMPY:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func in TO_CPU or (func is Tensor.to and args[1:2] == ("cpu",)):
            plain = [arg.as_subclass(Tensor) if isinstance(arg, MpsTensor) else arg for arg in args]
            return func(*plain, **kwargs)
        found = super().__torch_function__(func, types, args, kwargs)
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, MpsTensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{getattr(func, '__name__', func)}: the MPS framework doesn't support float64")
        return found


def on_mps(tensor: Tensor) -> Tensor:
    """The tensor with the same values "on the device"."""
    return tensor.as_subclass(MpsTensor)
