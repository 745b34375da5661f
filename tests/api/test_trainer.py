"""transformers' `Trainer` with the package's collator and loss: the script's gradients, in one process and in two."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from modeling_miniclip import (
    MiniClipModel,
    PairCollator,
    gathered_loss,
    recall_of_prediction,
    retrieval_metrics,
    symmetric_contrastive_loss,
)
from modeling_miniclip.training.towers.create_model import set_dropout
from tests.helpers.forks import fork, free_port
from tests.helpers.towers import CAPTIONS, PIXELS, tiny_model, tiny_processor
from tests.training.test_distributed import in_processes


def rows() -> list[dict[str, Any]]:
    """Eight captioned images; two of them are the same image with two captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, PIXELS, PIXELS, 3), dtype=np.uint8)
    pixels[6] = pixels[1]
    names = [f"{number}.jpg" for number in (0, 1, 2, 3, 4, 5, 1, 7)]
    captions = [caption for each in CAPTIONS for caption in each][:8]
    return [
        {"image": Image.fromarray(image), "image_id": name, "captions": [caption, "another caption"]}
        for image, name, caption in zip(pixels, names, captions, strict=True)
    ]


def fresh_model() -> MiniClipModel:
    torch.manual_seed(0)
    model = tiny_model(vision="vit", text_pooling="mean")  # without batch norm, whose statistics each process has
    set_dropout(model, 0.0)
    return model


def trainer_of(model: MiniClipModel, folder: Path, batch_size: int, **options: Any) -> Trainer:
    is_distributed = "WORLD_SIZE" in os.environ  # a backend without several processes is an error of accelerate
    arguments = TrainingArguments(
        str(folder), remove_unused_columns=False, per_device_train_batch_size=batch_size, max_steps=1, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, logging_steps=1,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_eval_batch_size=3, ddp_backend="gloo" if is_distributed else None,
    )  # fmt: skip
    model.loss_function = gathered_loss
    collator = PairCollator(tiny_processor())
    return Trainer(model, arguments, data_collator=collator, train_dataset=rows(), eval_dataset=rows(), **options)


def step_of_trainer(rank: int, processes: int, port: int, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """The logged loss of a step over all rows, and the weights after it: the gradients, as the learning rate is 1."""
    torch.set_num_threads(1)
    if processes > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in values.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    trainer = trainer_of(fresh_model(), folder, batch_size=8 // processes)
    trainer.train()
    (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    weights = trainer.model.state_dict()
    return loss, {name: value.numpy() for name, value in weights.items()}


def expected_step() -> tuple[float, dict[str, np.ndarray]]:
    model = fresh_model()
    batch = PairCollator(tiny_processor())(rows())
    ids = batch.pop("image_id"), batch.pop("text_image_id")
    output = model(**batch | {"return_loss": False})
    loss = symmetric_contrastive_loss(output.image_embeds, output.text_embeds, model.inverse_temperature(), *ids)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    return loss.item(), {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_has_the_loss_and_gradients_of_the_script(tmp_path: Path, processes: int) -> None:
    port = free_port()
    ranks = [fork(step_of_trainer, rank, processes, port, tmp_path) for rank in range(processes)]
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0] * processes
    expected_loss, expected = expected_step()
    for process in ranks:
        loss, weights = process.result
        assert loss == pytest.approx(expected_loss, rel=1e-3)  # Trainer rounds it
        for name, value in expected.items():
            np.testing.assert_allclose(weights[name], value, atol=2e-5, err_msg=name)


def losses_of_batches(rank: int, processes: int) -> list[float]:
    """The loss of each process's own batch, whose images it numbers from 0, in a batch of all of them."""
    embeds = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    images, texts = embeds[2 * rank :][:2], embeds[4 + 2 * rank :][:2]
    ids = torch.arange(2)
    loss = gathered_loss(images, texts, torch.tensor([5.0]), ids, ids)
    torch.distributed.all_reduce(loss)
    whole = symmetric_contrastive_loss(embeds[:4], embeds[4:], 5.0, torch.arange(4), torch.arange(4))
    return [loss.item() / processes, whole.item()]


def test_ids_within_a_process_are_no_pairs_of_other_processes() -> None:
    found, expected = in_processes(losses_of_batches, 2)
    assert found == pytest.approx(expected, rel=1e-5)


def test_trainer_reports_recall(tmp_path: Path) -> None:
    model = fresh_model()
    few = rows()[:6]  # all different: ties depend on the last bits
    found = trainer_of(model, tmp_path, 8, compute_metrics=recall_of_prediction).evaluate(few)
    with torch.no_grad():
        output = model(**PairCollator(tiny_processor())(few))
    expected = retrieval_metrics(output.image_embeds, output.text_embeds)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)


def test_recall_of_several_captions_per_image() -> None:
    texts, images = np.eye(4)[[0, 0, 1, 1, 2, 3]], np.eye(4)[:3]
    found = recall_of_prediction(SimpleNamespace(predictions=(texts, images)))
    expected = retrieval_metrics(images, texts, [0, 0, 1, 1, 2, 2])
    assert found == expected and found["text_to_image_R@1"] == pytest.approx(500 / 6)
    with pytest.raises(ValueError, match="3 texts of 2 images: evaluate with the same number"):
        recall_of_prediction(SimpleNamespace(predictions=(texts[:3], images[:2])))


def test_the_collator_says_which_texts_belong_to_which_image() -> None:
    collate = PairCollator(tiny_processor(), captions_per_image=2)
    few = [rows()[1], rows()[6] | {"captions": ["one"]}, rows()[3] | {"image_id": 3}]
    batch = collate(few)
    ids = batch["image_id"].tolist()
    assert ids[0] == ids[1] != ids[2] and min(ids) >= 2**40
    assert batch["text_image_id"].tolist() == [ids[0], ids[0], ids[0], ids[2], ids[2]]
    assert batch["pixel_values"].shape == (3, 3, PIXELS, PIXELS) and len(batch["input_ids"]) == 5
    plain = collate([{"image": row["image"], "caption": "a dog"} for row in few])
    assert plain["image_id"].tolist() == plain["text_image_id"].tolist() == [0, 1, 2]


def test_random_captions_are_drawn_without_repetition() -> None:
    collate = PairCollator(tiny_processor(), captions_per_image=2, random_captions=True)
    torch.manual_seed(0)
    drawn = {tuple(collate._draw(["a", "b", "c"])) for _ in range(60)}
    assert drawn == {(x, y) for x in "abc" for y in "abc" if x != y}


@pytest.mark.parametrize(
    ("row", "message"),
    [({"image": None, "caption": "a"}, "a row without an image"), ({"image": 1, "text": "a"}, "without a caption")],
)
def test_rows_that_lack_something_are_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairCollator(tiny_processor())([row])
