"""Embed batches in parts where memory is too short for a whole one."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..errors import MiniClipError
from ..utils.memory import USABLE, NotEnoughMemory, free_memory, is_out_of_memory, release_memory

T = TypeVar("T")

# On a CPU: memory that a forward pass takes at its peak, relative to the largest output of a module. It holds the
# input and the output of a layer, what the layer works with, and the input of a residual connection.
PER_OUTPUT = 4


class Parts:
    """Embeds batches, in parts that fit into memory, and remembers their size.

    On an accelerator, and where a process has a limit, an allocation fails; on a CPU, a forward pass is stopped before
    it takes more memory than there is. Either way the batch is embedded again in parts of half the size.

    Args:
        what: name of the rows in the plural, such as `images`.
        device: device of the model.
        report: function that prints a line.
    """

    def __init__(self, what: str, device: torch.device, report: Callable[[str], object] = warnings.warn):
        self.what, self.device, self.report = what, device, report
        self.most: int | None = None  # rows at a time; None is a whole batch
        self.fitted = 0  # most rows that fitted
        self.reported: int | None = None

    def of(self, rows: Any, embed: Callable[[Any], Tensor]) -> Tensor:
        """Embed the rows of a batch.

        Args:
            rows: rows of the batch, as a list, an array or a tensor.
            embed: function from n rows to their `[n, dim]` embeddings.

        Returns:
            `[rows, dim]`.

        Raises:
            MiniClipError: not even a single row fits.
        """
        count = len(rows)

        def embed_part(part: int, parts: int) -> Tensor:
            return embed(rows[count * part // parts : count * (part + 1) // parts])

        found = self.compute(count, embed_part)
        return found[0] if len(found) == 1 else torch.cat(found)

    def compute(self, count: int, compute: Callable[[int, int], T]) -> list[T]:
        """What a function returns for each part of a batch.

        Args:
            count: rows of the batch.
            compute: function of the number of a part and of the number of parts.
        """
        while True:
            parts = 1 if self.most is None else -(-count // self.most)
            largest = -(-count // parts)
            try:
                with self._watched(largest):
                    found = [compute(part, parts) for part in range(parts)]
            except Exception as error:  # of many classes
                if not is_out_of_memory(error):
                    raise
                if largest <= 1:
                    raise MiniClipError(
                        f"not enough memory for one of the {self.what}: close other programs, or choose a smaller "
                        "model"
                    ) from error
            else:
                self.fitted = max(self.fitted, largest)
                self._report(count)
                return found
            # Here the error is gone, and with its traceback what the forward pass held.
            release_memory(self.device)
            self.most = -(-largest // 2)

    def _report(self, count: int) -> None:
        if self.most != self.reported:
            self.report(f"not enough memory for {count} {self.what} at a time: {self.most} from now on")
            self.reported = self.most

    def _watched(self, rows: int) -> AbstractContextManager[None]:
        """On a CPU, the context in which a larger batch than all before is stopped if it does not fit.

        It is an estimate, so a single row is never stopped.
        """
        if self.device.type != "cpu" or rows <= max(1, self.fitted):
            return nullcontext()
        return outputs_within(int(USABLE * free_memory()))


@contextmanager
def outputs_within(most: int) -> Iterator[None]:
    """Within the block, a forward pass of this thread takes about this many bytes at most.

    Raises:
        NotEnoughMemory: it would take more; raised out of the forward pass.
    """

    def check(output: int) -> None:
        if PER_OUTPUT * output > most:
            raise NotEnoughMemory(f"the forward pass would take more than {most} bytes")

    with each_output(check):
        yield


@contextmanager
def each_output(note: Callable[[int], object]) -> Iterator[None]:
    """Within the block, a function gets the bytes of each output of a module in this thread."""
    thread = threading.get_ident()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # what a compiled model takes is not seen
            return
        if isinstance(output, Tensor) and threading.get_ident() == thread:
            note(output.nbytes)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's weights; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
