"""Read a recipe, which is a YAML file of flags, or flags from Python, and write a run's arguments as a recipe."""

import json
import os
import reprlib
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ...errors import UsageError, did_you_mean, one_line
from ...utils.files import replace_text
from ...utils.plain_yaml import load_yaml
from .arguments import DERIVED, LIST_FLAGS, TrainingArguments, build_parser, choices_of, element_of
from .check_arguments import augmentation_list

MAPPINGS = ("lr_scheduler_kwargs", "lora_kwargs", "teacher_kwargs")  # flags that are mappings in a recipe


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe with their values, each of its flag's type.

    Raises:
        UsageError: the file is not a YAML mapping, a key is not a flag, or a value has the wrong type; names the file
            and the key.
    """
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: not a readable YAML file, expected lines of `key: value`: {one_line(error)}"
        ) from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: expected a mapping of arguments, found {type(recipe).__name__}")
    hints = get_type_hints(TrainingArguments)
    hints.pop("recipe")
    parser = build_parser()
    values = {}
    if isinstance(recipe.get("dataset"), dict) and "dataset_weights" not in recipe:
        recipe |= {"dataset": list(recipe["dataset"]), "dataset_weights": list(recipe["dataset"].values())}
    for key, value in recipe.items():
        if key not in hints:
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(str(key), hints, LIST_FLAGS)}")
        try:
            values[key] = _value_of(parser, key, value, hints[key])
        except ValueError as error:
            found = "nothing" if value is None else _shown(value)
            raise UsageError(f"{path}: {key}: expected {_expected(key, hints[key])}, found {found}") from error
    return values


class _WrongType(UsageError):
    """A value is of no type that its flag takes."""


def values_of_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Values of flags that a Python program passes by name, each of its flag's type; None counts as not passed.

    Args:
        keywords: values of the type of their flag, or as a recipe has them; also paths, tuples and numbers of NumPy.

    Raises:
        UsageError: a name is no flag, or a value has the wrong type; with the message of the command line.
    """
    hints = get_type_hints(TrainingArguments)
    parser = build_parser()
    values = {}
    for key, value in keywords.items():
        if key not in hints:
            raise unknown_flag(f"--{key}")
        if value is None:
            continue
        try:
            values[key] = _value_of(parser, key, _plain(value), hints[key])
        except _WrongType as error:
            raise UsageError(f"--{key}: expected {_expected(key, hints[key])}, found {_shown(value)}") from error
    return values


def unknown_flag(word: str) -> UsageError:
    """The error for a word on the command line that is no flag; it suggests the most similar one."""
    name = f"--{word.lstrip('-').split('=')[0].replace('-', '_')}"
    flags = [f"--{field.name}" for field in fields(TrainingArguments)]
    return UsageError(f"unknown flag {word!r}{did_you_mean(name, flags, LIST_FLAGS)}")


def _plain(value: Any) -> Any:
    """A Python value as YAML would give it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value


def _value_of(parser: ArgumentParser, key: str, value: Any, hint: Any) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    if (element := element_of(hint)) is not None:
        several = value if isinstance(value, list) and value else [value]
        return [_value_of_one(parser, key, one, element)[0] for one in several]
    return _value_of_one(parser, key, value, hint)


def _value_of_one(parser: ArgumentParser, key: str, value: Any, hint: Any) -> Any:
    # argparse converts text: it reads 1e-3, which is a string to PyYAML, and rejects 1.5 for an integer.
    parsed = parser.parse_args([f"--{key}={_as_flag(key, value, hint)}"])
    if key == "augmentation":
        augmentation_list(TrainingArguments(augmentation=parsed.augmentation))
    return getattr(parsed, key)


def _as_flag(key: str, value: Any, hint: Any) -> str:
    """A YAML value as it would be written on the command line."""
    kinds = (hint, *get_args(hint))
    if isinstance(value, bool):
        if bool in kinds:
            return str(value)
        if not value and "no" in choices_of(hint):  # YAML reads an unquoted no as false
            return "no"
    elif (key, type(value)) in (("augmentation", list), *((name, dict) for name in MAPPINGS)):
        try:
            return json.dumps(value)
        except TypeError:  # YAML also has dates and sets
            pass
    elif isinstance(value, str) or (isinstance(value, int | float) and (int in kinds or float in kinds)):
        return str(value)
    elif isinstance(value, int) and key in ("checkpointing_steps", "matryoshka_dims", "blend"):
        return str(value)
    elif isinstance(value, float) and key == "blend":
        return str(value)
    raise _WrongType(f"{_shown(value)} has the wrong type")


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print an integer of more than 4300 digits
        return f"a {type(value).__name__}"


def _expected(key: str, hint: Any) -> str:
    """A type in words for the user."""
    if key == "augmentation":
        return "a list of mappings with a name each"
    if key in MAPPINGS:
        return "a mapping"
    if key == "blend":
        return "auto, or a number from 0 to 1"
    if key == "matryoshka_dims":
        return "whole numbers, as in 64,128,256 or [64, 128, 256]"
    if choices_of(hint):
        return f"one of {', '.join(choices_of(hint))}"
    if (element := element_of(hint)) is not None:
        return f"{_expected(key, element)}, or a list of it"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes if necessary)"}
    return next(word for kind, word in words.items() if kind in (hint, *get_args(hint)))


def save_arguments(arguments: TrainingArguments, path: Path) -> None:
    """Write the arguments as a recipe that repeats the run: `--recipe arguments.yaml`.

    Flags that concern a single start (resuming, overwriting, pushing, a test on one batch) are left out. So are the
    time limit, once it has set the number of steps, and derived flags without a value.
    """
    values = asdict(arguments)
    for name in ("recipe", "overfit_batch", "resume_from_checkpoint", "discard_later_checkpoints",
                 "overwrite_output_dir", "push_to_hub"):  # fmt: skip
        values.pop(name)
    if arguments.num_train_epochs is not None:
        values.pop("time_limit")
    for name in DERIVED:
        if values[name] is None:
            values.pop(name)
    if "augmentation" in values:
        values["augmentation"] = augmentation_list(arguments)
    for name in MAPPINGS:
        if values[name] is not None:
            values[name] = load_yaml(values[name])
    replace_text(path, yaml.safe_dump(values, sort_keys=False))
