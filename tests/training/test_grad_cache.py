"""A step in chunks against the plain step: gradients, random numbers, batch norm, processes, memory."""

import copy
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import normalize

import train_miniclip
from modeling_miniclip.data.loading.pair_keys import NO_KEY
from modeling_miniclip.modeling_miniclip import MiniClipOutput
from modeling_miniclip.training.grad_cache import backward_in_chunks, split_batch
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from tests.helpers.runs import flags, launch, metrics_of
from tests.helpers.towers import PIXELS, tiny_model

CPU = torch.device("cpu")
COUNTS = torch.tensor([2, 1, 3, 1, 2, 1, 1])  # captions of each image, uneven on purpose


def batch_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Seven images with their eleven captions, two of them padded."""
    generator = torch.Generator().manual_seed(0)
    image_id = torch.tensor([4, 0, 9, 2, 7, 5, 3])
    attention_mask = torch.ones(11, 6, dtype=torch.long)
    attention_mask[3, 4:] = attention_mask[8, 2:] = 0
    return {
        "pixel_values": torch.randn(7, 3, PIXELS, PIXELS, generator=generator, dtype=dtype),
        "input_ids": torch.randint(5, 200, (11, 6), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "image_id": image_id,
        "text_image_id": image_id.repeat_interleave(COUNTS),
    }


def inputs_of(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows[name] for name in ("pixel_values", "input_ids", "attention_mask")}


def loss_of(output: MiniClipOutput) -> Tensor:
    ids = (batch_of()["image_id"], batch_of()["text_image_id"])
    loss_type = "softmax_sum" if output.logit_bias is None else "sigmoid"
    embeds = (output.image_embeds, output.text_embeds)
    return global_contrastive_loss(*embeds, output.logit_scale, *ids, loss_type, output.logit_bias)


def build_accelerator(mixed_precision: str) -> Accelerator:
    AcceleratorState._reset_state()  # its precision is that of the first one otherwise
    return Accelerator(cpu=True, mixed_precision=mixed_precision)


def step_in_chunks(model: nn.Module, chunk_size: int, mixed_precision: str = "no") -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the model."""
    accelerator = build_accelerator(mixed_precision)
    model = accelerator.prepare(copy.deepcopy(model))
    chunks = split_batch(batch_of(model.dtype), chunk_size, CPU)
    loss = backward_in_chunks(accelerator, model, chunks, inputs_of, loss_of)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def plain_step(model: nn.Module, mixed_precision: str = "no") -> tuple[Tensor, dict[str, Tensor]]:
    accelerator = build_accelerator(mixed_precision)
    model = accelerator.prepare(copy.deepcopy(model))
    loss = loss_of(model(**inputs_of(batch_of(model.dtype))))
    accelerator.backward(loss)
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the largest gradient of the model: some parameters have a true gradient of zero."""
    scale = max(gradient.abs().max() for gradient in one.values())
    return max(((one[name] - other[name]).abs().max() / scale).item() for name in one)


def frozen_norms(model: nn.Module) -> nn.Module:
    """Training mode but for the image tower, whose batch norm would see chunks instead of the batch."""
    model.train()
    model.vision_model.eval()
    return model


@pytest.mark.parametrize("chunk_size", [2, 3, 4])
@pytest.mark.parametrize(("vision", "loss_type"), [("resnet", "softmax_sum"), ("vit", "sigmoid")])
def test_gradients_are_those_of_the_plain_step(vision: str, loss_type: str, chunk_size: int) -> None:
    torch.manual_seed(1)
    model = tiny_model(vision, loss_type=loss_type).double()
    loss, gradients = step_in_chunks(model, chunk_size)
    expected_loss, expected = plain_step(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert not loss.requires_grad  # or a sum over steps would keep all their graphs
    assert set(gradients) == set(expected) and all(g is not None for g in gradients.values())
    assert largest_difference(expected, gradients) < 1e-10


@pytest.mark.parametrize("frozen", [("vision_model", "visual_projection"), ("text_model", "text_projection", "logit")])
def test_nothing_that_is_frozen_needs_a_gradient(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    model = tiny_model().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)
    (loss, gradients), (expected_loss, expected) = step_in_chunks(model, 3), plain_step(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    missing = {name for name, gradient in expected.items() if gradient is None}
    assert missing and missing == {name for name, gradient in gradients.items() if gradient is None}
    kept = [{name: g for name, g in one.items() if name not in missing} for one in (expected, gradients)]
    assert largest_difference(*kept) < 1e-10


def test_gradients_roughly_agree_under_mixed_precision() -> None:
    torch.manual_seed(1)
    model = tiny_model()
    _, gradients = step_in_chunks(model, 3, "bf16")
    _, expected = plain_step(model, "bf16")
    _, exact = plain_step(model)
    assert largest_difference(expected, gradients) < 0.02
    assert largest_difference(exact, gradients) > 1e-4  # bf16 was really used
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_dropout_draws_the_same_masks_in_both_passes() -> None:
    torch.manual_seed(1)
    model = frozen_norms(tiny_model(projection_dropout=0.5))
    masks: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.register_forward_hook(lambda _, args, output: masks.append((output == 0).clone()))
    accelerator = build_accelerator("no")
    chunks = split_batch(batch_of(), 3, CPU)
    backward_in_chunks(accelerator, model, chunks, inputs_of, loss_of)
    half = len(masks) // 2
    assert half > 0
    assert all(torch.equal(one, other) for one, other in zip(masks[:half], masks[half:], strict=True))
    by_chunk = half // 3
    assert not torch.equal(masks[0], masks[by_chunk])  # but chunks do not share theirs


def test_random_numbers_continue_after_one_forward_pass() -> None:
    model = frozen_norms(tiny_model(projection_dropout=0.5))
    torch.manual_seed(7)
    step_in_chunks(model, 3)
    after_step = torch.rand(4)
    torch.manual_seed(7)
    with torch.no_grad():
        for chunk in split_batch(batch_of(), 3, CPU):
            model(**inputs_of(chunk))
    assert torch.equal(after_step, torch.rand(4))


def test_batch_norm_takes_each_chunk_into_its_statistics_once() -> None:
    torch.manual_seed(1)
    model = tiny_model().train()
    once = copy.deepcopy(model)
    with torch.no_grad():
        for chunk in split_batch(batch_of(), 3, CPU):
            once(**inputs_of(chunk))
    accelerator = build_accelerator("no")
    backward_in_chunks(accelerator, model, split_batch(batch_of(), 3, CPU), inputs_of, loss_of)
    counters = [name for name, _ in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(model.get_buffer(name) == 3 for name in counters)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, once.get_buffer(name), rtol=1e-6, atol=1e-7)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)


def test_no_graph_is_larger_than_a_chunk() -> None:
    model = frozen_norms(tiny_model())
    sizes: list[tuple[str, int]] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            sizes.extend((name, len(output[name])) for name in ("image_embeds", "text_embeds") if name in output)

    model.register_forward_hook(note)
    backward_in_chunks(build_accelerator("no"), model, split_batch(batch_of(), 2, CPU), inputs_of, loss_of)
    assert sizes == [pair for images, texts in ((2, 3), (2, 3), (2, 3), (1, 2))
                     for pair in (("image_embeds", images), ("text_embeds", texts))]  # fmt: skip


def test_graph_of_one_tower_is_gone_before_the_other_one_runs() -> None:
    model = frozen_norms(tiny_model())
    graphs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            alive.append(sum(graph() is not None for graph in graphs))
            graphs.append(weakref.ref(output))

    for head in (model.visual_projection, model.text_projection):
        head.register_forward_hook(note)
    backward_in_chunks(build_accelerator("no"), model, split_batch(batch_of(), 3, CPU), inputs_of, loss_of)
    assert alive == [0] * 6


def test_a_batch_is_split_into_even_views_of_it() -> None:
    batch = batch_of()
    whole = dict(batch)
    chunks = split_batch(batch, 3, CPU)
    assert [len(chunk["image_id"]) for chunk in chunks] == [3, 2, 2]
    assert [len(chunk["input_ids"]) for chunk in chunks] == [4, 4, 3]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), tensor)
        assert chunks[1][name].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert set(whole) - set(batch) == {"pixel_values"}
    assert len(split_batch(batch_of(), 7, CPU)) == 1


def test_pixels_of_a_chunk_are_dropped_before_its_gradients() -> None:
    model, batch = frozen_norms(tiny_model()), batch_of()
    chunks = split_batch(batch, 3, CPU)
    held: list[list[bool]] = []
    for parameter in model.visual_projection.parameters():
        parameter.register_hook(lambda _: held.append(["pixel_values" in chunk for chunk in chunks]))
        break
    backward_in_chunks(build_accelerator("no"), model, chunks, inputs_of, loss_of)
    assert held == [[False, True, True], [False, False, True], [False, False, False]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_chunks_trains_as_one_without(tmp_path: Path, processes: int) -> None:
    same: dict[str, Any] = {"num_train_epochs": 2, "captions_per_image": 2, "dropout": 0, "freeze_batch_norm": "true"}
    same["matryoshka_dims"] = "4,8"
    for name, chunk_size, n in (("plain", None, 1), ("chunks", 2, processes)):
        done = launch(flags(tmp_path, name, chunk_size=chunk_size, **same), n)
        assert done.returncode == 0, done.stderr
    plain, chunks = (metrics_of(tmp_path / name) for name in ("plain", "chunks"))
    assert len(plain) == len(chunks) > 6
    for one, other in zip(plain, chunks, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_keys_and_negatives_of_a_batch_reach_the_loss(chunk_size: int | None) -> None:
    torch.manual_seed(1)
    batch, model = batch_of(), tiny_model()
    key = 2**62
    keys = {
        "image_keys": torch.tensor([[key]] * 2 + [[NO_KEY]] * 5),
        "text_keys": torch.tensor([[key]] * 2 + [[1]] * 9),
        "is_negative": torch.arange(11) == 4,  # one of three captions
    }
    run = SimpleNamespace(
        accelerator=build_accelerator("no"), model=model, unwrapped_model=model,
        processor=SimpleNamespace(normalize=lambda pixels: pixels), arguments=SimpleNamespace(chunk_size=chunk_size),
        teacher=None,
    )  # fmt: skip
    found = [train_miniclip.compute_loss_and_gradients(run, batch | more).item() for more in ({}, keys)]
    output, ids = model(**inputs_of(batch)), (batch["image_id"], batch["text_image_id"])
    rows = (output.image_embeds, output.text_embeds, output.logit_scale, *ids)
    assert found == pytest.approx([global_contrastive_loss(*rows, **more).item() for more in ({}, keys)], rel=1e-5)
    assert math.isfinite(found[1]) and found[0] != pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_loss_is_the_mean_of_those_of_all_lengths(chunk_size: int | None) -> None:
    torch.manual_seed(1)
    batch, model = batch_of(), tiny_model(matryoshka_dimensions=[2, 8, 16])
    inputs, ids = inputs_of(batch), (batch["image_id"], batch["text_image_id"])
    run = SimpleNamespace(
        accelerator=build_accelerator("no"), model=model, unwrapped_model=model,
        processor=SimpleNamespace(normalize=lambda pixels: pixels), arguments=SimpleNamespace(chunk_size=chunk_size),
        teacher=None,
    )  # fmt: skip
    found = train_miniclip.compute_loss_and_gradients(run, batch).item()
    output = model(**inputs)
    losses = []
    for dim in (2, 8, 16):
        short = [normalize(output[name][:, :dim], dim=-1) for name in ("image_embeds", "text_embeds")]
        losses.append(global_contrastive_loss(*short, output.logit_scale, *ids).item())
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert max(losses) - min(losses) > 0.01
    assert all(parameter.grad is not None for parameter in model.visual_projection.parameters())
