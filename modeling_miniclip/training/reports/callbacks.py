"""Functions of a Python program that a run calls while it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Callback = Callable[[int, dict[str, float]], Any]


@dataclass(frozen=True)
class Callbacks:
    """Functions that the main process calls with a step and its metrics; one that returns False ends the run.

    Args:
        on_step: called after each optimizer step, with the training metrics that were logged last, every
            `logging_steps` steps; at first there are none.
        on_validation: called after each validation, when its model has been exported if it is the best.
    """

    on_step: Callback | None = None
    on_validation: Callback | None = None


def asks_to_stop(callback: Callback | None, step: int, metrics: Mapping[str, float]) -> bool:
    """Call a function, if there is one. Whether it returned False; None and other values do not end a run."""
    answer = None if callback is None else callback(step, dict(metrics))
    return isinstance(answer, bool | np.bool_) and not answer
