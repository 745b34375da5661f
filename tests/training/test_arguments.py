"""Code default < recipe < flag, and an error that names file, key or flag for everything that is wrong."""

import ast
import inspect
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from modeling_miniclip import UsageError
from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION
from modeling_miniclip.training.command_line.arguments import (
    DERIVED,
    FLAG_GROUPS,
    LOWER_BOUNDS,
    PART_RATES,
    TrainingArguments,
    describe_flags,
    flag_tables,
    write_flag_tables,
)
from modeling_miniclip.training.command_line.check_arguments import augmentation_list, limit_in_seconds
from modeling_miniclip.training.command_line.parsing import keyword_arguments, parse_arguments
from modeling_miniclip.training.command_line.recipes import save_arguments
from tests.helpers.runs import ROOT

DEFAULTS = parse_arguments(["--dataset=any.csv"])
PROMISED = """dataset image_dir output_dir vision_model text_model projection_dim image_size max_length num_workers
dropout freeze_batch_norm batch_size captions_per_image num_train_epochs max_steps learning_rate
head_learning_rate vision_learning_rate text_learning_rate
weight_decay seed freeze best_metric early_stopping_patience logging_steps report_to
mixed_precision resume_from_checkpoint checkpointing_steps save_total_limit overfit_batch push_to_hub
hub_model_id""".split()


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe; gives the flag that names it."""

    def write(text: str) -> str:
        (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
        return f"--recipe={tmp_path / 'my.yaml'}"

    return write


def changed(arguments: TrainingArguments) -> dict[str, Any]:
    """What differs from the code defaults."""
    return {
        name: value
        for name, value in asdict(arguments).items()
        if value != getattr(DEFAULTS, name) and name not in ("recipe", "dataset")
    }


def test_every_promised_flag_is_there() -> None:
    assert set(PROMISED) <= {field.name for field in fields(TrainingArguments)}


def test_flags_override_recipes_and_recipes_override_defaults(recipe: Any) -> None:
    flag = recipe("dataset: a.csv\nbatch_size: 7\nseed: 3\n")
    assert changed(parse_arguments([flag, "--seed", "5"])) == {"batch_size": 7, "seed": 5}
    assert changed(parse_arguments(["--seed=5", flag, "--dataset=b.csv"])) == {"batch_size": 7, "seed": 5}
    assert parse_arguments([flag, "--dataset=b.csv"]).dataset == ["b.csv"]
    assert changed(parse_arguments(["--dataset=b.csv"])) == {}


def rates(*argv: str) -> tuple[float | None, float | None, float | None]:
    """Learning rates of heads, image tower and text tower."""
    arguments = parse_arguments(["--dataset=a.csv", *argv])
    assert arguments.learning_rate is None, "the parts have taken it over"
    return arguments.head_learning_rate, arguments.vision_learning_rate, arguments.text_learning_rate


def test_learning_rate_sets_all_parts_at_once() -> None:
    assert rates() == (None, None, None), "they are derived later"
    assert rates("--learning_rate=3e-4") == (3e-4, 3e-4, 3e-4)


@pytest.mark.parametrize("part", range(3))
def test_the_rate_of_a_part_overrides_learning_rate(part: int) -> None:
    expected = [3e-4, 3e-4, 3e-4]
    expected[part] = 0.5
    flag = f"--{PART_RATES[part]}=0.5"
    assert rates(flag, "--learning_rate=3e-4") == rates("--learning_rate=3e-4", flag) == tuple(expected)


def test_learning_rate_on_the_command_line_overrides_a_recipe(recipe: Any) -> None:
    flag = recipe("vision_learning_rate: 0.2\nlearning_rate: 0.1\n")
    assert rates(flag) == (0.1, 0.2, 0.1)
    assert rates(flag, "--learning_rate=0.3") == (0.3, 0.3, 0.3)
    assert rates(flag, "--text_learning_rate=0.4") == (0.1, 0.2, 0.4)
    assert rates(flag, "--learning_rate=0.3", "--text_learning_rate=0.4") == (0.3, 0.3, 0.4)
    assert rates(recipe("text_learning_rate: 0.2\nlearning_rate: null\n")) == (None, None, 0.2)


def test_built_in_recipe_is_the_default() -> None:
    arguments = parse_arguments(["--seed=1"])
    assert (arguments.recipe, arguments.dataset, arguments.preset) == ("scenes", ["scenes"], "scenes_tiny")
    assert (arguments.batch_size, arguments.seed) == (64, 1)


def test_a_recipe_without_data_asks_for_a_dataset(recipe: Any) -> None:
    with pytest.raises(UsageError, match="--dataset is missing.*my.yaml"):
        parse_arguments([recipe("seed: 1")])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("head_learning_rate: 1e-3", "head_learning_rate", 0.001),  # a string for PyYAML
        ("head_learning_rate: 1.0e-3", "head_learning_rate", 0.001),
        ("head_learning_rate: '2e-3'", "head_learning_rate", 0.002),
        ("head_learning_rate: 1", "head_learning_rate", 1.0),
        ("batch_size: 64", "batch_size", 64),
        ("batch_size: '64'", "batch_size", 64),
        ("max_steps: null", "max_steps", None),
        ("max_steps: ~", "max_steps", None),
        ("max_steps:", "max_steps", None),
        ("push_to_hub: true", "push_to_hub", True),
        ("push_to_hub: 'False'", "push_to_hub", False),  # bool("False") is True
        ("push_to_hub: no", "push_to_hub", False),
        ("freeze_batch_norm: false", "freeze_batch_norm", False),
        ("freeze_batch_norm: yes", "freeze_batch_norm", True),
        ("freeze_batch_norm: null", "freeze_batch_norm", True),  # as without a preset
        ("mixed_precision: no", "mixed_precision", "no"),  # false for PyYAML
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("freeze: none", "freeze", "none"),
        ("report_to: none", "report_to", "none"),
        ("dataset_revision: '2024'", "dataset_revision", "2024"),
        ("output_dir: runs/été", "output_dir", "runs/été"),
        ("output_dir: -o", "output_dir", "-o"),
        ("caption_column: 'a b'", "caption_column", "a b"),
        ("checkpointing_steps: 100", "checkpointing_steps", "100"),
        ("checkpointing_steps: epoch", "checkpointing_steps", "epoch"),
    ],
)
def test_recipe_values_get_the_type_of_their_argument(recipe: Any, text: str, name: str, value: Any) -> None:
    found = getattr(parse_arguments([recipe(f"dataset: a.csv\n{text}\n")]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_size", "x", "a whole number"),
        ("batch_size", "1.5", "a whole number"),
        ("batch_size", "true", "a whole number"),
        ("batch_size", "null", "a whole number, found nothing"),
        ("batch_size", "[1]", "a whole number"),
        ("max_steps", "{a: 1}", "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "yes", "a number"),
        ("push_to_hub", "maybe", "true or false"),
        ("push_to_hub", "[]", "true or false"),
        ("freeze", "image", "one of none, vision, text, both, found 'image'"),
        ("freeze", "no", "one of none, vision, text, both"),
        ("freeze", "null", "one of none, vision, text, both, found nothing"),
        ("text_pooling", "max", "one of cls, mean"),
        ("dataset", "2024", "text"),
        ("dataset", "[[a.csv]]", "text"),
        ("dataset_weights", "[1, much]", "a number"),
        ("dataset_revision", "2024-01-01", "text"),
        ("output_dir", "on", "text"),
        ("augmentation", "{name: HorizontalFlip}", "a list of mappings with a name each"),
        ("augmentation", "[HorizontalFlip]", "a list of mappings with a name each"),
        ("augmentation", "HorizontalFlip", "a list of mappings with a name each"),
        ("augmentation", "3", "a list of mappings with a name each"),
    ],
)
def test_wrong_type_in_a_recipe_names_file_and_key(recipe: Any, key: str, value: str, expected: str) -> None:
    with pytest.raises(UsageError, match=rf"my\.yaml: {key}: expected {expected}"):
        parse_arguments([recipe(f"{key}: {value}")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", r"unknown key 'batchsize'; did you mean batch_size\?"),
        ("learning-rate: 3", r"unknown key 'learning-rate'; did you mean learning_rate\?"),
        ("recipe: scenes", "unknown key 'recipe'"),
        ("7: 3", "unknown key 7"),
        ("- batch_size", "expected a mapping of arguments, found list"),
        ("", "expected a mapping of arguments"),
        ("batch_size: [", "not a readable YAML file"),
        ("a: \x00", "not a readable YAML file"),
    ],
)
def test_file_that_is_no_recipe_is_named(recipe: Any, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"my\.yaml: {message}"):
        parse_arguments([recipe(text)])


def test_missing_recipe_lists_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sceens: neither a file nor .* scenes"):
        parse_arguments(["--recipe", "sceens"])
    with pytest.raises(UsageError, match="no.yaml: no such file"):
        parse_arguments(["--recipe", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "3"], r"unknown flag '--batchsize'; did you mean --batch_size\?"),
        (["--learning_rat=3"], r"did you mean --learning_rate\?"),
        (["--max-step", "3"], r"did you mean --max_steps\?"),
        (["--batch", "3"], r"unknown flag '--batch'"),  # no abbreviations: they would change with a new flag
        (["captions.csv"], "unexpected argument 'captions.csv'"),
        (["--batch_size", "x"], "--batch_size: invalid int value: 'x'"),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--push_to_hub", "maybe"], "--push_to_hub: .*true"),
        (["--freeze", "image"], "--freeze: invalid choice: 'image'.*'vision'"),
        (["--mixed_precision", "bf8"], "--mixed_precision: invalid choice"),
        (["--preset", "a", "--model_name_or_path", "b"], "--preset and --model_name_or_path exclude each other"),
        (["--text_model", "a", "--preset", "b"], "--text_model and --preset exclude each other"),
        (["--best_metric", "R@1"], "--best_metric R@1: choose from loss, text_to_image_R@1, .*rsum"),
        (["--learning_rate", "0"], "--learning_rate must be positive"),
        (["--vision_learning_rate", "-1"], "--vision_learning_rate must be positive"),
        (["--learning_rate", "nan"], "--learning_rate must be a finite number"),
        (["--weight_decay", "inf"], "--weight_decay must be a finite number"),
        (["--weight_decay", "-0.1"], "--weight_decay must be at least 0"),
        (["--max_grad_norm", "0"], "--max_grad_norm must be positive"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\)"),
        (["--projection_dropout", "-0.1"], r"--projection_dropout must be in \[0, 1\)"),
        (["--frozen_vision_fraction", "1"], r"--frozen_vision_fraction must be in \[0, 1\)"),
        (["--frozen_text_fraction", "-0.5"], r"--frozen_text_fraction must be in \[0, 1\)"),
        (["--ema_decay", "1"], r"--ema_decay must be in \[0, 1\)"),
        (["--layer_decay", "0"], r"--layer_decay must be in \(0, 1\]"),
        (["--crop_pct", "1.1"], r"--crop_pct must be in \(0, 1\]"),
        (["--train_image_size", "64", "--augmentation", "[]"], "--train_image_size is the size of augmented images"),
        (["--lr_scheduler_kwargs", "{factor: 1}"], "--lr_scheduler_kwargs: factor must be between 0 and 1, not 1"),
        (["--lr_scheduler_kwargs", "{hold_steps: -1}"], "hold_steps must be a whole number of at least 0, not -1"),
        (["--lr_scheduler_kwargs", "{patience: true}"], "patience must be a whole number of at least 0, not True"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs must be a mapping such as"),
        (["--lr_scheduler_kwargs", "{a"], "--lr_scheduler_kwargs is neither JSON nor YAML"),
        (["--lr_scheduler_kwargs", "{power: 2}"], "'power'; a schedule takes patience, factor, hold_steps"),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", "{patience: 2}"],
            "unknown key 'patience'; cosine takes hold_steps",
        ),
        (["--max_bad_image_fraction", "1.5"], r"--max_bad_image_fraction must be in \[0, 1\], not 1.5"),
        (["--validation_fraction", "0"], "--validation_fraction must be between 0 and 1"),
        (["--seed", str(2**32)], "--seed must be below"),
        (["--augmentation", "HorizontalFlip"], "--augmentation must be a list"),
        (["--augmentation", "[{p: 1}]"], "--augmentation must be a list"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps must be 'epoch' or a whole number of steps, not 0"),
        (["--checkpointing_steps", "1.5"], "--checkpointing_steps must be 'epoch' or a whole number"),
        (["--checkpointing_steps", "steps"], "--checkpointing_steps must be 'epoch' or a whole number"),
        (["--augmentation", "[{"], "--augmentation is neither JSON nor YAML"),
        (["--time_limit", "20"], "--time_limit must be a time such as 90s, 20m or 1.5h, not 20"),
        (["--time_limit", "0m"], "--time_limit must be a time"),
        (["--time_limit", "20m", "--max_steps", "3"], "--time_limit and --max_steps exclude each other"),
        (["--time_limit", "20m", "--num_train_epochs", "3"], "--time_limit and --num_train_epochs exclude each other"),
        *(([f"--{name}", str(least - 1)], f"--{name} must be at least") for name, least in LOWER_BOUNDS.items()),
    ],
)  # fmt: skip
def test_wrong_flag_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(["--dataset=a.csv", *argv])


def test_flags_accept_hyphens_and_bare_booleans() -> None:
    arguments = parse_arguments(["--dataset=a", "--batch-size", "4", "--push_to_hub", "--freeze_batch_norm"])
    assert (arguments.batch_size, arguments.push_to_hub, arguments.freeze_batch_norm) == (4, True, True)
    arguments = parse_arguments(["--dataset=a", "--push_to_hub", "false", "--freeze_batch_norm", "no"])
    assert (arguments.push_to_hub, arguments.freeze_batch_norm) == (False, False)


@pytest.mark.parametrize(
    ("flags", "sources"),
    [
        ([], ("v", "t", None, None)),
        (["--vision_model=w"], ("w", "t", None, None)),
        (["--preset=p"], (None, None, "p", None)),
        (["--model_name_or_path=m"], (None, None, None, "m")),
    ],
)
def test_model_flag_overrides_the_model_of_the_recipe(
    recipe: Any, flags: list[str], sources: tuple[str | None, ...]
) -> None:
    a = parse_arguments([recipe("dataset: a\nvision_model: v\ntext_model: t\n"), *flags])
    assert (a.vision_model, a.text_model, a.preset, a.model_name_or_path) == sources


def test_recipe_with_two_model_sources_is_rejected(recipe: Any) -> None:
    with pytest.raises(UsageError, match="--vision_model and --preset exclude each other"):
        parse_arguments([recipe("dataset: a\nvision_model: v\npreset: p\n")])


def test_augmentation_is_read_from_recipes_and_flags(recipe: Any) -> None:
    wanted = [{"name": "ColorJitter", "brightness": [0.9, 1.1], "p": 0.5}, {"name": "HorizontalFlip"}]
    flag = recipe(
        "dataset: a\naugmentation:\n- {name: ColorJitter, brightness: [0.9, 1.1], p: 0.5}\n- name: HorizontalFlip\n"
    )
    assert augmentation_list(parse_arguments([flag])) == wanted
    json_flag = "--augmentation=" + re.sub("'", '"', str(wanted))
    assert augmentation_list(parse_arguments(["--dataset=a", json_flag])) == wanted
    assert augmentation_list(parse_arguments([flag, "--augmentation=[]"])) == []
    assert augmentation_list(parse_arguments([recipe("dataset: a\naugmentation: []\n")])) == []
    assert augmentation_list(parse_arguments(["--dataset=a"])) == DEFAULT_AUGMENTATION


@pytest.mark.parametrize(
    ("flags", "is_augmented"),
    [
        (["--freeze=text"], True),
        (["--freeze=vision"], False),
        (["--freeze=both"], False),
        (["--freeze=both", "--num_views=2"], True),
        (["--freeze=both", '--augmentation=[{"name": "HorizontalFlip"}]'], True),
    ],
)
def test_a_frozen_image_tower_gets_no_augmentation_unless_asked(flags: list[str], is_augmented: bool) -> None:
    assert bool(augmentation_list(parse_arguments(["--dataset=a", *flags]))) is is_augmented


def test_saved_arguments_parse_to_the_same_arguments(tmp_path: Path) -> None:
    flags = {
        "vision_learning_rate": "1e-5", "mixed_precision": "no", "dataset_revision": "2024-01-01", "max_steps": "3",
        "augmentation": '[{"name": "ColorJitter", "brightness": [0.9, 1.1]}]', "freeze_batch_norm": "true",
        "caption_column": "null", "image_column": "yes", "hub_model_id": "1e3", "output_dir": "a: #b",
        "text_pooling": "mean", "dropout": "0", "model_name_or_path": "é",
    }  # fmt: skip
    first = parse_arguments([f"--{name}={value}" for name, value in flags.items()])
    assert len(changed(first)) > len(flags), "the built-in recipe is part of the run"
    save_arguments(first, tmp_path / "arguments.yaml")
    assert yaml.safe_load((tmp_path / "arguments.yaml").read_text())["augmentation"][0]["brightness"] == [0.9, 1.1]
    second = parse_arguments([f"--recipe={tmp_path / 'arguments.yaml'}"])
    assert asdict(first) | {"recipe": None} == asdict(second) | {"recipe": None}


def test_saved_arguments_omit_the_treatment_of_earlier_runs(tmp_path: Path) -> None:
    arguments = TrainingArguments(dataset="a", resume_from_checkpoint="latest", overwrite_output_dir=True)
    save_arguments(arguments, tmp_path / "arguments.yaml")
    saved = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    left_out = {field.name for field in fields(TrainingArguments)} - set(saved)
    once = {"overfit_batch", "resume_from_checkpoint", "discard_later_checkpoints", "overwrite_output_dir",
            "push_to_hub"}  # fmt: skip
    assert left_out == {"recipe", *once, *DERIVED}, "derived flags have no value yet"


def test_every_argument_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in [ROOT / "train_miniclip.py", *(ROOT / "modeling_miniclip").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "parsing.py":  # checking or saving a value is not using it
            unused = ("check_arguments", "save_arguments")
            tree.body = [node for node in tree.body if getattr(node, "name", "") not in unused]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if name in ("arguments", "given"):
                    read.add(node.attr)
    assert {field.name for field in fields(TrainingArguments)} - read == {"recipe", "learning_rate"}


def test_help_lists_each_flag_once_with_choices_and_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text == describe_flags()
    assert re.findall(r"^  --(\w+)", text, flags=re.MULTILINE) == [field.name for field in fields(TrainingArguments)]
    assert re.findall(r"^(\w.*):$", text, flags=re.MULTILINE) == list(FLAG_GROUPS.values())
    assert max(map(len, text.splitlines())) <= 103
    assert "None" not in text
    assert re.search(r"--batch_size .*\(derived\)", text) and re.search(r"--save_total_limit .*\(2\)", text, re.DOTALL)
    assert re.search(r"--freeze +none, vision, text, both: .*\(derived\)", text)
    assert re.search(r"--push_to_hub .*\(false\)", text)


def test_flag_groups_match_the_class() -> None:
    source = inspect.getsource(TrainingArguments)
    comments = re.findall(r"^    # (.*)\n    (\w+):", source, flags=re.MULTILINE)
    assert {name: title for title, name in comments} == FLAG_GROUPS


def test_flag_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Top\n<!-- flags -->\nold\n<!-- end of flags -->\nbottom\n")
    for _ in range(2):
        write_flag_tables(readme)
        assert readme.read_text() == f"# Top\n<!-- flags -->\n{flag_tables()}<!-- end of flags -->\nbottom\n"
    rows = re.findall(r"^\| `--(\w+)` \| [^|]+ \|$", flag_tables(), flags=re.MULTILINE)
    assert rows == [field.name for field in fields(TrainingArguments)]


@pytest.mark.parametrize(("limit", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), (" 2 m ", 120)])
def test_a_time_limit_has_a_unit(limit: str, seconds: float) -> None:
    assert limit_in_seconds(parse_arguments(["--dataset=a", f"--time_limit={limit}"])) == seconds


def test_time_limit_replaces_the_schedule_of_a_recipe(recipe: Any) -> None:
    flag = recipe("dataset: a\nnum_train_epochs: 3\nmax_steps: 9\nwarmup_steps: 5\nbatch_size: 7\n")
    found = changed(parse_arguments([flag, "--time_limit=20m"]))
    assert found == {"time_limit": "20m", "batch_size": 7}
    assert parse_arguments([flag, "--time_limit=20m", "--warmup_steps=2"]).warmup_steps == 2


# --- keyword arguments of Python ---


@pytest.mark.parametrize(
    ("keywords", "argv"),
    [
        ({"batch_size": 8, "ema_decay": 0.5, "overwrite_output_dir": True}, "--batch_size=8 --ema_decay=0.5 "
         "--overwrite_output_dir=True"),
        ({"batch_size": np.int64(8), "learning_rate": np.float64(1e-3)}, "--batch_size=8 --learning_rate=1e-3"),
        ({"output_dir": Path("a/b"), "time_limit": "20m"}, "--output_dir=a/b --time_limit=20m"),
        ({"matryoshka_dims": (64, 128), "hard_negatives": ["swap"]}, "--matryoshka_dims 64 128 --hard_negatives swap"),
        ({"augmentation": [{"name": "HorizontalFlip", "p": 0.5}]}, "--augmentation=[{\"name\":\"HorizontalFlip\","
         "\"p\":0.5}]"),
        ({"recipe": "full", "checkpointing_steps": 5}, "--recipe=full --checkpointing_steps=5"),
        ({"recipe": "full", "seed": None, "batch_size": None}, "--recipe=full"),
    ],
)  # fmt: skip
def test_keywords_mean_what_flags_mean(keywords: dict[str, Any], argv: str) -> None:
    expected = parse_arguments(["--dataset=a.csv", *argv.split()])
    found = keyword_arguments({"dataset": ["a.csv"], **keywords})
    if "augmentation" in keywords:
        assert augmentation_list(found) == augmentation_list(expected)
        found, expected = replace(found, augmentation=None), replace(expected, augmentation=None)
    assert found == expected


@pytest.mark.parametrize(
    ("keywords", "argv"),
    [
        ({"batchsize": 3}, "--batchsize"),
        ({"batch_size": "many"}, "--batch_size=many"),
        ({"batch_size": 1.5}, "--batch_size=1.5"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"freeze": "all"}, "--freeze=all"),
        ({"best_metric": "accuracy"}, "--best_metric=accuracy"),
        ({"preset": "scenes_tiny", "text_model": "t"}, "--preset=scenes_tiny --text_model=t"),
    ],
)
def test_wrong_keywords_have_the_messages_of_flags(keywords: dict[str, Any], argv: str) -> None:
    with pytest.raises(UsageError) as expected:
        parse_arguments(["--dataset=a.csv", *argv.split()])
    with pytest.raises(UsageError) as found:
        keyword_arguments({"dataset": ["a.csv"], **keywords})
    assert str(found.value) == str(expected.value)


def test_a_keyword_of_another_type_is_named() -> None:
    with pytest.raises(UsageError, match=r"^--batch_size: expected a whole number, found \[8\]$"):
        keyword_arguments({"dataset": ["a.csv"], "batch_size": [8]})
