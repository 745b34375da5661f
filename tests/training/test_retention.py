"""`--retention_dataset`: recall on a second dataset at each validation, in the log and in the card."""

import csv
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip import (
    DataError,
    MiniClipError,
    MiniClipModel,
    UsageError,
    encode_images,
    encode_texts,
    load_captions,
    retrieval_metrics,
)
from modeling_miniclip.training.command_line.parsing import parse_arguments
from tests.helpers.runs import flags, metrics_of, write_scene_folder
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_figures")


def retaining(tiny_run: Path, folder: Path, **values: Any) -> list[str]:
    """Flags of a run from a trained model with a second dataset of 20 scenes, 4 of them for validation."""
    other = folder / "other" / "captions.csv"
    if not other.exists():
        write_scene_folder(folder / "other", 20)
    start = {"preset": None, "model_name_or_path": tiny_run / "export", "retention_dataset": other}
    return flags(folder, **start | values)


def retained(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(output_dir) if line["split"] == "retention"]


def test_each_validation_measures_the_second_dataset(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = main(retaining(tiny_run, tmp_path, max_steps=2, eval_steps=1, learning_rate=0.01))
    lines = retained(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    printed, other = capsys.readouterr().out, tmp_path / "other" / "captions.csv"
    assert f"retention: {other}, validation: 4 images, 20 captions" in printed
    assert f"  retained, {other}: loss {lines[0]['loss']:.4f}, R@1/5/10" in printed

    rows = load_captions(other, validation_fraction=0.2)["validation"]
    captions = [text for row in rows for text in row["captions"]]
    image_of = [i for i, row in enumerate(rows) for _ in row["captions"]]
    validated = [line for line in metrics_of(tmp_path / "run") if line["split"] == "validation"]
    best = min(validated[1:], key=lambda line: line["loss"])["step"]
    for folder, line in ((tiny_run / "export", lines[0]), (export, lines[best])):
        model = MiniClipModel.from_pretrained(folder)
        embeddings = (encode_images(model, rows, progress=False), encode_texts(model, captions, progress=False))
        found = retrieval_metrics(*embeddings, image_of)
        assert {name: line[name] for name in found} == pytest.approx(found, rel=1e-5)

    card = (export / "README.md").read_text()
    assert "the validation split of `captions.csv`, 4 images with 20 captions." in card
    for name, line in (("before training", lines[0]), ("this model", lines[best])):
        assert f"| {name} | {line['rsum']:.1f} | {line['text_to_image_R@1']:.1f} | " in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_frozen_towers_are_measured_by_their_features(tiny_run: Path, tmp_path: Path, without_finish: None) -> None:
    main(retaining(tiny_run, tmp_path, output_dir="trained", max_steps=1))
    main(retaining(tiny_run, tmp_path, output_dir="frozen", max_steps=1, freeze="both", augmentation="[]"))
    trained, frozen = (retained(tmp_path / name)[0] for name in ("trained", "frozen"))
    names = trained.keys() - {"split"}
    assert {name: frozen[name] for name in names} == pytest.approx({name: trained[name] for name in names}, rel=1e-4)


@pytest.mark.slow
def test_resumed_run_needs_the_same_second_dataset(tiny_run: Path, tmp_path: Path, without_finish: None) -> None:
    main(retaining(tiny_run, tmp_path, max_steps=1))
    main(retaining(tiny_run, tmp_path, max_steps=2, resume_from_checkpoint="latest"))
    assert [line["step"] for line in retained(tmp_path / "run")] == [0, 2]
    path = tmp_path / "other" / "captions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([*rows[:1], *([number, name, f"{text} again"] for number, name, text in rows[1:])])
    with pytest.raises(DataError, match="--retention_dataset has other images or captions"):
        main(retaining(tiny_run, tmp_path, resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_image_that_cannot_be_decoded_is_skipped(
    tiny_run: Path, tmp_path: Path, without_finish: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = retaining(tiny_run, tmp_path, max_steps=1, max_bad_image_fraction=0.3)
    rows = load_captions(tmp_path / "other" / "captions.csv", validation_fraction=0.2)["validation"]
    damaged = tmp_path / "other" / "Images" / rows[0]["image_id"]
    damaged.write_bytes(damaged.read_bytes()[:60])
    main(argv)
    assert f"{damaged.name}" in (printed := capsys.readouterr().out) and "; skipped in retention_dataset" in printed
    assert "images that could not be decoded and were skipped: 1 of 4 in retention_dataset" in printed
    assert len(retained(tmp_path / "run")) == 2


@pytest.mark.parametrize("flag", ["--retention_dataset=b.csv", "--blend=auto", "--blend=0.5"])
def test_only_a_trained_model_can_forget(flag: str) -> None:
    with pytest.raises(UsageError, match=rf"{flag.partition('=')[0]} needs --model_name_or_path: "):
        parse_arguments(["--dataset=a.csv", flag])


def test_missing_second_dataset_is_found_before_the_model(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(MiniClipError, match="nowhere.csv"):
        main(retaining(tiny_run, tmp_path, retention_dataset=tmp_path / "nowhere.csv"))
