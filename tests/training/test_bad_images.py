"""Images that cannot be decoded while a run goes on, and loader processes that die."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_miniclip import DataError, MiniClipError, MiniClipModel, MiniClipProcessor, load_captions
from modeling_miniclip.data.loading.batches import GlobalBatches
from modeling_miniclip.data.loading.collation import model_inputs
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.loader import BatchLoader
from modeling_miniclip.data.loading.order import InOrder, Shuffled
from modeling_miniclip.loss_miniclip import symmetric_contrastive_loss
from modeling_miniclip.training.bad_images import BadImages
from modeling_miniclip.training.grad_cache import split_batch
from modeling_miniclip.training.towers.features import embed_split
from tests.helpers.forks import train_in_processes
from tests.helpers.runs import assert_same_log, flags, metrics_of
from tests.helpers.towers import tiny_model, tiny_processor
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_finish")

# What makes the steps of any number of processes equal; 21 training images give batches of 8, 8 and 5.
EXACT: dict[str, Any] = {
    "dropout": 0, "freeze_batch_norm": True, "captions_per_image": 2, "max_bad_image_fraction": 0.5,
}  # fmt: skip


def split_of(folder: Path, split: str = "train") -> Any:
    """A split of the scenes that `flags` writes."""
    flags(folder)
    return load_captions(folder / "scenes" / "captions.csv", validation_fraction=0.2)[split]


def break_rows(folder: Path, rows: list[int], split: str = "train") -> list[str]:
    """Cut off the files of some rows; their names."""
    names = [split_of(folder, split)["image_id"][row] for row in rows]
    for name in names:
        path = folder / "scenes" / "Images" / name
        path.write_bytes(path.read_bytes()[:60])
    return names


def last_batch(seed_of_order: int = 0, size: int = 8) -> list[int]:
    """Rows of the last batch of the first epoch."""
    return [row for _, row in list(GlobalBatches(Shuffled(21, seed_of_order), size))[-1]]


def last_state(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((output_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batch_leaves_out_its_bad_image(tmp_path: Path, num_workers: int) -> None:
    processor = tiny_processor()
    whole = CaptionRows(split_of(tmp_path), processor, captions_per_image=2)
    keys = [[(0, 4), (0, 7), (0, 2)]]
    expected = next(iter(BatchLoader(whole, [[(0, 4), (0, 2)]], 0)))
    (name,) = break_rows(tmp_path, [7])
    batch = next(
        iter(BatchLoader(CaptionRows(split_of(tmp_path), processor, captions_per_image=2), keys, num_workers))
    )
    ((row, why),) = batch.pop("undecodable")
    assert row == 7 and name in why and "cannot be decoded" in why
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_share_without_good_images_gets_a_filler(tmp_path: Path) -> None:
    break_rows(tmp_path, [7, 8])
    rows = CaptionRows(split_of(tmp_path), tiny_processor(), captions_per_image=1)
    (batch,) = BatchLoader(rows, [[(0, 7)]], 0)
    assert batch["image_id"].tolist() == batch["text_image_id"].tolist() == [-1 - 9]
    assert torch.equal(batch["pixel_values"][0], torch.from_numpy(rows[0, 9]["pixels"]))
    assert [row for row, _ in batch["undecodable"]] == [7]
    (batch,) = BatchLoader(rows, [[(0, -1 - 7)]], 0)  # the process that has the filler's row reports it
    assert batch["image_id"].tolist() == [-1 - 9] and "undecodable" not in batch


def test_a_split_without_any_good_image_is_an_error(tmp_path: Path) -> None:
    break_rows(tmp_path, list(range(21)))
    rows = CaptionRows(split_of(tmp_path), tiny_processor())
    with pytest.raises(DataError, match="none of 21 images can be decoded"):
        next(iter(BatchLoader(rows, [[(0, 0)]], 0)))


def test_unreadable_file_is_not_a_bad_image(tmp_path: Path) -> None:
    split = split_of(tmp_path)
    (tmp_path / "scenes" / "Images" / split["image_id"][3]).unlink()
    rows = CaptionRows(split, tiny_processor())
    with pytest.raises(DataError, match=f"{split['image_id'][3]}' cannot be read.*resume"):
        next(iter(BatchLoader(rows, [[(0, 2), (0, 3)]], 0)))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_process_with_too_few_rows_fills_its_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_miniclip.training.grad_cache.all_reduce_max", lambda number, device: 8)
    batch = {"image_id": torch.arange(rows), "text_image_id": torch.arange(rows), "input_ids": torch.ones(rows, 3)}
    chunks = split_batch(batch, 2, torch.device("cpu"))
    assert len(chunks) == 4
    assert all(len(chunk[name]) > 0 for chunk in chunks for name in batch)
    for name in ("image_id", "text_image_id"):
        ids = torch.cat([chunk[name] for chunk in chunks])
        assert ids.tolist() == [*range(rows), *[-1] * (4 - rows)]


# --- the count ------------------------------------------------------------------------------------------------------


def test_bad_images_are_reported_once_up_to_the_limit() -> None:
    messages: list[str] = []
    bad = BadImages(
        {"train": {"images": 200}, "validation": {"images": 100}}, 0.01, messages.append, torch.device("cpu")
    )
    assert bad.describe() is None
    assert bad.record_undecodable("train", [(5, "image 'a'")]) == 1
    assert bad.record_undecodable("train", [(5, "image 'a'"), (3, "image 'b'")]) == 2
    assert bad.record_undecodable("validation", [(5, "image 'c'")]) == 1
    assert messages == [f"image {name}; skipped in {split}"
                    for name, split in (("'a'", "train"), ("'b'", "train"), ("'c'", "validation"))]  # fmt: skip
    assert (
        bad.describe()
        == "images that could not be decoded and were skipped: 2 of 200 in train, 1 of 100 in validation"
    )
    resumed = BadImages({"train": {"images": 200}, "validation": {"images": 100}}, 0.01, messages.append, bad.device)
    resumed.load_state_dict(bad.state_dict())
    assert resumed.record_undecodable("train", [(3, "image 'b'")]) == 1 and len(messages) == 3
    assert resumed.good_rows("validation") == [*range(5), *range(6, 100)]
    with pytest.raises(DataError, match=r"3 of 200 images of train .* image 'd'\. --max_bad_image_fraction 0.01"):
        resumed.record_undecodable("train", [(9, "image 'd'")])


# --- runs -----------------------------------------------------------------------------------------------------------


def test_first_loss_leaves_out_bad_images(tmp_path: Path) -> None:
    batch = [row for _, row in next(iter(GlobalBatches(Shuffled(21), 8)))]
    break_rows(tmp_path, batch[2:4])
    export = main(flags(tmp_path, "run", max_steps=1, augmentation="[]", learning_rate=1e-12, **EXACT))
    model, processor = MiniClipModel.from_pretrained(export), MiniClipProcessor.from_pretrained(export)
    rows = CaptionRows(split_of(tmp_path), processor, captions_per_image=2)
    good = [rows[0, row] for row in batch if row not in batch[2:4]]
    inputs = processor(text=[text for row in good for text in row["captions"]], return_tensors="pt")
    pixels = processor.normalize(torch.stack([torch.from_numpy(row["pixels"]) for row in good]))
    output = model(pixel_values=pixels, **inputs)
    owner = torch.arange(6)
    loss = symmetric_contrastive_loss(
        output.image_embeds, output.text_embeds, output.logit_scale, owner, owner.repeat_interleave(2)
    )
    line = metrics_of(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert "2 of 21 in train" in (export / "README.md").read_text()


def test_two_processes_skip_the_same_images_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second process loses all of its share of the last batch, and in both a chunk would be left empty.
    lost = [*last_batch()[1::2], *[row for _, row in next(iter(GlobalBatches(Shuffled(21), 8)))][:5:2]]
    names = break_rows(tmp_path, lost) + break_rows(tmp_path, [1], "validation")
    main(flags(tmp_path, "one", num_train_epochs=1, **EXACT))
    printed = capsys.readouterr().out
    output = train_in_processes(
        flags(tmp_path, "two", num_train_epochs=1, chunk_size=2, num_workers=1, **EXACT), 2, tmp_path / "log"
    )
    assert_same_log(tmp_path / "one", tmp_path / "two", norms=1e-3)  # sums in another order
    for name in names:
        assert printed.count(f"{name}' cannot be decoded") == output.count(f"{name}' cannot be decoded") == 1
    assert f"{len(lost)} of 21 in train, 1 of 5 in validation" in output


def test_resumed_run_remembers_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = break_rows(tmp_path, last_batch()[:1])
    main(flags(tmp_path, "whole", **EXACT))
    main(flags(tmp_path, "parts", num_train_epochs=1, **EXACT))
    capsys.readouterr()
    main(flags(tmp_path, "parts", resume_from_checkpoint="latest", **EXACT))
    output = capsys.readouterr().out
    assert name not in output and "1 of 21 in train" in output
    assert_same(last_state(tmp_path / "whole"), last_state(tmp_path / "parts"))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")


def test_too_many_bad_images_end_the_run(tmp_path: Path) -> None:
    whole = (tmp_path / "scenes" / "Images").joinpath
    flags(tmp_path)
    (name,) = names = split_of(tmp_path)["image_id"][:1]
    picture = whole(name).read_bytes()
    assert break_rows(tmp_path, [0]) == names
    main(flags(tmp_path, num_train_epochs=1, max_bad_image_fraction=0.5))
    before = last_state(tmp_path / "run")
    with pytest.raises(DataError, match=f"1 of 21 images of train .*{name}.*--max_bad_image_fraction 0.01"):
        main(flags(tmp_path, resume_from_checkpoint="latest"))
    assert_same(before, last_state(tmp_path / "run"))
    whole(name).write_bytes(picture)  # repaired, as the message asks
    main(flags(tmp_path, max_steps=4, resume_from_checkpoint="latest"))
    assert [line["step"] for line in metrics_of(tmp_path / "run") if line["split"] == "train"] == [1, 2, 3, 4]


def test_step_without_images_counts_and_changes_nothing(tmp_path: Path) -> None:
    same = {"batch_size": 10, "lr_scheduler_type": "cosine", "num_train_epochs": 1, "checkpointing_steps": 2}
    (row,) = last_batch(size=10)
    break_rows(tmp_path, [row])
    main(flags(tmp_path, save_total_limit=5, **same, **EXACT))
    assert [(line["step"], line["split"]) for line in metrics_of(tmp_path / "run")] == [
        (1, "train"), (2, "train"), (3, "validation")
    ]  # fmt: skip
    states = [load_file(path / "model.safetensors")
              for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]  # fmt: skip
    assert len(states) == 2
    assert_same(*states)


def test_cached_features_leave_out_the_same_bad_images(tmp_path: Path) -> None:
    break_rows(tmp_path, [*last_batch(), 0])
    break_rows(tmp_path, [2], "validation")
    for name, augmentation in (("cached", "[]"), ("again", "[]"), ("each-step", '[{"name": "NoOp"}]')):
        main(flags(tmp_path, name, num_train_epochs=1, freeze="both", augmentation=augmentation, **EXACT))
    assert_same_log(tmp_path / "cached", tmp_path / "each-step")
    assert_same_log(tmp_path / "cached", tmp_path / "again")  # from the cache, in which the bad images are known


def test_validation_leaves_out_a_bad_image(tmp_path: Path) -> None:
    model, processor, cpu = tiny_model(), tiny_processor(), torch.device("cpu")
    split = split_of(tmp_path)

    def embed(split: Any, on_undecodable: Callable[[Any], Any]) -> tuple[torch.Tensor, ...]:
        rows = CaptionRows(split, processor)
        return embed_split(
            model, BatchLoader(rows, GlobalBatches(InOrder(len(rows)), 4), 0), processor, cpu, None, on_undecodable
        )

    expected = embed(split.select([0, 1, 2, *range(4, 21)]), lambda lost: None)
    break_rows(tmp_path, [3])
    lost: list[Any] = []
    found = embed(split_of(tmp_path), lost.extend)
    assert [row for row, _ in lost] == [3]
    assert torch.equal(found[2], expected[2])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_run_that_became_nan_resumes_from_its_last_checkpoint(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(flags(tmp_path, "parts", num_train_epochs=1))

    def inputs_with_nan(*args: Any) -> Any:
        inputs = model_inputs(*args)
        inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return inputs

    with monkeypatch.context() as patch:
        patch.setattr("train_miniclip.model_inputs", inputs_with_nan)
        with pytest.raises(MiniClipError, match="training loss became nan.*checkpoint"):
            main(flags(tmp_path, "parts", resume_from_checkpoint="latest"))
    main(flags(tmp_path, "parts", resume_from_checkpoint="latest"))
    assert_same(last_state(tiny_run), last_state(tmp_path / "parts"))
    assert_same_log(tiny_run, tmp_path / "parts")
