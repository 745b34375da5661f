"""Exponential moving average of the weights; with `--ema_decay` it is validated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """Averages of all that training changes: trainable parameters, and buffers such as batch-norm statistics.

    After step t the average moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)), with the warm-up of
    TensorFlow's `ExponentialMovingAverage`, so that the random start of a short run has no weight. Frozen towers are
    not copied.

    Args:
        model: model on its device.
        decay: decay in [0, 1); with 0 the average is the current weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        moving = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self.current: dict[str, Tensor] = trained | moving  # the model's tensors, changed in place by each step
        self.averages = {name: tensor.clone() for name, tensor in self.current.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.averages.values()), list(self.current.values()), self.steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has its averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self.current.items():
            held = tensor.clone()
            tensor.copy_(self.averages[name])
            self.averages[name].copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """State for `accelerator.register_for_checkpointing`."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`][AveragedWeights.state_dict] returned."""
        self.steps = state["steps"]
        for name, tensor in self.averages.items():
            tensor.copy_(state["averages"][name])
