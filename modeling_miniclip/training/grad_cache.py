"""Train with any batch size in the memory of a chunk, by caching gradients at the embeddings.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache): embed all
chunks without a graph, compute the loss and its gradient with respect to all embeddings, then embed each chunk again
with its graph and pass it its part of that gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.loading.dataset import FILLER
from ..modeling_miniclip import MiniClipOutput
from .processes.deepspeed import without_step
from .processes.distributed import all_reduce_max

ROWS = ("image_embeds", "text_embeds")  # outputs of the model with one row per image or text
SCALARS = ("logit_scale", "logit_bias")  # outputs that are the same for every chunk, if the model has them
IMAGES = ("pixel_values", "vision_pooler_output")  # inputs of the image tower or of its head
# States of the random numbers of the CPU and, if it is another one, of the device.
RandomState = tuple[Tensor, Tensor | None]


def split_batch(batch: dict[str, Tensor], chunk_size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Split a collated batch into views of at most `chunk_size` images and about as many texts each.

    Every process gets the same number of chunks, as FSDP gathers parameters for each forward pass. A process that
    skipped images, and whose chunks would otherwise be empty, repeats its first image and text as fillers.

    The pixels are taken out of the batch: when the last chunk has dropped them, their memory is free.

    Args:
        batch: batch of a `Collator`: `[B, ...]` images and ids, `[N, ...]` texts and ids.
        chunk_size: images per chunk, at least 2: the processes' shares differ by at most one image, so none gets an
            empty chunk.
        device: device for the communication between processes.
    """
    whole = dict(batch)
    batch.pop("pixel_values", None)
    rows = len(whole["image_id"])
    parts = -(-all_reduce_max(rows, device) // chunk_size)
    if rows < parts:
        whole = {name: torch.cat([tensor, tensor[:1].expand(parts - rows, *tensor.shape[1:])])
                 for name, tensor in whole.items()}  # fmt: skip
        for name in ("image_id", "text_image_id"):
            whole[name][-(parts - rows) :] = FILLER
    pieces = {name: tensor.tensor_split(parts) for name, tensor in whole.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def backward_in_chunks(
    accelerator: Accelerator,
    model: nn.Module,
    chunks: list[dict[str, Tensor]],
    inputs_of: Callable[[dict[str, Tensor]], dict[str, Any]],
    loss_of: Callable[[MiniClipOutput], Tensor],
) -> Tensor:
    """Compute the loss of a batch, and add the gradients of the parameters to their `.grad`.

    Dropout draws the same masks in both passes. Batch norm in training mode normalises with the statistics of a chunk,
    and updates its running averages with each chunk once.

    Args:
        accelerator: Accelerator that prepared the model; its precision and synchronisation apply.
        model: model as prepared.
        chunks: result of [`split_batch`]; they lose their pixels when these are not needed any more.
        inputs_of: function from a chunk to the model's keyword arguments, on the device.
        loss_of: function from an output with the embeddings of all chunks to this process's part of the loss; the loss
            is the sum over the processes.

    Returns:
        This process's part of the loss, a scalar without a graph.
    """
    # With one process, the graph of the image tower is gone before that of the text tower is built. With several, each
    # backward pass must reach all parameters, or their gradients would not be exchanged.
    by_tower = accelerator.distributed_type == DistributedType.NO
    embedded, states = _embed(model, chunks, inputs_of, by_tower, accelerator.device)
    leaves = {name: torch.cat([part[name] for part in embedded]) for name in ROWS}
    scalars = scalars_of(model) if by_tower else {name: embedded[0][name] for name in SCALARS if name in embedded[0]}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in (leaves | scalars).items()}
    loss = loss_of(MiniClipOutput(**leaves))
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def add_gradients(outputs: Mapping[str, Any], cached: Mapping[str, Tensor]) -> None:
        """The gradients of these dot products are the cached gradients. What is frozen has none."""
        dots = [(outputs[name] * gradient).sum() for name, gradient in cached.items() if outputs[name].requires_grad]
        if dots:
            accelerator.backward(torch.stack(dots).sum() * accelerator.num_processes)

    start = dict.fromkeys(ROWS, 0)
    for i, (chunk, drawn) in enumerate(zip(chunks, states, strict=True)):
        is_last = i == len(chunks) - 1
        for inputs, state in zip(_calls(inputs_of(chunk), by_tower), drawn, strict=True):
            # Gradients are synchronised with the other processes only once, after the last chunk.
            with nullcontext() if is_last else without_step(accelerator, model), _replayed(state, accelerator.device):
                output = model(**inputs)
                chunk.pop("pixel_values", None)
                inputs.clear()
                cached = {}
                for name in ROWS:
                    if output.get(name) is not None:
                        end = start[name] + len(output[name])
                        cached[name] = gradients[name][start[name] : end]
                        start[name] = end
                if not by_tower:
                    # Zero, but not left out, in the other chunks: ZeRO-3 would add to the gradients of the last step.
                    cached |= {name: gradients[name] * is_last for name in scalars}
                add_gradients(output, cached)
                del output  # or the next chunk would be computed next to the last one
    if by_tower:
        add_gradients(scalars, {name: gradients[name] for name in scalars})
    return loss.detach()


def _embed(
    model: nn.Module,
    chunks: list[dict[str, Tensor]],
    inputs_of: Callable[[dict[str, Tensor]], dict[str, Any]],
    by_tower: bool,
    device: torch.device,
) -> tuple[list[dict[str, Tensor]], list[list[RandomState]]]:
    """Embed all chunks without a graph.

    Returns:
        [`ROWS`] and, unless `by_tower`, [`SCALARS`] of each chunk; and the states of the random numbers before each
        call of the model for it.
    """
    embedded: list[dict[str, Tensor]] = []
    states: list[list[RandomState]] = []
    with torch.no_grad(), _running_statistics_kept(model):
        for chunk in chunks:
            embedded.append({})
            states.append([])
            for inputs in _calls(inputs_of(chunk), by_tower):
                states[-1].append(random_state(device))
                output = model(**inputs)
                # Without the towers' feature maps, which would fill the memory.
                embedded[-1] |= {name: output[name] for name in (*ROWS, *SCALARS) if output.get(name) is not None}
    return embedded, states


def _calls(inputs: dict[str, Any], by_tower: bool) -> Iterator[dict[str, Any]]:
    """The arguments of each call of the model for a chunk: those of both towers together, or one after the other.

    Only what is returned holds the pixels, so that the caller can drop them.
    """
    if by_tower:
        yield {name: inputs.pop(name) for name in IMAGES if name in inputs} | {"return_logits": False}
    yield inputs


def scalars_of(model: Any) -> dict[str, Tensor]:
    """The [`SCALARS`] of a model that is not wrapped, or only by Accelerate."""
    found = {"logit_scale": model.inverse_temperature(), "logit_bias": model.logit_bias}
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, batch norms in training mode do not update their running averages."""
    norms = trained_norms(model)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def trained_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that normalise with the statistics of a batch, and keep running averages of them."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


def random_state(device: torch.device) -> RandomState:
    """States of the random numbers of the CPU and, if it is another one, of the device."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return torch.get_rng_state(), on_device


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Let random numbers continue from what [`random_state`] returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])


@contextmanager
def _replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Within the block, random numbers continue from `state`; afterwards the generators are as before the block."""
    devices: list[int] = []
    if device.type != "cpu":
        devices = [torch.accelerator.current_device_index() if device.index is None else device.index]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        set_random_state(state, device)
        yield
