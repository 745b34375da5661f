"""`--teacher`: what is accepted, the embeddings of the teacher in a batch, the loss they give, and whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

import train_miniclip
from modeling_miniclip import encode_images, encode_texts, from_clip, load_captions
from modeling_miniclip.data.loading.collation import Collator, model_inputs
from modeling_miniclip.data.loading.dataset import CaptionRows, TaughtRows
from modeling_miniclip.errors import ModelError, UsageError
from modeling_miniclip.training.command_line.check_arguments import teacher_details
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.reports.overfit import without_randomness
from modeling_miniclip.training.towers import teacher as teachers
from modeling_miniclip.training.towers.teacher import compute_taught, load_teacher
from tests.helpers.clips import save_clip
from tests.helpers.indexes import write_model
from tests.helpers.runs import (
    assert_same_log,
    flags,
    launch,
    leave_out_figures,
    metrics_of,
    plain_arguments,
    write_scene_folder,
)
from tests.helpers.towers import tiny_processor, with_slow

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated")

# --- the flags ------------------------------------------------------------------------------------------------------


def arguments_of(**values: Any) -> Any:
    return parse_arguments(["--dataset=a.csv", *(f"--{name}={value}" for name, value in values.items())])


@pytest.mark.parametrize(
    ("given", "weight", "temperature"),
    [
        ("{}", 1.0, None),
        ("{weight: 3}", 3.0, None),
        ('{"weight": 0.5, "temperature": 0.02}', 0.5, 0.02),
        ("{temperature: 1e-2}", 1.0, 0.01),  # a text to YAML
    ],
)
def test_weight_and_temperature_of_a_teacher(given: str, weight: float, temperature: float | None) -> None:
    details = teacher_details(arguments_of(teacher="large", teacher_kwargs=given))
    assert details == {"weight": weight, "temperature": temperature}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{weight: 0}", "--teacher_kwargs: weight must be a positive number, not 0"),
        ("{weight: -1}", "weight must be a positive number, not -1"),
        ("{weight: true}", "weight must be a positive number, not True"),
        ("{temperature: .nan}", "temperature must be a positive number, not nan"),
        ("{temperature: [1]}", r"temperature must be a positive number, not \[1\]"),
        ("{temperature: warm}", "temperature must be a positive number, not warm"),
        ("{scale: 5}", "--teacher_kwargs: unknown key 'scale'; a teacher takes weight, temperature"),
        ("{0: 5}", "unknown key 0; a teacher takes"),
        ("3", r"--teacher_kwargs must be a mapping such as \{weight: 2\}, not 3"),
        ("{a", "--teacher_kwargs is neither JSON nor YAML"),
    ],
)
def test_wrong_details_of_a_teacher_are_rejected(given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arguments_of(teacher="large", teacher_kwargs=given)


def test_details_need_a_teacher() -> None:
    with pytest.raises(UsageError, match="--teacher_kwargs needs --teacher"):
        arguments_of(teacher_kwargs="{weight: 2}")


def test_recipe_has_the_details_as_a_mapping(tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("dataset: a.csv\nteacher: large\nteacher_kwargs: {weight: 2, temperature: 1e-2}\n")
    assert teacher_details(parse_arguments([f"--recipe={recipe}"])) == {"weight": 2.0, "temperature": 0.01}


def test_teacher_is_checked_before_the_data_are_read(tmp_path: Path, tiny_towers: tuple[Path, Path]) -> None:
    for source, message in ((tmp_path / "nowhere", "no such folder"), (tiny_towers[1], "single tower or no CLIP")):
        with pytest.raises(ModelError, match=f"--teacher {source}: .*{message}"):
            train_miniclip.main(flags(tmp_path, teacher=source, dataset=tmp_path / "nowhere.csv"))


# --- its embeddings -------------------------------------------------------------------------------------------------


def test_rows_have_the_teachers_features_of_their_captions(captioned_folder: Path) -> None:
    split = load_captions(captioned_folder / "captions.csv")["train"]
    numbers = torch.arange(1.0, 1 + 2 * len(split)).view(-1, 2)
    numbers[1, 0] = math.nan  # could not be decoded when the features were computed
    texts = [
        torch.stack([torch.tensor([10.0 * row + i]) for i in range(len(row_captions))])
        for row, row_captions in enumerate(split["captions"])
    ]
    taught = TaughtRows(numbers, texts)  # type: ignore[arg-type]  # a list has rows, too
    rows = CaptionRows(split, tiny_processor(), captions_per_image=1, taught=taught)
    items = rows.__getitems__([(0, 0), (0, 1), (0, 2)])
    for row in (0, 2):
        (caption,) = items[row]["captions"]
        assert items[row]["taught_texts"].tolist() == [[10.0 * row + split[row]["captions"].index(caption)]]
        assert items[row]["taught_image"].tolist() == numbers[row].tolist()
    assert items[1].keys() == {"image_id", "undecodable"}
    assert "has no features, as it could not be decoded when they were computed" in items[1]["undecodable"]
    negatives = [item | {"negatives": ["wrong"]} for item in items if "captions" in item]
    batch = Collator(tiny_processor().tokenizer)(negatives)
    found = [items[0]["taught_texts"][0].tolist(), [0.0], items[2]["taught_texts"][0].tolist(), [0.0]]
    assert batch["taught_text"].tolist() == found and batch["is_negative"].tolist() == [False, True] * 2
    assert batch["taught_image"].tolist() == numbers[[0, 2]].tolist()


@pytest.mark.parametrize("family", with_slow(["siglip"], ["clip", "altclip", "dual-encoder"]))
def test_teacher_embeds_as_it_does_alone(family: str, tmp_path: Path) -> None:
    source = save_clip(family, tmp_path / "teacher")
    splits = load_captions(write_scene_folder(tmp_path / "scenes", 4))
    train, accelerator = splits["train"], Accelerator(cpu=True)
    arguments = plain_arguments(teacher=str(source), feature_cache_dir=str(tmp_path / "cache"), num_workers=0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    teacher = load_teacher(arguments, accelerator)
    assert teacher is not None and torch.equal(torch.get_rng_state(), state), "dropout draws the same masks"
    taught = compute_taught(teacher, splits, arguments, accelerator)
    assert taught is not None and sum(p.numel() for p in teacher.model.vision_model.parameters()) == 0
    features = {
        "taught_image": torch.stack([taught.images[i] for i in range(len(train))]),
        "taught_text": torch.cat([taught.texts[i] for i in range(len(train))]),
    }
    lesson, alone = teacher.embed([features]), from_clip(source)
    images = encode_images(alone, train, progress=False)
    texts = encode_texts(alone, [text for row in train["captions"] for text in row], progress=False)
    torch.testing.assert_close(lesson.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(lesson.text_embeds, texts, rtol=0, atol=1e-5)
    assert lesson.scale == pytest.approx(alone.inverse_temperature().item()) and lesson.weight == 1.0


# --- the loss of a step ---------------------------------------------------------------------------------------------


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the rows' softmax."""
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    return (p * (p / q).log()).sum(1).mean().item()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_step_adds_the_divergence_of_the_batch(chunk_size: int | None, tmp_path: Path, tiny_export: Path) -> None:
    options: dict[str, Any] = {
        "teacher": tiny_export, "teacher_kwargs": "{weight: 0.7, temperature: 0.1}", "captions_per_image": 2,
        "hard_negatives": "swap", "chunk_size": chunk_size,
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    run = train_miniclip.prepare(parse_arguments(flags(tmp_path, **options)))
    run.unwrapped_model.eval()
    keys = next(iter(run.train_batches))
    rows, batch = run.train_loader.rows, next(iter(run.train_loader))
    inputs = model_inputs(batch, run.processor, run.accelerator.device)
    loss = train_miniclip.compute_loss_and_gradients(run, batch)
    assert run.teacher is not None
    contrastive, found = run.teacher.taken_out(loss)

    student, alone = run.unwrapped_model(**inputs), from_clip(tiny_export)
    further = {name: batch[name] for name in ("is_negative", "image_keys", "text_keys") if name in batch}
    ids = batch["image_id"], batch["text_image_id"]
    embeds = student.image_embeds, student.text_embeds
    expected = global_contrastive_loss(*embeds, student.logit_scale, *ids, **further).item()
    assert contrastive.item() == pytest.approx(expected, rel=1e-5)

    own = ~batch["is_negative"]
    assert own.sum() == 16 and not own.all()
    items = rows.__getitems__(keys)
    assert [item["image_id"] for item in items] == batch["image_id"].tolist()
    images = encode_images(alone, [rows.undecoded[item["image_id"]] for item in items], progress=False)
    texts = encode_texts(alone, [text for item in items for text in item["captions"]], progress=False)
    theirs = texts @ images.T / 0.1  # [16, 8]
    ours = (student.logit_scale * student.text_embeds[own] @ student.image_embeds.T).detach()
    by_hand = (divergence(theirs, ours) + divergence(theirs.T, ours.T)) / 2
    assert by_hand > 0.01
    assert found.item() == pytest.approx(by_hand, rel=1e-4)
    assert loss.item() == pytest.approx(expected + 0.7 * by_hand, rel=1e-4)
    run.close()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught_run(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> Path:
    """Folder of a finished run of four steps with a teacher. Read-only."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        patch.setattr("train_miniclip.load_checked_export", lambda run: None)
        options = {"teacher": tiny_export, "teacher_kwargs": "{weight: 2}", "max_steps": 4}
        train_miniclip.main(flags(folder, **options))
    return folder


def test_run_logs_both_parts_and_its_card_names_the_teacher(taught_run: Path, tiny_export: Path) -> None:
    steps = [line for line in metrics_of(taught_run / "run") if line["split"] == "train"]
    assert len(steps) == 4 and all(line["teacher_divergence"] > 0 for line in steps)
    validations = [line for line in metrics_of(taught_run / "run") if line["split"] == "validation"]
    assert all("teacher_divergence" not in line for line in validations)
    card = (taught_run / "run" / "export" / "README.md").read_text(encoding="utf-8")
    assert "the similarities of a teacher, `export`" in card and str(tiny_export) not in card
    saved = yaml.safe_load((taught_run / "run" / "arguments.yaml").read_text(encoding="utf-8"))
    assert (saved["teacher"], saved["teacher_kwargs"]) == (str(tiny_export), {"weight": 2})


def test_teacher_runs_once_for_all_runs(
    taught_run: Path, tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*names: str) -> Any:
        model, processor = load_clip(*names)
        for name in ("pool_images", "pool_texts"):
            monkeypatch.setattr(model, name, None)  # calling it would fail
        return model, processor

    load_clip = teachers.load_clip
    monkeypatch.setattr(teachers, "load_clip", load)
    options = {"teacher": tiny_export, "dataset": taught_run / "scenes" / "captions.csv",
               "feature_cache_dir": taught_run / "features"}  # fmt: skip
    (tmp_path / "run").mkdir()
    train_miniclip.prepare(parse_arguments(flags(tmp_path, **options)))


def test_resumed_run_needs_the_same_teacher(taught_run: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    options = {"teacher": other, "max_steps": 5, "resume_from_checkpoint": "latest"}
    with pytest.raises(ModelError, match=r"teacher\.weights was '\w+', is '\w+'"):
        train_miniclip.prepare(parse_arguments(flags(taught_run, **options)))


def test_overfitting_leaves_the_teacher_out() -> None:
    arguments = without_randomness(plain_arguments(teacher="large", teacher_kwargs="{weight: 2}"))
    assert (arguments.teacher, arguments.teacher_kwargs) == (None, None)


@pytest.mark.slow
def test_two_processes_in_chunks_learn_from_a_teacher_alike(
    tmp_path: Path, tiny_export: Path, without_figures: None
) -> None:
    options: dict[str, Any] = {
        "teacher": tiny_export, "captions_per_image": 2, "hard_negatives": "swap", "dropout": 0,
        "freeze_batch_norm": "true", "max_steps": 4,
    }  # fmt: skip
    train_miniclip.main(flags(tmp_path, "one", **options))
    done = launch(flags(tmp_path, "two", chunk_size=2, **options), processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_log(tmp_path / "one", tmp_path / "two", norms=1e-3)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert "teacher_divergence" in json.loads(lines[0])
