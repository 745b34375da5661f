"""The arguments of a training run: code defaults, below a recipe's YAML, below the flags."""

import argparse
import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UsageError
from .resources import named_file


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """Every flag of `train_miniclip.py`, in the groups of `configuration/README.md`, which is made from this class."""

    # What to train on
    recipe: str | None = _flag(
        None, "YAML file of flags, or the name of one in configuration/recipes; 'scenes' if no dataset is named either"
    )
    dataset: str | None = _flag(
        None, "CSV file, folder, Hub data set, or 'scenes' for the built-in one (see load_captions)"
    )
    image_dir: str | None = _flag(None, "folder of the images of a CSV, if not found beside it")
    image_column: str = _flag("image", "column that identifies the image")
    caption_column: str = _flag("caption", "column with the text, or the stem of caption_0, caption_1, ...")
    dataset_revision: str | None = _flag(None, "commit, branch or tag of a Hub data set")
    validation_fraction: float = _flag(0.1, "share of images set aside where the data set has no validation split")
    max_train_images: int | None = _flag(None, "use only the first so many training images, for a trial")
    max_validation_images: int | None = _flag(None, "use only the first so many validation images, for a trial")
    num_workers: int = _flag(2, "loader processes that decode and augment; 0 does it in the training process")

    # The model
    vision_model: str | None = _flag(
        None, "pretrained image tower: timm name, timm repository or folder (resnet50.a1_in1k)"
    )
    text_model: str | None = _flag(
        None, "pretrained text tower: Hub name or folder of a text encoder (distilbert-base-uncased)"
    )
    preset: str | None = _flag(
        None,
        "train from random weights: JSON of a MiniClipConfig, or the name of one in configuration/presets; a "
        "WordPiece vocabulary is trained on the captions",
    )
    model_name_or_path: str | None = _flag(None, "start from a trained MiniCLIP: export folder or Hub repository")
    text_pooling: Literal["cls", "mean"] | None = _flag(None, "how a text's token states become one vector (cls)")
    projection_dim: int | None = _flag(None, "size of the shared space (256)")
    projection_depth: int | None = _flag(None, "linear layers in each projection head; 1 is a plain projection (2)")
    dropout: float | None = _flag(None, "dropout of heads and towers (0.1 in the heads, the towers' own in them)")
    image_size: int | None = _flag(None, "pixels per side (the image tower's own)")
    max_length: int | None = _flag(None, "longest caption in tokens (the text tower's limit)")
    freeze: Literal["none", "vision", "text", "both"] = _flag("none", "towers that keep their weights")
    freeze_batch_norm: bool | None = _flag(
        None, "keep the image tower's batch-norm statistics (true for pretrained towers, false from random weights)"
    )

    # The optimisation
    batch_size: int = _flag(32, "images per optimiser step, over all processes together")
    captions_per_image: int = _flag(1, "captions drawn for each image of a step")
    num_train_epochs: int = _flag(4, "passes over the training images")
    max_steps: int | None = _flag(None, "stop after so many optimiser steps")
    learning_rate: float = _flag(1e-3, "of the projection heads and the temperature")
    vision_learning_rate: float = _flag(1e-4, "of the image tower")
    text_learning_rate: float = _flag(1e-5, "of the text tower")
    weight_decay: float = _flag(1e-3, "AdamW's, for weight matrices only")
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to this norm")
    lr_scheduler_type: Literal["plateau", "cosine"] = _flag(
        "plateau", "plateau: lower the rates when the validation loss stops falling; cosine: warm-up, then down to 0"
    )
    lr_plateau_patience: int = _flag(1, "plateau: epochs without improvement before the rates are lowered")
    lr_plateau_factor: float = _flag(0.8, "plateau: what the rates are multiplied with")
    warmup_steps: int = _flag(0, "cosine: steps of linear warm-up")
    augmentation: str | None = _flag(
        None,
        "albumentations for training images: list of {name, arguments} as JSON or YAML, [] for none (mild ones)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(None, "bf16 where the accelerator has it, else no")
    seed: int = _flag(0, "of weights, batches, captions, augmentation and dropout")

    # What is kept and shown
    output_dir: str = _flag("miniclip-output", "folder of the result")
    overwrite_output_dir: bool = _flag(False, "delete an earlier run in output_dir")
    resume_from_checkpoint: str | None = _flag(None, "'latest', or a folder in output_dir/checkpoints")
    save_total_limit: int = _flag(2, "resumable checkpoints kept, one is written per epoch")
    best_metric: str = _flag("loss", "validation metric that decides which model is exported")
    early_stopping_patience: int | None = _flag(None, "stop after so many epochs without improvement of best_metric")
    logging_steps: int = _flag(10, "steps between two lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _flag("none", "experiment tracker")
    push_to_hub: bool = _flag(False, "upload the export when training ends")
    hub_model_id: str | None = _flag(None, "repository to upload to (the user's, named like output_dir)")
    hub_private_repo: bool = _flag(False, "create that repository as private")


# Fields whose text in the class above starts a new group of flags.
FLAG_GROUPS = {
    "recipe": "What to train on",
    "vision_model": "The model",
    "batch_size": "The optimisation",
    "output_dir": "What is kept and shown",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of [`TrainingArguments`]."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:  # argparse would end the process
            raise UsageError(message)

    return Parser(
        TrainingArguments,
        prog="train_miniclip.py",
        allow_abbrev=False,
        description="Train a CLIP of your own on captioned images. Without arguments: the built-in recipe 'scenes'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """Arguments of a run: code defaults < recipe < flags.

    Args:
        argv: flags; None takes those of the process.

    Raises:
        UsageError: an unknown key or flag (the nearest valid name is told), a value of the wrong kind, or values that
            exclude each other.
    """
    parser = build_parser()
    parser.set_defaults(**_recipe_defaults(parser, argv))
    arguments = _parse(parser, argv)
    if arguments.recipe is None and arguments.dataset is None:
        arguments.recipe = "scenes"
    validate(arguments)
    return arguments


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> TrainingArguments:
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise UsageError(f"unknown flag {rest[0]!r}" + nearest(rest[0].lstrip("-").split("=")[0], "--"))
    return TrainingArguments(**vars(namespace))


def nearest(name: str, prefix: str = "") -> str:
    """`"; did you mean ...?"` with the argument whose name is nearest, or nothing."""
    near = difflib.get_close_matches(name, [field.name for field in fields(TrainingArguments)], n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; see --help"


def _recipe_defaults(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, str | None]:
    given, _ = parser.parse_known_args(argv)
    recipe = given.recipe or ("scenes" if given.dataset is None else None)
    if recipe is None:
        return {}
    path = named_file(recipe, "recipes", ".yaml")
    defaults = {name: _as_flag(value) for name, value in read_recipe(path).items()}
    try:
        # One flag after the other, so that a value of the wrong kind is named with its recipe.
        build_parser().parse_args([f"--{name}={value}" for name, value in defaults.items() if value is not None])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return defaults


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe.

    Raises:
        UsageError: not a YAML mapping, or a key that is no argument.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: expected a mapping of arguments, found {type(recipe).__name__}")
    known = {field.name for field in fields(TrainingArguments)} - {"recipe"}
    for key in recipe:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}" + nearest(str(key)))
    return recipe


def _as_flag(value: Any) -> str | None:
    # argparse converts text: it reads 1e-3, which PyYAML takes for a string, and refuses 1.5 for an integer.
    if value is None:
        return None
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


LOWER_BOUNDS = {
    **dict.fromkeys(("batch_size", "captions_per_image", "num_train_epochs", "max_steps", "logging_steps"), 1),
    **dict.fromkeys(("max_train_images", "max_validation_images", "image_size", "max_length", "save_total_limit"), 1),
    **dict.fromkeys(("num_workers", "seed", "warmup_steps", "lr_plateau_patience", "weight_decay"), 0),
}


def validate(arguments: TrainingArguments) -> None:
    """Check ranges and combinations that the parser cannot know.

    Raises:
        UsageError: naming the flag.
    """
    from .evaluation import METRIC_NAMES

    sources = [name for name in ("preset", "model_name_or_path") if getattr(arguments, name) is not None]
    towers = [name for name in ("vision_model", "text_model") if getattr(arguments, name) is not None]
    if len(sources) > 1 or (sources and towers):
        clash = " and ".join(f"--{name}" for name in (*sources, *towers))
        raise UsageError(f"{clash} exclude each other: a model comes from a preset, from an export or from two towers")
    if arguments.best_metric not in ("loss", *METRIC_NAMES):
        raise UsageError(f"--best_metric {arguments.best_metric}: choose from loss, {', '.join(METRIC_NAMES)}")
    at_least = dict.fromkeys(
        ("batch_size", "captions_per_image", "num_train_epochs", "logging_steps", "save_total_limit"), 1
    )
    at_least |= dict.fromkeys(
        ("max_steps", "max_train_images", "max_validation_images", "image_size", "max_length"), 1
    )
    at_least |= dict.fromkeys(("num_workers", "seed", "warmup_steps", "lr_plateau_patience", "weight_decay"), 0)
    for name, bound in at_least.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise UsageError(f"--{name} must be at least {bound}, not {value}")
    for name in ("learning_rate", "vision_learning_rate", "text_learning_rate", "max_grad_norm"):
        if not getattr(arguments, name) > 0:
            raise UsageError(f"--{name} must be positive, not {getattr(arguments, name)}")
    if arguments.dropout is not None and not 0 <= arguments.dropout < 1:
        raise UsageError(f"--dropout must be in [0, 1), not {arguments.dropout}")
    if not 0 < arguments.lr_plateau_factor < 1:
        raise UsageError(f"--lr_plateau_factor must be between 0 and 1, not {arguments.lr_plateau_factor}")
    augmentation_list(arguments)


def augmentation_list(arguments: TrainingArguments) -> list[dict[str, Any]]:
    """The transforms that `--augmentation` names, or the default ones.

    Raises:
        UsageError: not a list of mappings with a name each.
    """
    from .batches import DEFAULT_AUGMENTATION

    if arguments.augmentation is None:
        return list(DEFAULT_AUGMENTATION)
    try:
        transforms: Any = yaml.safe_load(arguments.augmentation)
    except yaml.YAMLError as error:
        raise UsageError(f"--augmentation is neither JSON nor YAML: {error}") from error
    if not isinstance(transforms, list) or not all(isinstance(t, dict) and "name" in t for t in transforms):
        raise UsageError(f"--augmentation must be a list of mappings with a name each, not {arguments.augmentation}")
    return list(transforms)


def save_arguments(arguments: TrainingArguments, path: Path) -> None:
    """Write the resolved arguments as a recipe that repeats the run: `--recipe arguments.yaml`."""
    values = asdict(arguments)
    values.pop("recipe")
    if values["augmentation"] is not None:
        values["augmentation"] = augmentation_list(arguments)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def describe_flags() -> str:
    """All flags as Markdown tables, for `configuration/README.md`."""
    lines: list[str] = []
    for flag in fields(TrainingArguments):
        if flag.name in FLAG_GROUPS:
            lines += ["", f"### {FLAG_GROUPS[flag.name]}", "", "| flag | default | meaning |", "|---|---|---|"]
        default = "" if flag.default is None else str(flag.default)
        lines.append(f"| `--{flag.name}` | {default} | {flag.metadata['help']} |")
    return "\n".join(lines[1:]) + "\n"
