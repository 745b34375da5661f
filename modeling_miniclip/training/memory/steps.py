"""A step that does not fit into memory is repeated in chunks, with the same random numbers.

On an accelerator, and where a process has a limit, an allocation fails; on a CPU, `activations.py` stops a step before
the kernel would kill the process. Either way the chunk is halved, until the step fits in all processes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ...errors import MiniClipError
from ...utils.memory import free_memory, is_out_of_memory, release_memory
from ...utils.performance import release_freed_memory
from ..command_line.arguments import LOWER_BOUNDS
from ..command_line.recipes import save_arguments
from ..grad_cache import random_state, set_random_state, trained_norms
from ..processes.distributed import all_reduce_max
from ..resuming.resume_rules import recorded_flags
from ..run import TrainingRun
from .activations import bytes_of_pixels, bytes_to_come, most_of_step, step_within
from .agreement import Agreement, average_gradients
from .sizes import size_of

FEWEST = LOWER_BOUNDS["chunk_size"]
# Their forward pass exchanges weights, layer by layer: a process cannot leave it without leaving the others waiting.
SPREADS_WEIGHTS = (DistributedType.FSDP, DistributedType.DEEPSPEED)

# A context for the block in which processes exchange embeddings.
Exchange = Callable[[], AbstractContextManager[None]]
# Computes a step: the run, this process's share of the batch, the model to call, and where processes exchange.
Compute = Callable[[TrainingRun, dict[str, Any], nn.Module, Exchange], Tensor]


def compute_step(run: TrainingRun, batch: dict[str, Any], compute: Compute) -> Tensor:
    """Loss and gradients of a step, in chunks, or in smaller ones, if memory is too short for it.

    With several processes, the first steps and each that is larger than all before are attempts, which all processes
    repeat in chunks of half as many images if one of them fails. If another step fails, the run ends. A single process
    repeats any step.

    Args:
        run: run whose model gets the gradients. If chunks are needed, its arguments name their size from now on.
        batch: this process's share of the batch; it may lose its pixels.
        compute: function that computes the loss, and adds the gradients to `.grad`.

    Returns:
        This process's part of the loss.

    Raises:
        MiniClipError: not even the smallest chunk fits, or a step failed that cannot be repeated.
    """
    accelerator = run.accelerator
    device, several = accelerator.device, accelerator.num_processes > 1
    size, can_repeat = size_of(batch), accelerator.distributed_type not in SPREADS_WEIGHTS
    is_new = can_repeat and all_reduce_max(int(not run.sizes.fits(size)), device) > 0
    if not can_repeat or (several and not is_new):
        with _says_what_helps(run):
            return compute(run, batch, run.model, nullcontext)
    most, first = all_reduce_max(size[0], device) if is_new else size[0], run.arguments.chunk_size
    before = random_state(device)
    while (loss := _attempt(run, batch, compute, is_new, most)) is None:
        _halve(run, most)
    batch.pop("pixel_values", None)
    if run.optimizer.state:  # else its moments will take memory, too, from now on
        run.sizes.add(size)
    if run.arguments.chunk_size != first:
        pairs = zip(before, random_state(device), strict=True)
        draws = any(old is not None and new is not None and not torch.equal(old, new) for old, new in pairs)
        _keep_chunk_size(run, min(first or most, most), draws)
    return loss


def _attempt(run: TrainingRun, batch: dict[str, Any], compute: Compute, is_new: bool, most: int) -> Tensor | None:
    """One attempt at a step: the loss, or None if memory was too short in a process, and all is as before."""
    accelerator = run.accelerator
    # The wrapper of several processes exchanges buffers and gradients, for which a process that failed would not come.
    model = run.unwrapped_model if accelerator.num_processes > 1 else run.model
    agreement, before = Agreement(accelerator.device), _Before(run)
    watched = _watched(run, batch, most) if is_new else nullcontext()
    loss = None
    try:
        with watched:
            loss = compute(run, dict(batch), model, agreement.exchange)
    except Exception as error:  # of many classes
        if not is_out_of_memory(error):
            raise
    # Here the error is gone, and with its traceback what the step held.
    if not agreement.end(loss is not None):
        before.restore(run)
        return None
    average_gradients(model)
    return loss


def _watched(run: TrainingRun, batch: dict[str, Any], most: int) -> AbstractContextManager[None]:
    """On a CPU, the context in which a step is stopped that would take more memory than there is.

    It is an estimate, so the smallest chunk is never stopped, nor one that the user has chosen.
    """
    arguments, model = run.arguments, run.unwrapped_model
    images = min(arguments.chunk_size or most, most)
    is_compiled = arguments.compile_towers or hasattr(run.model, "_orig_mod")  # what it keeps is not seen
    if run.accelerator.device.type != "cpu" or run.sizes.is_given or is_compiled or images <= FEWEST:
        return nullcontext()
    release_freed_memory()  # else what an earlier computation has left would not count as free
    free = -all_reduce_max(-free_memory(), run.accelerator.device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", run.accelerator.num_processes))
    to_come = bytes_to_come(model, has_moments=bool(run.optimizer.state))
    return step_within(most_of_step(free, processes, to_come), model, bytes_of_pixels(batch, images))


class _Before:
    """What a failed attempt changes: random numbers, running averages, gradients."""

    def __init__(self, run: TrainingRun):
        self.random = random_state(run.accelerator.device)
        averages = (buffer for norm in trained_norms(run.unwrapped_model) for buffer in norm.buffers())
        self.averages = [(buffer, buffer.clone()) for buffer in averages]

    def restore(self, run: TrainingRun) -> None:
        set_random_state(self.random, run.accelerator.device)
        for buffer, value in self.averages:
            buffer.copy_(value)
        run.optimizer.zero_grad(set_to_none=True)
        release_memory(run.accelerator.device)


def _halve(run: TrainingRun, most: int) -> None:
    """Compute half as many images at a time from now on; `most` is the largest share of a process."""
    now = min(run.arguments.chunk_size or most, most)
    if now <= FEWEST:
        raise MiniClipError(
            f"not enough memory for a step, even with {now} images at a time: lower --image_size, --max_length or "
            "--captions_per_image, freeze a tower (--freeze), or choose smaller towers"
        )
    run.arguments = replace(run.arguments, chunk_size=max(FEWEST, -(-now // 2)))


def _keep_chunk_size(run: TrainingRun, before: int, draws: bool) -> None:
    """Let checkpoints and `arguments.yaml` name the chunk size, and say what it changes.

    Args:
        run: run whose arguments have it.
        before: images that did not fit.
        draws: whether a step draws random numbers.
    """
    if run.fingerprint is not None:
        run.fingerprint.flags = recorded_flags(run.arguments)
    if run.accelerator.is_main_process and not run.arguments.overfit_batch:  # which writes nothing
        save_arguments(run.arguments, run.output_dir / "arguments.yaml")
    has_norms = bool(trained_norms(run.unwrapped_model))
    run.say(describe_chunks(before, run.arguments.chunk_size or before, draws, has_norms))


def describe_chunks(before: int, now: int, draws: bool, has_norms: bool) -> str:
    """One line about a smaller chunk.

    Args:
        before: images that did not fit.
        now: images of a chunk.
        draws: whether a step draws random numbers, as dropout does.
        has_norms: whether batch norms are trained.
    """
    changes = [f"batch norms see {now} images at a time"] * has_norms + ["dropout draws other masks"] * draws
    effect = f"which changes the run: {' and '.join(changes)}" if changes else "with the gradients of the whole step"
    return (
        f"not enough memory for {before} images at a time: {now} from now on (--chunk_size {now}), each computed "
        f"twice, {effect}"
    )


@contextmanager
def _says_what_helps(run: TrainingRun) -> Iterator[None]:
    """Within the block, an error about too little memory names the flag that helps.

    Raises:
        MiniClipError: memory was too short.
    """
    try:
        yield
    except Exception as error:  # of many classes
        if not is_out_of_memory(error):
            raise
        images = run.arguments.chunk_size or -(-run.arguments.batch_size // run.accelerator.num_processes)
        raise MiniClipError(
            f"not enough memory for {images} images at a time: repeat the command with --chunk_size "
            f"{max(FEWEST, images // 2)} and --resume_from_checkpoint latest"
        ) from error
