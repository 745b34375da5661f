"""The loss and its gradients over several processes against one process with the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.loss_miniclip import symmetric_contrastive_loss
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.processes.distributed import full_tensor, gather_rows, local_tensor
from modeling_miniclip.training.towers.create_model import set_dropout
from modeling_miniclip.training.towers.layers import set_training_mode
from tests.helpers.forks import fork, free_port
from tests.helpers.towers import PIXELS, tiny_model

IMAGES, DIM = 7, 5
CAPTIONS_OF = [2, 1, 3, 1, 2, 1, 1]  # uneven on purpose


def problem() -> dict[str, Tensor]:
    """Weights of a linear "tower" for each side, inputs and ids, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image_id = torch.tensor([4, 0, 9, 2, 7, 5, 3])
    return {
        "image_weight": normal(DIM, DIM),
        "text_weight": normal(DIM, DIM),
        "scale": torch.tensor([1.7], dtype=torch.float64),
        "bias": torch.tensor([-2.0], dtype=torch.float64),
        "images": normal(IMAGES, DIM),
        "texts": normal(sum(CAPTIONS_OF), DIM),
        "image_id": image_id,
        "text_image_id": image_id.repeat_interleave(torch.tensor(CAPTIONS_OF)),
    }


def gradients(loss_type: str, rank: int, world_size: int) -> list[Tensor]:
    """Loss and summed gradients of the parameters for this process's share of the problem."""
    p = problem()
    names = ["image_weight", "text_weight", "scale"] + (["bias"] if loss_type == "sigmoid" else [])
    parameters = {name: p[name].clone().requires_grad_() for name in names}
    rows = list(range(rank, IMAGES, world_size))
    image_id = p["image_id"][rows] if rows else torch.tensor([-1])
    images = p["images"][rows] if rows else p["images"][:1]
    mine = torch.isin(p["text_image_id"], p["image_id"][rows])
    texts = p["texts"][mine] if rows else p["texts"][:2]
    text_image_id = p["text_image_id"][mine] if rows else torch.tensor([-1, -1])
    loss = global_contrastive_loss(
        normalize(images @ parameters["image_weight"], dim=-1),
        normalize(texts @ parameters["text_weight"], dim=-1),
        parameters["scale"].exp(),
        image_id,
        text_image_id,
        loss_type,
        parameters.get("bias"),
    )
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in parameters.values())]
    results = [tensor for tensor in found if tensor is not None]
    assert len(results) == 1 + len(names), "also a filler has to reach every parameter"
    if world_size > 1:
        for result in results:
            dist.all_reduce(result)
    return results


def in_processes(function: Callable[[int, int], Any], world_size: int) -> Any:
    """What `function(rank, world_size)` returns in the first of `world_size` processes joined by gloo."""
    port = free_port()
    ranks = [fork(join_and_call, function, rank, world_size, port) for rank in range(world_size)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * world_size
    return ranks[0].result


def join_and_call(function: Callable[[int, int], Any], rank: int, world_size: int, port: int) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    result = function(rank, world_size)
    dist.barrier()
    dist.destroy_process_group()
    return result if rank == 0 else None


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_process_computes_the_symmetric_loss_of_its_batch(loss_type: str) -> None:
    p = problem()
    images, texts = normalize(p["images"], dim=-1), normalize(p["texts"], dim=-1)
    arguments = (images, texts, p["scale"].exp(), p["image_id"], p["text_image_id"], loss_type, p["bias"])
    expected = symmetric_contrastive_loss(*arguments)
    torch.testing.assert_close(global_contrastive_loss(*arguments), expected, rtol=1e-14, atol=0)


def all_gradients(rank: int, world_size: int) -> list[list[list[float]]]:
    uneven = gather_rows(torch.full((rank, 2), float(rank))) if world_size > 1 else torch.empty(0, 2)
    assert uneven.tolist() == [[float(r)] * 2 for r in range(world_size) for _ in range(r)]
    return [[r.flatten().tolist() for r in gradients(name, rank, world_size)] for name in LOSS_TYPES]


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.slow), 8]
)  # 8 processes, 7 images: one process has only a filler
def test_gradients_do_not_depend_on_the_process_count(world_size: int) -> None:
    expected, found = all_gradients(0, 1), in_processes(all_gradients, world_size)
    for loss_type, one, many in zip(LOSS_TYPES, expected, found, strict=True):
        for name, a, b in zip(("loss", "image_weight", "text_weight", "scale", "bias"), one, many, strict=False):
            torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-10, atol=1e-12, msg=loss_type + name)


# --- a whole model under DistributedDataParallel ---------------------------------------------------------------------


def model_gradients(
    loss_type: str, dtype: torch.dtype, images: int, rank: int, world_size: int
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a tiny model's first step, as `train_epoch` takes it; three captions an image."""
    torch.manual_seed(0)
    model = tiny_model(loss_type=loss_type).to(dtype)
    set_dropout(model, 0.0)
    set_training_mode(model, "none", freeze_batch_norm=True)
    pixels = torch.randn(images, 3, PIXELS, PIXELS, dtype=dtype)
    input_ids = torch.randint(5, 200, (images, 3, 8))
    share = torch.arange(rank, images, world_size)
    rows, ids = (share, share) if len(share) else (torch.tensor([0]), torch.tensor([-1]))
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    output = wrapped(pixel_values=pixels[rows], input_ids=input_ids[rows].flatten(0, 1))
    loss = global_contrastive_loss(
        output.image_embeds,
        output.text_embeds,
        output.logit_scale,
        ids,
        ids.repeat_interleave(3),
        loss_type,
        output.logit_bias,
    )
    (loss * world_size).backward()
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = [(name, dtype, images) for name in LOSS_TYPES for dtype in (torch.float64, torch.float32) for images in (3, 9)]
FEW_CASES = [CASES[0], CASES[3], CASES[4], CASES[8]]  # all losses, types and numbers of images


def gradients_of_few_cases(rank: int, world_size: int) -> list[tuple[float, dict[str, Any]]]:
    return gradients_of(FEW_CASES, rank, world_size)


def gradients_of_all_cases(rank: int, world_size: int) -> list[tuple[float, dict[str, Any]]]:
    return gradients_of(CASES, rank, world_size)


def gradients_of(
    cases: list[tuple[str, torch.dtype, int]], rank: int, world_size: int
) -> list[tuple[float, dict[str, Any]]]:
    found = [model_gradients(*case, rank, world_size) for case in cases]
    return [(loss, {name: grad.numpy() for name, grad in grads.items()}) for loss, grads in found]


def test_four_processes_compute_the_gradients_of_one() -> None:  # of 3 images; one of them has only a filler
    assert_same_gradients(FEW_CASES, gradients_of_few_cases, 4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_compute_the_gradients_of_one_in_all_cases(world_size: int) -> None:
    assert_same_gradients(CASES, gradients_of_all_cases, world_size)


def assert_same_gradients(cases: list[Any], compute: Callable[[int, int], Any], world_size: int) -> None:
    expected, found = compute(0, 1), in_processes(compute, world_size)
    for case, (loss, one), (other_loss, many) in zip(cases, expected, found, strict=True):
        bound = 1e-5 if case[1] == torch.float32 else 1e-10
        assert other_loss == pytest.approx(loss, rel=bound), case
        assert one.keys() == many.keys() and len(one) == len(list(tiny_model(loss_type=case[0]).parameters())), case
        largest = max(abs(grad).max() for grad in one.values())
        assert largest > 1e-3, case
        assert max(abs(one[name] - many[name]).max() for name in one) <= bound * largest, case


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation gave within the block."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest_tensors(rank: int, world_size: int) -> list[int]:
    """With 64 images a process, two captions each, two dimensions."""
    image_id = torch.arange(64) * world_size + rank
    text_image_id = image_id.repeat_interleave(2)
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    found = []
    for loss_type in LOSS_TYPES:
        images, texts = (torch.randn(len(ids), 2, requires_grad=True) for ids in (image_id, text_image_id))
        with LargestTensor() as noted:
            global_contrastive_loss(images, texts, scale, image_id, text_image_id, loss_type, bias).backward()
        found.append(noted.elements)
    return found


def test_a_process_never_holds_the_similarities_of_other_processes() -> None:
    # 256 images and 512 texts in all: local x global is 64 x 512, global x global would be four times that.
    assert in_processes(largest_tensors, 4) == [64 * 512] * 3
    assert largest_tensors(0, 1) == [64 * 128] * 3


# --- tensors that FSDP spreads over processes ------------------------------------------------------------------------


def whole_and_part(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    spread = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (world_size,)), [Shard(0)])
    return full_tensor(spread).tolist(), local_tensor(spread).tolist()


def test_spread_tensor_has_a_whole_and_a_part() -> None:
    assert in_processes(whole_and_part, 2) == ([0, 1, 2, 3], [0, 1])
    tensor = torch.arange(4.0)
    assert full_tensor(tensor) is tensor is local_tensor(tensor)
