"""A Mac's GPU (`mps`) without one: nothing needs float64 there, NHWC or copies that do not wait."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from modeling_miniclip import UsageError, retrieval_metrics
from modeling_miniclip.api import clean_process
from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.data.loading.collation import model_inputs, stack_pixels
from modeling_miniclip.evaluation.metrics import dataset_loss, recall_intervals
from modeling_miniclip.evaluation.order_test import PairScores
from modeling_miniclip.training import grad_cache, setup
from modeling_miniclip.training.command_line.launch import read_launch
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.loss.pair_counts import count_pairs
from modeling_miniclip.training.towers.features import Collected
from modeling_miniclip.utils.arrays import as_embeddings
from modeling_miniclip.utils.performance import best_mixed_precision, image_layout
from tests.helpers.runs import ROOT, plain_arguments
from tests.helpers.simulated_mps import MpsTensor, on_mps
from tests.helpers.towers import PIXELS, tiny_model, tiny_processor

MPS = torch.device("mps")
IMAGES, TEXTS = 6, 15


@pytest.fixture
def split() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of images and texts, and for each text the row of its image."""
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(rows, 8, generator=generator), dim=1) for rows in (IMAGES, TEXTS))
    return image, text, torch.arange(TEXTS) % IMAGES


def test_simulated_device_has_no_float64() -> None:
    there = on_mps(torch.ones(3))
    assert isinstance(there + 1, MpsTensor) and type((there + 1).cpu()) is Tensor
    for compute in (Tensor.double, lambda x: x.to(torch.float64), lambda x: torch.mul(x, torch.ones(3).double())):
        with pytest.raises(TypeError, match="float64"):
            compute(there)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_metrics_of_tensors_on_mps_are_the_same(split: tuple[Tensor, Tensor, Tensor]) -> None:
    there = tuple(map(on_mps, split))
    assert retrieval_metrics(*there) == retrieval_metrics(*split)
    assert recall_intervals(*there, samples=20) == recall_intervals(*split, samples=20)
    assert dataset_loss(*there[:2], 10.0, there[2]) == dataset_loss(*split[:2], 10.0, split[2])
    right, wrong = split[0][:, :2], split[0][:, 2:4]
    assert torch.equal(PairScores(*map(on_mps, (right, wrong))).wins(), PairScores(right, wrong).wins())


def test_float64_becomes_float32_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.dtype] = []
    convert = Tensor.to

    def to(tensor: Tensor, target: Any) -> Tensor:
        if target != MPS:
            return convert(tensor, target)
        moved.append(tensor.dtype)
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "device", MPS)
    as_embeddings(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64))
    assert moved == [torch.float32] * 2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_counts_on_mps_are_the_same(split: tuple[Tensor, Tensor, Tensor], loss_type: str) -> None:
    image, text, text_image_id = split
    group = 1000 + torch.arange(IMAGES) // 2  # two images each
    keys = {"image_keys": group[:, None], "text_keys": group[text_image_id][:, None]}
    found = []
    for place in (lambda tensor: tensor.clone(), on_mps):
        leaves = [place(tensor.clone()).requires_grad_() for tensor in (image, text)]
        ids = place(torch.arange(IMAGES)), place(text_image_id)
        more = {name: place(value) for name, value in keys.items()}
        scale, bias = torch.tensor([5.0]), torch.tensor([-2.0]) if loss_type == "sigmoid" else None
        loss = global_contrastive_loss(*leaves, scale, *ids, loss_type, bias, **more)
        loss.backward()
        found.append([loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
        assert count_pairs(*ids, **more).pairs == sum(
            int(i // 2 == t % IMAGES // 2) for i in range(IMAGES) for t in range(TEXTS)
        )
    for expected, there in zip(*found, strict=True):
        assert torch.equal(expected, there)


def test_a_split_is_collected_from_mps() -> None:
    collected = Collected(4, torch.device("cpu"))
    collected.add(on_mps(torch.eye(3)), on_mps(torch.tensor([2, -1, 0])))
    embeddings, ids = collected.in_order()
    assert ids.tolist() == [0, 2] and torch.equal(embeddings.cpu(), torch.eye(3)[[2, 0]])


class Pixels:
    """Pixels that say how they were copied to a device."""

    def __init__(self, values: Tensor):
        self.values = values

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        self.non_blocking = non_blocking
        return self.values


def test_pixels_are_contiguous_and_copied_at_once_on_mps() -> None:
    assert image_layout(MPS) == torch.contiguous_format
    assert {image_layout(torch.device(name)) for name in ("cpu", "cuda", "xpu")} == {torch.channels_last}
    image = torch.zeros(3, PIXELS, PIXELS, dtype=torch.uint8).numpy()
    pixels: Any = Pixels(stack_pixels([image, image]))
    for device, waits in ((MPS, True), (torch.device("cuda"), False)):
        inputs = model_inputs({"pixel_values": pixels}, tiny_processor(), device)
        assert inputs["pixel_values"].is_contiguous() == waits
        assert pixels.non_blocking != waits


def test_random_numbers_are_replayed_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        """As `torch.mps`, which has no `current_device`."""

        state = torch.tensor([1, 2])
        asked: list[Any] = []

        def get_rng_state(self, device: Any = "mps") -> Tensor:
            self.asked.append(device)
            return self.state

        def set_rng_state(self, state: Tensor, device: Any = "mps") -> None:
            self.state = state

    module = Module()
    monkeypatch.setattr(torch, "mps", module)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    state = grad_cache.random_state(MPS)
    module.state = torch.tensor([3, 4])
    with grad_cache._replayed(state, MPS):
        assert module.state.tolist() == [1, 2]
    assert module.state.tolist() == [3, 4] and module.asked == ["mps", 0]


def test_train_leaves_random_numbers_of_mps_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([1])]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with clean_process._random_state():
        states.append(torch.tensor([2]))
    assert torch.equal(states[-1], states[0])


@pytest.mark.parametrize(
    ("program", "load"),
    [
        ("train_miniclip.py", "\nimport torch"),
        ("modeling_miniclip/cli.py", "\nfrom .training"),
        ("modeling_miniclip/__main__.py", "\nfrom .cli"),
    ],
)
def test_programs_compute_on_the_cpu_what_mps_lacks(program: str, load: str) -> None:
    """Torch reads the variable when it is imported."""
    source = (ROOT / program).read_text(encoding="utf-8")
    assert 0 < source.find('os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")') < source.find(load)


def test_a_run_on_mps_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_mixed_precision(MPS) == "no"
    state = type("State", (), {"device": MPS})()
    monkeypatch.setattr(setup, "join_processes", lambda on_cpu, backend: state)
    with pytest.raises(UsageError, match="--mixed_precision bf16: a run on mps is in float32; set"):
        setup.build_accelerator(plain_arguments(mixed_precision="bf16"), read_launch({}))


def test_a_step_of_the_model_needs_no_float64() -> None:
    model = tiny_model().eval()
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        owner._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(on_mps(parameter.detach().clone()))
    ids = torch.randint(5, 200, (2, 7))
    output = model(pixel_values=torch.rand(2, 3, PIXELS, PIXELS), input_ids=ids, attention_mask=torch.ones_like(ids))
    assert isinstance(output.image_embeds, MpsTensor) and isinstance(output.text_embeds, MpsTensor)
    output.logits_per_image.sum().backward()
