"""Parse the command line of a run, and its recipe, into `TrainingArguments`."""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ...errors import UsageError
from ...utils.commands import run_command
from ...utils.processes import is_child
from ...utils.resources import named_file
from .arguments import (
    DEFAULT_TEXT_MODEL,
    DEFAULT_VISION_MODEL,
    LIST_FLAGS,
    MODEL_SOURCES,
    PART_RATES,
    TrainingArguments,
    build_parser,
)
from .check_arguments import check_arguments, matryoshka_dims
from .recipes import read_recipe, unknown_flag, values_of_keywords


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """Arguments of a run. Flags override the recipe, and the recipe overrides the defaults.

    A flag that says where the model comes from drops the recipe's other sources: with `--preset` a recipe's
    `vision_model` and `text_model` are ignored. In the same way `--learning_rate` overrides all rates of a recipe,
    `--time_limit` its epochs, steps and warm-up, and `--lora_rank` the rates of the towers, unless they are those of
    adapters.

    Args:
        argv: flags; None takes the command line of this process.

    Returns:
        The checked arguments, with the defaults filled in that depend on other flags. Those that depend on the data
        are None until [`derive`][modeling_miniclip.training.command_line.derived.derive] fills them in.

    Raises:
        UsageError: an unknown key or flag (the message suggests the nearest valid name), a value of the wrong type, or
            values that exclude each other.
    """
    return _with_recipe(parse_flags(argv))


def keyword_arguments(keywords: Mapping[str, Any]) -> TrainingArguments:
    """Arguments of a run from Python values, under the rules and with the messages of [`parse_arguments`].

    Args:
        keywords: values by the name of their flag, each of its type or as a recipe may write it; None is left out.

    Raises:
        UsageError: as in [`parse_arguments`].
    """
    return _with_recipe(values_of_keywords(keywords))


def _with_recipe(given: dict[str, Any]) -> TrainingArguments:
    """The checked arguments of what was given, of its recipe and of the defaults."""
    recipe = given.get("recipe") or ("scenes" if given.get("dataset") is None else None)
    values: dict[str, Any] = {}
    if recipe is not None:
        values = spread_learning_rate(read_recipe(named_file(recipe, "recipes", ".yaml"))) | {"recipe": recipe}
        for name in (*_replaced_sources(given), *_replaced_schedule(given), *_replaced_rates(given, values)):
            values.pop(name, None)
    arguments = TrainingArguments(**(values | spread_learning_rate(given)))
    if arguments.dataset is None:
        raise UsageError(f"--dataset is missing: the recipe {recipe} names no data to train on")
    check_arguments(arguments)
    return fill_in_defaults(arguments)


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags on a command line with their values; flags that are not given are missing.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    flags = [field.name for field in fields(TrainingArguments)]
    missing = object()  # argparse does not fill in a default where it finds a value
    namespace, rest = build_parser().parse_known_args(argv, Namespace(**dict.fromkeys(flags, missing)))
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"unexpected argument {rest[0]!r}{LIST_FLAGS}")
    if rest:
        raise unknown_flag(rest[0])
    return {name: value for name, value in vars(namespace).items() if value is not missing}


def spread_learning_rate(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a recipe or a command line, with its `learning_rate` as the rate of each part that has none in it."""
    rate = values.get("learning_rate")
    return values if rate is None else dict.fromkeys(PART_RATES, rate) | values


def _replaced_sources(given: dict[str, Any]) -> list[str]:
    """Fields that say where the model comes from, and that the given flags replace."""
    chosen = [names for names in MODEL_SOURCES if any(given.get(name) is not None for name in names)]
    return [name for names in MODEL_SOURCES if chosen and names not in chosen for name in names]


def _replaced_schedule(given: dict[str, Any]) -> tuple[str, ...]:
    """Fields of a recipe that a given time limit decides."""
    return ("num_train_epochs", "max_steps", "warmup_steps") if given.get("time_limit") else ()


def _replaced_rates(given: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, ...]:
    """Fields of a recipe for weights, not for adapters, which need higher rates."""
    are_adapted = given.get("lora_rank") is not None and recipe.get("lora_rank") is None
    return ("vision_learning_rate", "text_learning_rate") if are_adapted else ()


def fill_in_defaults(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments with the defaults that depend on other flags; `learning_rate` is now in the rates of the parts."""
    vision_model, text_model = arguments.vision_model, arguments.text_model
    if arguments.preset is None and arguments.model_name_or_path is None:
        vision_model, text_model = vision_model or DEFAULT_VISION_MODEL, text_model or DEFAULT_TEXT_MODEL
    freeze_batch_norm = arguments.freeze_batch_norm
    if freeze_batch_norm is None:
        freeze_batch_norm = arguments.preset is None
    return replace(
        arguments,
        vision_model=vision_model,
        text_model=text_model,
        freeze_batch_norm=freeze_batch_norm,
        matryoshka_dims=[str(dim) for dim in matryoshka_dims(arguments)] or None,
        learning_rate=None,
    )


def command_line() -> tuple[list[str], bool]:
    """The flags of this process, and whether `--debug` is among them."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    return argv, len(argv) < len(sys.argv) - 1


def exit_on_wrong_flags() -> None:
    """Print `--help`, or the error in the flags of this process, and exit; return if the flags are right.

    They are if `multiprocessing` started this process, since its parent has checked them.
    """
    if is_child():
        return
    argv, debug = command_line()
    code = run_command(lambda: parse_arguments(argv), debug)
    if code:
        sys.exit(code)
