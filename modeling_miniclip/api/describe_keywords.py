"""The training flags as keyword arguments of `train`: a file with their types, a signature and a docstring."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from ..training.command_line.arguments import FLAG_GROUPS, TrainingArguments, choices_of, element_of
from ..utils.files import replace_text
from ..utils.resources import PACKAGE

OWN = ("dataset", "validation_dataset", "output_dir")  # parameters of `train` itself
# Flags that take a path.
PATHS = frozenset(
    "recipe zero_shot_dataset retention_dataset image_dir dataset_cache_dir vision_model text_model preset "
    "model_name_or_path teacher feature_cache_dir resume_from_checkpoint".split()
)
# What a flag takes from Python, as from a recipe, besides its text on the command line.
WIDER = {
    "augmentation": "list[dict[str, Any]]",
    "lr_scheduler_kwargs": "dict[str, Any]",
    "lora_kwargs": "dict[str, Any]",
    "blend": "float",
    "matryoshka_dims": "list[int]",
    "teacher_kwargs": "dict[str, Any]",
    "checkpointing_steps": "int",
}
WIDTH = 119
HEADER = '''"""Keyword arguments of `train`, written by `make docs` from the training flags: do not edit."""

from os import PathLike
from typing import Any, Literal, TypedDict


class TrainingKeywords(TypedDict, total=False):
    """The training flags; one that is left out, or None, has its default."""
'''


def keywords_module() -> str:
    """The text of `keywords.py`."""
    lines = [HEADER]
    for name, (kind, text) in described_keywords().items():
        if name in FLAG_GROUPS:
            lines.append(f"    # {FLAG_GROUPS[name]}\n")
        words = textwrap.wrap(f'"""{text}"""', WIDTH - 4, break_on_hyphens=False, break_long_words=False)
        lines.append("\n".join([f"    {name}: {kind}", *(f"    {line}" for line in words)]) + "\n")
    return "\n".join(lines)


def described_keywords() -> dict[str, tuple[str, str]]:
    """Type and meaning of each keyword argument, the default last."""
    hints = get_type_hints(TrainingArguments)
    found: dict[str, tuple[str, str]] = {}
    for flag in fields(TrainingArguments):
        if flag.name not in OWN:
            text = flag.metadata["help"]
            if flag.default is not None:
                text += f" ({flag.default})"
            found[flag.name] = (type_of(flag.name, hints[flag.name]), text)
    return found


def type_of(name: str, hint: Any) -> str:
    """The type of a keyword argument as source code."""
    kinds = (hint, *get_args(hint))
    if choices := choices_of(hint):
        names = ", ".join(f'"{choice}"' for choice in choices)
        base = f"Literal[{names}]"
    elif (element := element_of(hint)) is not None:
        base = f"{element.__name__} | list[{element.__name__}]"
    else:
        base = next(kind.__name__ for kind in (bool, int, float, str) if kind in kinds)
    path = "PathLike[str]" if name in PATHS else None
    return " | ".join(filter(None, (base, WIDER.get(name), path, "None")))


def show_keywords(function: Callable[..., Any], keywords: type) -> None:
    """Give a function that takes `**flags` a signature and a docstring with each of them, as notebooks show these.

    Args:
        function: function whose docstring has a line `**flags: ...` at the end of its arguments.
        keywords: the typed dictionary of the flags.
    """
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {flag.name: flag.default for flag in fields(TrainingArguments)}
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind)
        for name, kind in get_type_hints(keywords).items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *further])  # type: ignore[attr-defined]
    if function.__doc__ is not None:  # Python leaves docstrings out with -OO
        lines = []
        for line in function.__doc__.splitlines():
            lines.append(line)
            if line.lstrip().startswith("**flags:"):
                lines += [f"        {name}: {text}." for name, (_, text) in described_keywords().items()]
        function.__doc__ = "\n".join(lines)


if __name__ == "__main__":
    replace_text(PACKAGE / "api" / "keywords.py", keywords_module())
