"""What a CPU can show of the path to a GPU: where tensors go, pinned memory, and precisions."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

import train_miniclip
from modeling_miniclip.data.loading import pairs
from modeling_miniclip.data.loading.collation import model_inputs
from modeling_miniclip.training import grad_cache, setup
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.features import FrozenFeatures
from modeling_miniclip.training.towers.layers import set_training_mode
from tests.helpers.runs import flags
from tests.helpers.towers import PIXELS, tiny_processor


def test_all_inputs_go_to_the_device() -> None:
    batch = {
        "pixel_values": torch.zeros(2, 3, PIXELS, PIXELS, dtype=torch.uint8), "image_id": torch.arange(2),
        "input_ids": torch.ones(3, 5, dtype=torch.long), "attention_mask": torch.ones(3, 5, dtype=torch.long),
        "text_image_id": torch.tensor([0, 0, 1]),
    }  # fmt: skip
    inputs = model_inputs(batch, tiny_processor(), torch.device("meta"))  # whose tensors meet no others
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert all(tensor.device.type == "meta" for tensor in inputs.values())
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("device", "chunk_size", "expected"),
    [("cpu", None, [False, False]), ("cuda", None, [True, True]), ("cuda", 4, [False, True])],  # training, validation
)
def test_batches_for_a_gpu_are_pinned(
    device: str, chunk_size: int | None, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []
    monkeypatch.setattr(setup, "BatchLoader", lambda rows, batches, workers, pin, *_: pinned.append(pin))
    arguments = parse_arguments(flags(tmp_path, chunk_size=chunk_size, augmentation="[]"))
    features = {"train": FrozenFeatures(), "validation": FrozenFeatures()}
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device))
    setup.build_loaders(setup.load_splits(arguments), features, tiny_processor(), arguments, accelerator)
    assert pinned == expected


def test_towers_compute_in_bf16_and_the_loss_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    run = train_miniclip.prepare(parse_arguments(flags(tmp_path, mixed_precision="bf16")))
    set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
    layers: set[torch.dtype] = set()
    embeddings: set[torch.dtype] = set()
    loss_of = train_miniclip.global_contrastive_loss

    def note_layer(module: nn.Module, _: Any, output: Tensor) -> None:
        layers.add(output.dtype)

    def note_loss(images: Tensor, texts: Tensor, *args: Any, **options: Any) -> Tensor:
        embeddings.update((images.dtype, texts.dtype))
        return loss_of(images, texts, *args, **options)

    for module in run.unwrapped_model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note_layer)
    monkeypatch.setattr(train_miniclip, "global_contrastive_loss", note_loss)
    batch = next(iter(run.train_loader))
    train_miniclip.train_step(run, batch, len(batch["image_id"]))
    assert layers == {torch.bfloat16} and embeddings == {torch.float32}
    assert {p.grad.dtype for p in run.unwrapped_model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("loss_type", ["softmax_sum", "softmax_mean", "sigmoid"])
@pytest.mark.parametrize("further", ["nothing", "large tiles", "equal captions", "negatives", "chunks"])
def test_a_step_never_waits_for_the_device(
    loss_type: str, further: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the meta device have no values: whatever waits for one is an error.

    Only transformers waits, once in each pass of a text tower, to see whether its mask hides anything.
    """
    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: False)
    (tmp_path / "run").mkdir()
    argv = flags(tmp_path, loss_type=loss_type, chunk_size=2 if further == "chunks" else None)
    run = train_miniclip.prepare(parse_arguments(argv))
    set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
    batch = next(iter(run.train_loader))
    images, texts = len(batch["image_id"]), len(batch["text_image_id"])
    if further == "large tiles":
        monkeypatch.setattr(pairs, "COMPARED", 0)
    if further == "equal captions":
        batch |= {"image_keys": torch.arange(images)[:, None] // 2, "text_keys": torch.arange(texts)[:, None] // 2}
    if further == "negatives":
        batch["is_negative"] = torch.arange(texts) == texts - 1
    run.unwrapped_model.to("meta")
    run.accelerator.state.device = torch.device("meta")
    monkeypatch.setattr(grad_cache, "random_state", lambda device: None)  # that device has no random numbers
    monkeypatch.setattr(grad_cache, "_replayed", lambda state, device: nullcontext())
    loss = train_miniclip.compute_loss_and_gradients(run, batch)
    gradients = [p.grad for p in run.unwrapped_model.parameters() if p.requires_grad]
    assert loss.is_meta and gradients and all(each is not None and each.is_meta for each in gradients)
    run.count_step(batch, images, loss, run.accelerator.clip_grad_norm_(run.unwrapped_model.parameters(), 1.0))
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()  # as anything would that waits
