"""The loss and its gradients over several processes against one process with the whole batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from modeling_miniclip.distributed import gather_rows, global_contrastive_loss
from modeling_miniclip.modeling_miniclip import symmetric_contrastive_loss

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
        "images": normal(IMAGES, DIM),
        "texts": normal(sum(CAPTIONS_OF), DIM),
        "image_id": image_id,
        "text_image_id": image_id.repeat_interleave(torch.tensor(CAPTIONS_OF)),
    }


def gradients(p: dict[str, Tensor], rank: int, world_size: int) -> list[Tensor]:
    """Summed gradients of the three parameters for this process's share of the problem."""
    parameters = [p[name].clone().requires_grad_() for name in ("image_weight", "text_weight", "scale")]
    rows = list(range(rank, IMAGES, world_size))
    image_id = p["image_id"][rows] if rows else torch.tensor([-1])
    images = p["images"][rows] if rows else p["images"][:1]
    mine = torch.isin(p["text_image_id"], p["image_id"][rows])
    texts = p["texts"][mine] if rows else p["texts"][:2]
    text_image_id = p["text_image_id"][mine] if rows else torch.tensor([-1, -1])
    loss = global_contrastive_loss(
        torch.nn.functional.normalize(images @ parameters[0], dim=-1),
        torch.nn.functional.normalize(texts @ parameters[1], dim=-1),
        parameters[2].exp(),
        image_id,
        text_image_id,
    )
    loss.backward()
    results = [loss.detach(), *(parameter.grad for parameter in parameters)]
    if world_size > 1:
        for result in results:
            dist.all_reduce(result)
    return results


def worker(rank: int, world_size: int, port: int, queue: "mp.Queue[list[list[float]]]") -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = gradients(problem(), rank, world_size)
    uneven = gather_rows(torch.full((rank, 2), float(rank)))
    assert uneven.tolist() == [[float(r)] * 2 for r in range(world_size) for _ in range(r)]
    if rank == 0:
        queue.put([result.flatten().tolist() for result in results])
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_one_process_computes_the_symmetric_loss_of_its_batch() -> None:
    p = problem()
    images = torch.nn.functional.normalize(p["images"], dim=-1)
    texts = torch.nn.functional.normalize(p["texts"], dim=-1)
    arguments = (images, texts, p["scale"].exp(), p["image_id"], p["text_image_id"])
    assert torch.equal(global_contrastive_loss(*arguments), symmetric_contrastive_loss(*arguments))


@pytest.mark.parametrize("world_size", [2, 4, 8])  # 8 processes, 7 images: one process has only a filler
def test_loss_and_gradients_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    expected = [result.flatten().tolist() for result in gradients(problem(), 0, 1)]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the libraries are imported once, not once a process
    queue = context.Queue()
    mp.start_processes(worker, (world_size, free_port(), queue), nprocs=world_size, start_method="forkserver")
    found = queue.get(timeout=10)
    for name, one, many in zip(("loss", "image_weight", "text_weight", "scale"), expected, found, strict=True):
        torch.testing.assert_close(torch.tensor(many), torch.tensor(one), rtol=1e-10, atol=1e-12, msg=name)
