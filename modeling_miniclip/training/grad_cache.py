"""A step of any batch size in the memory of a chunk: gradients cached at the embeddings.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache): embed all
chunks without a graph, take the loss and its gradient with regard to all embeddings, then embed each chunk once more,
with its graph, and hand it its part of that gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.dataset import FILLER
from ..modeling_miniclip import MiniClipOutput
from .distributed import largest

ROWS = ("image_embeds", "text_embeds")  # of the model's output: one row an image or text
SCALARS = ("logit_scale", "logit_bias")  # and what is the same for every chunk, where the model has it


def split_batch(batch: dict[str, Tensor], chunk_size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Views of a collated batch: at most `chunk_size` images each, and as even a share of its texts.

    Every process gets the same number of chunks, as those who gather parameters for each forward pass have to. One
    that lost so many images that a chunk would be empty repeats its first image and text, as fillers.

    Args:
        batch: of `batches.Collator`.
        chunk_size: images a chunk, at least 2: shares that differ by one image then never leave a chunk empty.
        device: of the processes' communication.
    """
    rows = len(batch["image_id"])
    parts = -(-largest(rows, device) // chunk_size)
    if rows < parts:
        batch = {name: torch.cat([tensor, tensor[:1].expand(parts - rows, *tensor.shape[1:])])
                 for name, tensor in batch.items()}  # fmt: skip
        for name in ("image_id", "text_image_id"):
            batch[name][-(parts - rows) :] = FILLER
    pieces = {name: tensor.tensor_split(parts) for name, tensor in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def backward_in_chunks(
    accelerator: Any,
    model: nn.Module,
    chunks: list[dict[str, Tensor]],
    inputs_of: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    loss_of: Callable[[MiniClipOutput], Tensor],
) -> Tensor:
    """The loss of a batch, with the gradients of the parameters added to their `.grad`.

    Dropout draws the same masks in both passes. Batch norm in training mode normalises by the statistics of a chunk,
    and takes each chunk into its running averages once.

    Args:
        accelerator: that prepared the model; its precision and its synchronisation apply.
        model: as prepared.
        chunks: of [`split_batch`].
        inputs_of: from a chunk to the model's keyword arguments, on the device.
        loss_of: from an output with the embeddings of all chunks to this process's part of the loss; the parts are
            summed over the processes.

    Returns:
        Scalar without graph.
    """
    embedded, states = [], []
    with torch.no_grad(), _running_statistics_kept(model):
        for chunk in chunks:
            states.append(_random_state(accelerator.device))
            output = model(**inputs_of(chunk))
            # Not the towers' feature maps, which would fill the memory.
            embedded.append({name: output[name] for name in (*ROWS, *SCALARS) if output.get(name) is not None})
    leaves = {name: torch.cat([part[name] for part in embedded]) for name in ROWS}
    scalars = [name for name in SCALARS if name in embedded[0]]
    leaves |= {name: embedded[0][name] for name in scalars}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    loss = loss_of(MiniClipOutput(**leaves))
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    start = dict.fromkeys(ROWS, 0)
    for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = i == len(chunks) - 1
        # Only the last chunk's gradients have to wait for the other processes.
        with nullcontext() if is_last else accelerator.no_sync(model), _replayed(state, accelerator.device):
            output = model(**inputs_of(chunk))
            dots = []  # dot products with the cached gradients have these very gradients
            for name in ROWS:
                end = start[name] + len(output[name])
                dots.append((output[name] * gradients[name][start[name] : end]).sum())
                start[name] = end
            if is_last:
                dots += [(output[name] * gradients[name]).sum() for name in scalars]
            accelerator.backward(torch.stack(dots).sum() * accelerator.num_processes)
    return loss.detach()


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode go on normalising by the batch at hand, but do not take it into their averages."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return torch.get_rng_state(), on_device


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers as they came from `state` on; afterwards the generators are as they were before the block."""
    devices = [] if device.type == "cpu" else [torch.get_device_module(device).current_device()]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.get_device_module(device).set_rng_state(state[1])
        yield
