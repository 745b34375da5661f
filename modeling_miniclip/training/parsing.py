"""Parse flags and recipes into `TrainingArguments`, and check them."""

import importlib.util
import json
import math
import re
import reprlib
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ..errors import MiniClipError, UsageError, did_you_mean, one_line
from ..utils.files import replace_text
from ..utils.resources import named_file
from .arguments import LOWER_BOUNDS, MODEL_SOURCES, PART_RATES, TrainingArguments, choices_of, describe_flags

LIST = "; --help lists them all"


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """Arguments of a run. Flags override the recipe, and the recipe overrides the defaults.

    A flag that says where the model comes from drops the recipe's other sources: with `--preset` a recipe's
    `vision_model` and `text_model` are ignored. In the same way `--learning_rate` overrides all rates of a recipe.

    Args:
        argv: flags; None takes the command line of this process.

    Returns:
        The checked arguments. `learning_rate` is None in them: the rates of the parts have taken it over.

    Raises:
        UsageError: an unknown key or flag (the message suggests the nearest valid name), a value of the wrong type, or
            values that exclude each other.
    """
    given = parse_flags(argv)
    recipe = given.get("recipe") or ("scenes" if given.get("dataset") is None else None)
    values: dict[str, Any] = {}
    if recipe is not None:
        values = spread_learning_rate(read_recipe(named_file(recipe, "recipes", ".yaml"))) | {"recipe": recipe}
        for name in _replaced_sources(given):
            values.pop(name, None)
    arguments = TrainingArguments(**(values | spread_learning_rate(given)))
    if arguments.dataset is None:
        raise UsageError(f"--dataset is missing: the recipe {recipe} names no data to train on")
    check_arguments(arguments)
    return replace(arguments, learning_rate=None)


def build_parser() -> ArgumentParser:
    """The command line, made from the fields of [`TrainingArguments`]."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:  # argparse would end the process
            raise UsageError(re.sub(r"^argument (--\w+)[^:]*", r"\1", message))

        def format_help(self) -> str:
            return describe_flags()

    return Parser(TrainingArguments, prog="train_miniclip.py", allow_abbrev=False)


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags on a command line with their values; flags that are not given are missing.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    flags = [field.name for field in fields(TrainingArguments)]
    missing = object()  # where argparse finds a value, it does not fill in the default
    namespace, rest = build_parser().parse_known_args(argv, Namespace(**dict.fromkeys(flags, missing)))
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"unexpected argument {rest[0]!r}{LIST}")
    if rest:
        name = f"--{rest[0].lstrip('-').split('=')[0].replace('-', '_')}"
        raise UsageError(f"unknown flag {rest[0]!r}{did_you_mean(name, [f'--{flag}' for flag in flags], LIST)}")
    return {name: value for name, value in vars(namespace).items() if value is not missing}


def spread_learning_rate(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a recipe or a command line, with its `learning_rate` as the rate of each part that has none in it."""
    rate = values.get("learning_rate")
    return values if rate is None else dict.fromkeys(PART_RATES, rate) | values


def _replaced_sources(given: dict[str, Any]) -> list[str]:
    """Fields that say where the model comes from, and that the given flags replace."""
    chosen = [names for names in MODEL_SOURCES if any(given.get(name) is not None for name in names)]
    return [name for names in MODEL_SOURCES if chosen and names not in chosen for name in names]


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe with their values, each of its field's type.

    Raises:
        UsageError: not a YAML mapping, a key that is no argument, or a value of the wrong kind; with file and key.
    """
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: not a YAML file that can be read, expected lines of `key: value`: {one_line(error)}"
        ) from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: expected a mapping of arguments, found {type(recipe).__name__}")
    hints = get_type_hints(TrainingArguments)
    hints.pop("recipe")
    parser = build_parser()
    values = {}
    for key, value in recipe.items():
        if key not in hints:
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(str(key), hints, LIST)}")
        try:
            values[key] = _recipe_value(parser, key, value, hints[key])
        except ValueError as error:
            found = "nothing" if value is None else _shown(value)
            raise UsageError(f"{path}: {key}: expected {_expected(key, hints[key])}, found {found}") from error
    return values


class _FlatLoader(yaml.SafeLoader):
    """Aliases stand for scalars only: those of lists and mappings can grow without bound, or have no end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        aliased = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if aliased and isinstance(node, yaml.CollectionNode):
            raise ValueError(f"an alias of a list or mapping, first written at{node.start_mark}; write it out")
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text, without tags that build objects.

    Raises:
        ValueError: not YAML, or a value that is not what it looks like (a date on a 99th).
    """
    try:
        return yaml.load(text, _FlatLoader)  # a SafeLoader
    except Exception as error:  # its constructors raise all sorts: KeyError, AttributeError, RecursionError
        raise ValueError(one_line(error)) from error


def _recipe_value(parser: ArgumentParser, key: str, value: Any, hint: Any) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    # argparse converts text: it reads 1e-3, which PyYAML takes for a string, and refuses 1.5 for an integer.
    parsed = parser.parse_args([f"--{key}={_as_flag(key, value, hint)}"])
    if key == "augmentation":
        augmentation_list(TrainingArguments(augmentation=parsed.augmentation))
    return getattr(parsed, key)


def _as_flag(key: str, value: Any, hint: Any) -> str:
    kinds = (hint, *get_args(hint))
    if isinstance(value, bool):
        if bool in kinds:
            return str(value)
        if not value and "no" in choices_of(hint):  # YAML's word for false
            return "no"
    elif isinstance(value, list) and key == "augmentation":
        try:
            return json.dumps(value)
        except TypeError:  # YAML also knows dates and sets
            pass
    elif isinstance(value, str) or (isinstance(value, int | float) and (int in kinds or float in kinds)):
        return str(value)
    elif isinstance(value, int) and key == "checkpointing_steps":
        return str(value)
    raise UsageError(f"{_shown(value)} is of the wrong type")


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write out a whole number of more than 4300 digits
        return f"a {type(value).__name__}"


def _expected(key: str, hint: Any) -> str:
    """A type as a user reads it."""
    if key == "augmentation":
        return "a list of mappings with a name each"
    if choices_of(hint):
        return f"one of {', '.join(choices_of(hint))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes if need be)"}
    return next(word for kind, word in words.items() if kind in (hint, *get_args(hint)))


def check_arguments(arguments: TrainingArguments) -> None:
    """Check ranges and combinations that the parser cannot know.

    Raises:
        UsageError: naming the flag.
        MiniClipError: a tracker that is not installed.
    """
    from ..evaluation.metrics import METRIC_NAMES

    sources = [[name for name in names if getattr(arguments, name) is not None] for names in MODEL_SOURCES]
    named = [names for names in sources if names]
    if len(named) > 1:
        clash = " and ".join(f"--{name}" for names in named for name in names)
        raise UsageError(f"{clash} exclude each other: a model comes from a preset, from an export or from two towers")
    if arguments.best_metric not in ("loss", *METRIC_NAMES):
        raise UsageError(f"--best_metric {arguments.best_metric}: choose from loss, {', '.join(METRIC_NAMES)}")
    for name, value in asdict(arguments).items():
        if isinstance(value, str) and "\0" in value:
            raise UsageError(f"--{name} holds a null character, as no name or path does: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} must be a finite number, not {value}")
    for name, bound in LOWER_BOUNDS.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise UsageError(f"--{name} must be at least {bound}, not {value}")
    if arguments.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, not {arguments.seed}")
    for name in ("learning_rate", *PART_RATES, "max_grad_norm"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be positive, not {value}")
    for name in ("lr_plateau_factor", "validation_fraction"):
        if not 0 < getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be between 0 and 1, not {getattr(arguments, name)}")
    for name in ("dropout", "projection_dropout", "frozen_vision_fraction", "frozen_text_fraction", "ema_decay"):
        if not 0 <= (getattr(arguments, name) or 0) < 1:
            raise UsageError(f"--{name} must be in [0, 1), not {getattr(arguments, name)}")
    for name in ("layer_decay", "crop_pct"):
        if getattr(arguments, name) is not None and not 0 < getattr(arguments, name) <= 1:
            raise UsageError(f"--{name} must be in (0, 1], not {getattr(arguments, name)}")
    if not 0 <= arguments.max_bad_image_fraction <= 1:
        raise UsageError(f"--max_bad_image_fraction must be in [0, 1], not {arguments.max_bad_image_fraction}")
    if arguments.num_views is not None and arguments.freeze not in ("vision", "both"):
        raise UsageError("--num_views needs a frozen image tower: add --freeze vision or --freeze both")
    if arguments.num_views is not None and not augmentation_list(arguments):
        raise UsageError("--num_views needs an augmentation, --augmentation is []: without one all views are alike")
    if arguments.train_image_size is not None and not augmentation_list(arguments):
        raise UsageError(
            "--train_image_size is the size of augmented images, and there is no augmentation: name one by "
            "--augmentation, or leave --train_image_size out"
        )
    checkpoint_interval(arguments)
    tracker = arguments.report_to
    if tracker not in ("none", "all") and importlib.util.find_spec(tracker) is None:
        raise MiniClipError(f"--report_to {tracker}: {tracker} is not installed; pip install {tracker}")
    augmentation_list(arguments)


def checkpoint_interval(arguments: TrainingArguments) -> int | None:
    """Steps between two checkpoints; None for one after each epoch.

    Raises:
        UsageError: `--checkpointing_steps` is neither.
    """
    if arguments.checkpointing_steps == "epoch":
        return None
    if not arguments.checkpointing_steps.isdecimal() or int(arguments.checkpointing_steps) < 1:
        raise UsageError(
            f"--checkpointing_steps must be 'epoch' or a whole number of steps, not {arguments.checkpointing_steps}"
        )
    return int(arguments.checkpointing_steps)


def augmentation_list(arguments: TrainingArguments) -> list[dict[str, Any]]:
    """The transforms that `--augmentation` names, or the default ones.

    By default a frozen image tower gets none, so that its features are computed once; `--num_views` asks for some.

    Raises:
        UsageError: not a list of mappings with a name each.
    """
    from ..data.augmentation import DEFAULT_AUGMENTATION

    if arguments.augmentation is None:
        is_run_once = arguments.freeze in ("vision", "both") and arguments.num_views is None
        return [] if is_run_once else list(DEFAULT_AUGMENTATION)
    try:
        transforms: Any = load_yaml(arguments.augmentation)
    except ValueError as error:
        raise UsageError(f"--augmentation is neither JSON nor YAML: {error}") from error
    if not isinstance(transforms, list) or not all(isinstance(t, dict) and "name" in t for t in transforms):
        raise UsageError(f"--augmentation must be a list of mappings with a name each, not {arguments.augmentation}")
    return list(transforms)


def save_arguments(arguments: TrainingArguments, path: Path) -> None:
    """Write the resolved arguments as a recipe that repeats the run: `--recipe arguments.yaml`.

    Whether the run was a test, went on from a checkpoint, deleted an earlier one or was pushed belongs to one start:
    left out.
    """
    values = asdict(arguments)
    for name in ("recipe", "overfit_batch", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub"):
        values.pop(name)
    if values["augmentation"] is not None:
        values["augmentation"] = augmentation_list(arguments)
    replace_text(path, yaml.safe_dump(values, sort_keys=False))
