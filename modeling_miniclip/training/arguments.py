"""The arguments of a training run: code defaults, below a recipe's YAML, below the flags."""

import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..errors import EXIT_CODES
from ..utils.resources import PACKAGE


def _flag(default: Any, help: str, **argparse: Any) -> Any:
    return field(default=default, metadata={"help": help, **argparse})


@dataclass
class TrainingArguments:
    """Every flag of `train_miniclip.py`. `--help` and the tables of `configuration/README.md` are made from it."""

    # What to train on
    recipe: str | None = _flag(
        None, "YAML file of flags, or the name of one in configuration/recipes; 'scenes' if no dataset is named either"
    )
    dataset: str | None = _flag(
        None, "CSV file, folder, Hub data set, or 'scenes' for the built-in one (see load_captions)"
    )
    image_dir: str | None = _flag(None, "folder of the images of a CSV, if not found beside it")
    allow_outside_images: bool = _flag(
        False, "let a CSV name images outside image_dir, by '..', an absolute path or a symbolic link"
    )
    image_column: str = _flag("image", "column that identifies the image")
    caption_column: str = _flag("caption", "column with the text, or the stem of caption_0, caption_1, ...")
    dataset_revision: str | None = _flag(None, "commit, branch or tag of a Hub data set")
    stream_rows: int | None = _flag(
        None, "of a Hub data set: the first so many rows of each split, without downloading the rest, for a trial"
    )
    validation_fraction: float = _flag(0.1, "share of images set aside where the data set has no validation split")
    max_train_images: int | None = _flag(None, "use only the first so many training images, for a trial")
    max_validation_images: int | None = _flag(None, "use only the first so many validation images, for a trial")
    max_bad_images: float = _flag(
        0.01,
        "share of a split's images that may turn out undecodable: each is told and left out, more than so many end "
        "the run; 0 ends it at the first",
    )
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
    loss_type: Literal["softmax_sum", "softmax_mean", "sigmoid"] | None = _flag(
        None,
        "CLIP's loss, with the log of the summed probability of several captions of an image or the mean of their "
        "log-probabilities; or SigLIP's loss (softmax_sum)",
    )
    dropout: float | None = _flag(None, "dropout of heads and towers (0.1 in the heads, the towers' own in them)")
    projection_dropout: float | None = _flag(None, "dropout of the heads alone, whatever dropout says (0.1)")
    image_size: int | None = _flag(None, "pixels per side (the image tower's own)")
    train_image_size: int | None = _flag(
        None,
        "pixels per side of augmented training images, where other than image_size: a random crop shows things "
        "larger than the whole image of validation does, and fewer pixels train faster (image_size)",
    )
    crop_pct: float | None = _flag(
        None, "share of an image's shorter edge that the centre crop keeps; 1 keeps all of it (the image tower's own)"
    )
    max_length: int | None = _flag(None, "longest caption in tokens (the text tower's limit)")
    freeze: Literal["none", "vision", "text", "both"] = _flag("none", "towers that keep their weights")
    frozen_vision_layers: float = _flag(
        0.0, "share of the image tower's layers, from the pixels on, that keep their weights; no gradient goes there"
    )
    frozen_text_layers: float = _flag(0.0, "share of the text tower's layers, from the tokens on, likewise")
    num_views: int | None = _flag(
        None,
        "with a frozen image tower: compute the features of so many augmented views of each training image once, "
        "instead of augmenting in every epoch",
    )
    feature_cache_dir: str | None = _flag(
        None, "folder of the features of frozen towers, shared between runs (HF_HOME/miniclip/features)"
    )
    freeze_batch_norm: bool | None = _flag(
        None,
        "keep the image tower's batch-norm statistics (true for pretrained towers, false from random weights)",
        nargs="?",
        const=True,
    )

    # The optimisation
    batch_size: int = _flag(32, "images per optimiser step, over all processes together")
    chunk_size: int | None = _flag(
        None,
        "images that a process computes at a time, at least 2; a larger step is computed in chunks, each twice, with "
        "the gradients of the whole step (all at once)",
    )
    captions_per_image: int = _flag(1, "captions drawn for each image of a step")
    num_train_epochs: int = _flag(4, "passes over the training images")
    max_steps: int | None = _flag(None, "stop after so many optimiser steps")
    learning_rate: float = _flag(1e-3, "of the projection heads and the temperature")
    vision_learning_rate: float = _flag(1e-4, "of the image tower")
    text_learning_rate: float = _flag(1e-5, "of the text tower")
    layer_decay: float = _flag(
        1.0, "layer-wise rate decay: a tower's rate is that of its last layer, each one below has so much of the next"
    )
    weight_decay: float = _flag(1e-3, "AdamW's, for weight matrices only")
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to this norm")
    lr_scheduler_type: Literal["plateau", "cosine"] = _flag(
        "plateau", "plateau: lower the rates when the validation loss stops falling; cosine: warm-up, then down to 0"
    )
    lr_plateau_patience: int = _flag(1, "plateau: epochs without improvement before the rates are lowered")
    lr_plateau_factor: float = _flag(0.8, "plateau: what the rates are multiplied with")
    warmup_steps: int = _flag(0, "cosine: steps of linear warm-up")
    ema_decay: float | None = _flag(
        None, "average the weights over the steps, for instance by 0.999, and validate and export the averages (off)"
    )
    augmentation: str | None = _flag(
        None,
        "albumentations for training images: list of {name, arguments} as JSON or YAML, [] for none (mild ones; none "
        "for a frozen image tower, which then runs once)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "precision of the forward pass (bf16 where the accelerator has it, else no)"
    )
    compile_towers: bool = _flag(
        False, "torch.compile the towers: minutes at the start, then faster steps on a GPU; on a CPU it seldom pays"
    )
    seed: int = _flag(0, "of weights, batches, captions, augmentation and dropout")
    overfit_batch: bool = _flag(
        False,
        "a test instead of a run: train on the first batch alone, without augmentation and dropout, for max_steps "
        "(300) steps, and tell whether its loss reaches zero; nothing is saved",
    )

    # What is kept and shown
    output_dir: str = _flag("miniclip-output", "folder of the result")
    overwrite_output_dir: bool = _flag(False, "delete an earlier run in output_dir")
    resume_from_checkpoint: str | None = _flag(
        None, "'latest' (from the start if there is none yet), or a folder in output_dir/checkpoints"
    )
    checkpointing_steps: str = _flag("epoch", "steps between two checkpoints, or 'epoch' for one after each epoch")
    save_total_limit: int = _flag(2, "resumable checkpoints kept; the last and the one of the best step always are")
    best_metric: str = _flag("loss", "validation metric that decides which model is exported")
    early_stopping_patience: int | None = _flag(None, "stop after so many epochs without improvement of best_metric")
    logging_steps: int = _flag(10, "steps between two lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _flag("none", "experiment tracker")
    push_to_hub: bool = _flag(False, "upload the export, see hub_strategy")
    hub_strategy: Literal["end", "every_save"] = _flag(
        "end", "with push_to_hub: upload once at the end, or each model that is the best so far as well"
    )
    hub_model_id: str | None = _flag(None, "repository to upload to (the user's, named like output_dir)")
    hub_private_repo: bool = _flag(False, "create that repository as private, refuse a public one")
    hub_revision: str | None = _flag(None, "branch to upload to; created if it is not there (main)")
    hub_license: str | None = _flag(None, "licence in the model card: an identifier of the Hub such as mit (unknown)")


# Fields that start a new group of flags.
FLAG_GROUPS = {
    "recipe": "What to train on",
    "vision_model": "The model",
    "batch_size": "The optimisation",
    "output_dir": "What is kept and shown",
}

# A model comes from one of these: two pretrained towers, random weights, or a trained model.
MODEL_SOURCES = (("vision_model", "text_model"), ("preset",), ("model_name_or_path",))

LOWER_BOUNDS = {
    **dict.fromkeys(("batch_size", "captions_per_image", "num_train_epochs", "max_steps", "logging_steps"), 1),
    **dict.fromkeys(("max_train_images", "max_validation_images", "image_size", "max_length", "save_total_limit"), 1),
    "train_image_size": 1,
    **dict.fromkeys(("stream_rows", "num_views", "projection_dim", "projection_depth", "early_stopping_patience"), 1),
    "chunk_size": 2,
    **dict.fromkeys(("num_workers", "seed", "warmup_steps", "lr_plateau_patience", "weight_decay"), 0),
}


def _choices(hint: Any) -> tuple[str, ...]:
    for kind in (hint, *get_args(hint)):
        if get_args(kind) and all(isinstance(choice, str) for choice in get_args(kind)):
            return get_args(kind)
    return ()


def describe_flags() -> str:
    """What `--help` prints: all flags in their groups, with choices and defaults."""
    lines = ["usage: train_miniclip.py [--flag value ...]", ""]
    lines += textwrap.wrap(
        "Train a CLIP of your own on captioned images. Without arguments: the built-in recipe 'scenes'. A flag "
        "outweighs the recipe, the recipe the defaults. In parentheses: what leaving the flag out means. "
        f"--debug shows the traceback of an error. {EXIT_CODES}", 100
    )  # fmt: skip
    for name, text in _flag_texts():
        if name in FLAG_GROUPS:
            lines += ["", f"{FLAG_GROUPS[name]}:"]
        first, *more = textwrap.wrap(text, 72, break_on_hyphens=False)
        lines += [f"  --{name:<26}{first}", *(" " * 30 + line for line in more)]
    return "\n".join(lines) + "\n"


def flag_tables() -> str:
    """All flags as Markdown tables, for `configuration/README.md`."""
    lines: list[str] = []
    for name, text in _flag_texts():
        if name in FLAG_GROUPS:
            lines += ["", f"### {FLAG_GROUPS[name]}", "", "| flag | meaning |", "|---|---|"]
        lines.append(f"| `--{name}` | {text} |")
    return "\n".join(lines[1:]) + "\n"


def _flag_texts() -> list[tuple[str, str]]:
    """Name and meaning of each flag; the meaning ends with what the default is, where the text does not say it."""
    hints = get_type_hints(TrainingArguments)
    texts = []
    for flag in fields(TrainingArguments):
        text = flag.metadata["help"]
        if _choices(hints[flag.name]):
            text = f"{', '.join(_choices(hints[flag.name]))}: {text}"
        if flag.default is not None:
            text += f" ({str(flag.default).lower() if isinstance(flag.default, bool) else flag.default})"
        texts.append((flag.name, text))
    return texts


def write_flag_tables(readme: Path) -> None:
    """Replace what stands between `<!-- flags -->` and `<!-- end of flags -->` in a Markdown file by the tables."""
    before, rest = readme.read_text(encoding="utf-8").split("<!-- flags -->")
    after = rest.split("<!-- end of flags -->")[1]
    text = f"{before}<!-- flags -->\n{flag_tables()}<!-- end of flags -->{after}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_flag_tables(PACKAGE.parent / "configuration" / "README.md")
