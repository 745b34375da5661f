"""`--matryoshka_dims`: what is accepted, what the model remembers, and a run with short embeddings."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from modeling_miniclip import (
    MiniClipConfig,
    MiniClipModel,
    UsageError,
    encode_images,
    encode_texts,
    load_captions,
    retrieval_metrics,
)
from modeling_miniclip.training.command_line.check_arguments import matryoshka_dims
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.matryoshka import (
    DEFAULT_DIM,
    check_lengths,
    choose_lengths,
    describe_lengths,
    loss_prefixes,
    short_lengths,
)
from modeling_miniclip.training.resuming.resume_rules import changed_flags, recorded_flags
from tests.helpers.runs import flags, metrics_of
from tests.helpers.towers import tiny_config
from train_miniclip import main


def arguments_of(dims: str | None, **values: Any) -> Any:
    named = {"dataset": "a.csv", "matryoshka_dims": dims, **values}
    return parse_arguments([f"--{name}={value}" for name, value in named.items() if value is not None])


# --- the flag -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["64,128,256"], ["64", "128", "256"], ["64, 128", "256"]])
def test_lengths_are_separated_by_commas_or_spaces(given: list[str]) -> None:
    arguments = parse_arguments(["--dataset=a.csv", "--matryoshka_dims", *given])
    assert arguments.matryoshka_dims == ["64", "128", "256"]
    assert matryoshka_dims(arguments) == [64, 128, 256]


@pytest.mark.parametrize("value", ["[8, 16]", "8,16", "'8,16'", "['8', 16]"])
def test_recipe_has_a_list_or_a_text(tmp_path: Path, value: str) -> None:
    (tmp_path / "my.yaml").write_text(f"dataset: a.csv\nmatryoshka_dims: {value}\n", encoding="utf-8")
    assert parse_arguments([f"--recipe={tmp_path / 'my.yaml'}"]).matryoshka_dims == ["8", "16"]


def test_recipe_with_a_fraction_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("matryoshka_dims: [8, 1.5]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="my.yaml: matryoshka_dims: expected whole numbers, as in 64,128,256"):
        parse_arguments([f"--recipe={tmp_path / 'my.yaml'}"])


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ("0,8", "'0': expected whole numbers of at least 1, such as 64,128,256"),
        ("-8", "'-8': expected whole numbers"),
        ("8,,16", "'': expected whole numbers"),
        ("8;16", "'8;16': expected whole numbers"),
        ("\u0668", "expected whole numbers"),  # a digit of another script
        ("1" * 5000, "expected whole numbers"),
        ("16,8", "16,8: name each length once, the shortest first: 8,16"),
        ("8,8", "8,8: name each length once, the shortest first: 8"),
    ],
)
def test_wrong_lengths_are_rejected(dims: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--matryoshka_dims .*{message}"):
        arguments_of(dims)


def test_lengths_above_the_model_are_found_early(tmp_path: Path, tiny_export: Path) -> None:
    assert DEFAULT_DIM == 256
    check_lengths(arguments_of("8,1024"))
    check_lengths(arguments_of("8,2048", resume_from_checkpoint="latest"))  # of the checkpoint
    check_lengths(arguments_of("8,512", projection_dim=512))
    check_lengths(arguments_of("8,512", model_name_or_path=tmp_path / "nowhere"))  # another error, later
    for dims, values, width in (
        ("8,1025", {}, 1024),
        ("8,65", {"projection_dim": 64}, 64),
        ("8,17", {"model_name_or_path": tiny_export}, 16),
    ):
        with pytest.raises(UsageError, match=f"have {width} dimensions; name lengths of at most {width}"):
            check_lengths(arguments_of(dims, **values))
    with pytest.raises(UsageError, match="--matryoshka_dims 17: the embeddings of this model have 16"):
        main(flags(tmp_path, matryoshka_dims="8,17", dataset=tmp_path / "nowhere.csv"))  # before the data are read


def test_resumed_run_cannot_change_the_lengths() -> None:
    before, same, other = (arguments_of(dims) for dims in ("8,16", "8, 16", "8"))
    assert changed_flags(recorded_flags(before), same, "fixed") == {}
    assert changed_flags(recorded_flags(before), other, "fixed") == {"matryoshka_dims": (["8", "16"], ["8"])}


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "before", "after"),
    [
        ("4,8", None, [4, 8, 16]),
        ("4,8,16", None, [4, 8, 16]),
        ("16", [4, 16], None),
        (None, [4, 16], [4, 16]),
        (None, None, None),
        ("8", [4, 16], [8, 16]),
    ],
)
def test_configuration_has_all_trained_lengths(dims: str | None, before: Any, after: Any) -> None:
    config = tiny_config(matryoshka_dimensions=before)
    choose_lengths(config, arguments_of(dims))
    assert config.matryoshka_dimensions == after
    assert short_lengths(config) == (after or [])[:-1]
    assert loss_prefixes(config) == (None if after is None else dict.fromkeys(after, 1.0))
    assert (describe_lengths(config) is None) == (after is None)


def test_configuration_rejects_a_length_above_its_own() -> None:
    with pytest.raises(UsageError, match="--matryoshka_dims 32: the embeddings of this model have 16 dimensions"):
        choose_lengths(tiny_config(), arguments_of("8,32"))


def test_configuration_file_has_lengths_only_if_trained(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["matryoshka_dimensions"] is None
    tiny_config(matryoshka_dimensions=[4, 16]).save_pretrained(tmp_path / "short")
    assert json.loads((tmp_path / "short" / "config.json").read_text())["matryoshka_dimensions"] == [4, 16]
    assert MiniClipConfig.from_pretrained(tmp_path / "short").matryoshka_dimensions == [4, 16]


@pytest.mark.parametrize("dims", [[], [4, 8], [16, 4, 16], [4, 4, 16], [0, 16], [4.0, 16], [True, 16], "4,16", 16])
def test_wrong_lengths_of_a_configuration_are_rejected(dims: Any) -> None:
    with pytest.raises(ValueError, match=r"ascending whole numbers that end with projection_dim \(16\)"):
        tiny_config(matryoshka_dimensions=dims)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_run_trains_validates_and_records_short_embeddings(
    tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(tmp_path, matryoshka_dims="4,8", num_train_epochs=1, max_steps=2, chunk_size=4)
    export = main(argv)
    printed = capsys.readouterr().out
    assert "short embeddings of 4, 8 dimensions are trained, too, in addition to all 16" in printed
    assert "  4 dimensions: loss " in printed and "  8 dimensions: loss " in printed
    assert json.loads((export / "config.json").read_text())["matryoshka_dimensions"] == [4, 8, 16]
    assert yaml.safe_load((export.parent / "arguments.yaml").read_text())["matryoshka_dims"] == ["4", "8"]

    lines = {line["split"]: line for line in metrics_of(export.parent)}
    card = (export / "README.md").read_text()
    assert "16 dimensions; its first 4 or 8, normalised again, are a shorter one" in card
    for dim, split in ((4, "validation with 4 dimensions"), (8, "validation with 8 dimensions"), (16, "validation")):
        assert f"\n| {dim} | {lines[split]['rsum']:.1f} | {lines[split]['text_to_image_R@1']:.1f} | " in card
    assert card.index("### Short embeddings") < card.index("\n## Training\n")

    model = MiniClipModel.from_pretrained(export)
    rows = load_captions(tmp_path / "scenes" / "captions.csv", validation_fraction=0.2)["validation"]
    captions = [text for row in rows for text in row["captions"]]
    image_of = [i for i, row in enumerate(rows) for _ in row["captions"]]
    images = encode_images(model, rows, progress=False, truncate_dim=4)
    texts = encode_texts(model, captions, progress=False, truncate_dim=4)
    found = retrieval_metrics(images, texts, image_of)
    assert lines["validation with 4 dimensions"]["rsum"] == pytest.approx(found["rsum"], rel=1e-5)
