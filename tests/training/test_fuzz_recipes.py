"""Any recipe and any flags: the right values, or an error that names the file or the key."""

import string
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.command_line.recipes import read_recipe
from tests.helpers.fuzzing import TEXT, VALUES, cases, damaged, fuzz, result_or_error
from tests.helpers.runs import ROOT

HINTS = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name != "recipe"}
RECIPES = sorted((ROOT / "configuration" / "recipes").glob("*.yaml"))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of a field, as in a recipe."""
    kinds = {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: TEXT}
    options = []
    for kind in (hint, *get_args(hint)):
        if kind in kinds:
            options.append(kinds[kind])
        elif kind is type(None):
            options.append(st.none())
        elif get_args(kind) and all(isinstance(choice, str) for choice in get_args(kind)):
            options.append(st.sampled_from(get_args(kind)))
    return st.one_of(options)


@cases(40, 2000)
def test_a_recipe_is_read_as_written(tmp_path: Path, record_property: Any, count: int) -> None:
    fields = {name: values_of(hint) for name, hint in HINTS.items() if name != "augmentation"}

    @fuzz(count, record_property)
    @given(values=st.fixed_dictionaries({}, optional=fields))
    def check(values: dict[str, Any]) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        assert read_recipe(path) == values

    check()


@cases(60, 3000)
def test_any_value_is_accepted_or_an_error_names_it(tmp_path: Path, record_property: Any, count: int) -> None:
    path = tmp_path / "recipe.yaml"

    @fuzz(count, record_property)
    @given(key=st.sampled_from(sorted(HINTS)) | st.text(string.ascii_lowercase + "_", max_size=12), value=VALUES)
    @example(key="lr_scheduler_kwargs", value={"hold_steps": date(2001, 1, 1)})
    @example(key="lr_scheduler_kwargs", value={2: [None]})
    @example(key="augmentation", value=[{"name": "Blur", "when": date(2001, 1, 1)}])
    def check(key: str, value: Any) -> None:
        path.write_text(yaml.safe_dump({"dataset": "scenes"} | {key: value}), encoding="utf-8")
        arguments, message = result_or_error(parse_arguments, ["--recipe", str(path)])
        assert isinstance(arguments, TrainingArguments) or str(path) in message or f"--{key}" in message

    check()


@cases(40, 3000)
def test_damaged_recipes_are_read_or_rejected(tmp_path: Path, record_property: Any, count: int) -> None:
    seeds = [path.read_bytes() for path in RECIPES]
    assert len(seeds) >= 2
    path = tmp_path / "recipe.yaml"

    @fuzz(count, record_property)
    @given(content=damaged(st.sampled_from(seeds)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        arguments, message = result_or_error(parse_arguments, ["--recipe", str(path), "--dataset", "scenes"])
        assert isinstance(arguments, TrainingArguments) or message

    check()


NESTED = "a: &a [x]\nb: &b [*a, *a]\nseed: [*b, *b]"  # each line doubles the size when written out


@pytest.mark.parametrize(
    "content",
    [
        "seed: 2001-99-99", "seed: !!timestamp x", "seed: !!bool x", "seed: !!int x", "dataset: !!binary x",
        "[" * 1000, "{" * 1000, "seed: " + "1" * 5000, "seed: 0x" + "f" * 6000, "&a [*a]", "? [a]\n: b", NESTED,
        "seed: !!python/object/apply:os.system [exit]", "\ufeff\0", "dataset: [a", "", "- seed",
        "augmentation: &a [*a]", "dataset: \"a\\0b\"",
    ],
)  # fmt: skip
def test_recipes_found_by_fuzzing_are_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    arguments, message = result_or_error(parse_arguments, ["--recipe", str(path)])
    assert arguments is None and (str(path) in message or "--dataset" in message)


def test_an_alias_may_replace_a_single_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("vision_learning_rate: &rate 1e-4\ntext_learning_rate: *rate\n", encoding="utf-8")
    assert read_recipe(path) == {"vision_learning_rate": 1e-4, "text_learning_rate": 1e-4}


@cases(40, 2000)
def test_any_flags_are_accepted_or_rejected(record_property: Any, count: int) -> None:
    known = st.sampled_from(sorted(HINTS)).map(lambda name: f"--{name}")
    word = st.one_of(known, TEXT, st.tuples(known, TEXT).map("=".join)).filter(
        lambda w: not w.startswith(("-h", "--he"))
    )

    @fuzz(count, record_property)
    @given(words=st.lists(word, max_size=5))
    def check(words: list[str]) -> None:
        arguments, message = result_or_error(parse_arguments, ["--dataset", "scenes", *words])
        assert isinstance(arguments, TrainingArguments) or message

    check()
