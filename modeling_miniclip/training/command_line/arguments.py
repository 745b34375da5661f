"""All flags of `train_miniclip.py`: types, defaults, help, and the parser and tables made from them."""

import re
import textwrap
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...errors import EXIT_CODES, UsageError
from ...utils.files import replace_between_marks
from ...utils.resources import PACKAGE

DEFAULT_VISION_MODEL, DEFAULT_TEXT_MODEL = "resnet50.a1_in1k", "distilbert-base-uncased"
LIST_FLAGS = "; --help lists them all"


def _flag(default: Any, help: str, **argparse: Any) -> Any:
    return field(default=default, metadata={"help": help, **argparse})


@dataclass(frozen=True)
class TrainingArguments:
    """Every flag of `train_miniclip.py`. `--help` and the tables of `configuration/README.md` are made from it.

    [`parse_arguments`][modeling_miniclip.training.command_line.parsing.parse_arguments] builds and checks it;
    nothing changes it afterwards.
    """

    # Data
    recipe: str | None = _flag(
        None,
        "YAML file of flags, or the name of one in configuration/recipes (scenes, if you pass no dataset either)",
    )
    dataset: list[str] | None = _flag(
        None,
        "one or several of: caption file, folder, shards, Hub dataset, or 'scenes' for the built-in one (see "
        "docs/data.md)",
    )
    dataset_weights: list[float] | None = _flag(
        None,
        "with several datasets: the share of each in an epoch, relative to the others; in a recipe, dataset may be a "
        "mapping of datasets to weights (each image once per epoch)",
    )
    validation_dataset: list[str] | None = _flag(
        None, "one or several datasets of which all images are used for validation (part of the dataset)"
    )
    zero_shot_dataset: str | None = _flag(
        None, "folder of class folders that each validation classifies by their names: zero_shot_top-1 and -5"
    )
    retention_dataset: str | None = _flag(
        None,
        "with model_name_or_path: a dataset that must not be forgotten; each validation also measures recall on its "
        "validation split",
    )
    image_dir: str | None = _flag(
        None, "folder of the images that a CSV file names (next to the CSV file, or its subfolder Images)"
    )
    allow_outside_images: bool = _flag(
        False, "allow a CSV file to name images outside its image folder: by '..', an absolute path or a symbolic link"
    )
    image_column: str = _flag("image", "column with the image or its file name")
    caption_column: str = _flag("caption", "column with the caption, or the common part of caption_0, caption_1, ...")
    caption_template: str = _flag(
        "a photo of a {}", "caption of the images in a folder of a class; {} stands for the name of the folder"
    )
    dataset_cache_dir: str | None = _flag(
        None, "folder of tables of captions and places of images, shared between runs (HF_HOME/miniclip/datasets)"
    )
    shard_cache_gb: float = _flag(
        100.0, "gigabytes of fetched shards to keep; of more, those used least recently are removed"
    )
    dataset_revision: str | None = _flag(None, "commit, branch or tag of a Hub dataset")
    stream_first_rows: int | None = _flag(
        None, "stream only the first N rows of each split of a Hub dataset, without downloading the rest"
    )
    validation_fraction: float = _flag(
        0.1, "fraction of the images used for validation if the dataset has no validation split"
    )
    max_train_images: int | None = _flag(None, "use only the first N training images")
    max_validation_images: int | None = _flag(
        5000, "validate on N images, drawn by the seed, if the split has more; 0 for all of them"
    )
    max_bad_image_fraction: float = _flag(
        0.01,
        "largest fraction of a split's images that may fail to decode: up to it, each is reported and skipped; above "
        "it, the run ends; 0 ends it at the first one",
    )
    num_workers: int = _flag(
        2, "processes that decode and augment images; with 0, the training process does this itself"
    )

    # Model
    vision_model: str | None = _flag(
        None,
        f"pretrained image tower: timm name, or repository or folder of a timm model or of an image encoder of "
        f"transformers ({DEFAULT_VISION_MODEL})",
    )
    text_model: str | None = _flag(
        None, f"pretrained text tower: Hub name or folder of a text encoder ({DEFAULT_TEXT_MODEL})"
    )
    preset: str | None = _flag(
        None,
        "train from random weights: JSON file of a MiniClipConfig, or the name of one in configuration/presets; also "
        "trains a WordPiece vocabulary on the captions",
    )
    model_name_or_path: str | None = _flag(
        None, "start from a trained model: folder or Hub repository of an export, or of a CLIP of another library"
    )
    text_pooling: Literal["cls", "mean", "last", "eos", "pooler"] | None = _flag(
        None,
        "how the token states of a text become one vector: the first of them, their mean, the last, that of the end "
        "token, or the tower's own pooled output (what the text tower's repository declares; otherwise last for a "
        "decoder such as GPT-2, pooler for SigLIP's tower, and cls for any other)",
    )
    projection_dim: int | None = _flag(None, "dimensions of the shared embedding space (derived)")
    projection_depth: int | None = _flag(
        None, "linear layers in each projection head; 1 is a plain projection, 0 none (2)"
    )
    loss_type: Literal["softmax_sum", "softmax_mean", "sigmoid"] | None = _flag(
        None,
        "softmax is CLIP's loss; it combines the captions of an image as the log of their summed probability (sum) or "
        "the mean of their log-probabilities (mean); sigmoid is SigLIP's loss (softmax_sum)",
    )
    dropout: float | None = _flag(
        None, "dropout of heads and towers (0.1 in the heads, each tower's own setting in the towers)"
    )
    projection_dropout: float | None = _flag(None, "dropout of the projection heads only; overrides dropout (derived)")
    image_size: int | None = _flag(None, "image height and width in pixels (derived)")
    train_image_size: int | None = _flag(
        None,
        "height and width of augmented training images; a smaller size trains faster and makes up for random crops, "
        "which enlarge objects (derived)",
    )
    crop_pct: float | None = _flag(
        None, "fraction of the shorter edge kept by the centre crop; 1 keeps all of it (derived)"
    )
    max_length: int | None = _flag(None, "longest caption in tokens (the text tower's limit)")
    freeze: Literal["none", "vision", "text", "both"] = _flag(None, "which towers to freeze (derived)")
    frozen_vision_fraction: float = _flag(
        None, "fraction of the image tower's layers to freeze, counted from the pixels (derived)"
    )
    frozen_text_fraction: float = _flag(
        0.0, "fraction of the text tower's layers to freeze, counted from the embeddings"
    )
    num_views: int | None = _flag(
        None,
        "with a frozen image tower: augmented views of each training image whose features are computed once, instead "
        "of augmenting in every epoch",
    )
    feature_cache_dir: str | None = _flag(
        None, "folder of cached features of frozen towers, shared between runs (HF_HOME/miniclip/features)"
    )
    lora_rank: int | None = _flag(
        None,
        "train adapters of this rank in the towers instead of their weights (LoRA, needs PEFT); the export is a plain "
        "model; --freeze vision or text leaves a tower without adapters (off)",
    )
    lora_kwargs: str | None = _flag(
        None,
        "details of the adapters as JSON or YAML: {alpha: 16, dropout: 0, targets: [q_proj, v_proj]}: what they add "
        "is multiplied by alpha / rank (2); their dropout (0); the ends of the names of the layers that get one (all "
        "linear layers of a tower, or its convolutions if these have more weights)",
    )
    freeze_batch_norm: bool | None = _flag(
        None,
        "freeze the image tower's batch-norm statistics (true for pretrained towers, false for a preset)",
        nargs="?",
        const=True,
    )

    # Optimization
    batch_size: int = _flag(None, "images per optimizer step, summed over all processes (derived)")
    shuffle: Literal["full", "window"] | None = _flag(
        None,
        "order of the training images in each epoch: any order, or shards in any order and images within a window of "
        "some shards, so that shards are read one after the other (window for Parquet files and remote shards, "
        "otherwise full)",
    )
    chunk_size: int | None = _flag(
        None,
        "images that a process computes at a time, at least 2; a larger batch is computed in chunks, which gives the "
        "same gradients with less memory but computes each chunk twice (the whole batch, or what fits into memory)",
    )
    captions_per_image: int = _flag(None, "captions drawn for each image of a batch (derived)")
    hard_negatives: list[str] | None = _flag(
        None,
        "wrong captions that each image must rank below its own: none, column (negative_captions of the dataset), or "
        "swap: its captions with adjectives, nouns or relations swapped (English); these three words choose kinds "
        "(column if the dataset has it, otherwise none)",
    )
    matryoshka_dims: list[str] | None = _flag(
        None,
        "lengths, such as 64,128,256, of short embeddings that are trained, too: the first dimensions of an "
        "embedding, normalised again; the full length is always one of them (those of model_name_or_path, otherwise "
        "off)",
    )
    teacher: str | None = _flag(
        None,
        "learn another CLIP's similarities of the images and captions of a batch, too: folder or Hub repository of an "
        "export, or of a CLIP of another library; its towers run once over the training images (none)",
    )
    teacher_kwargs: str | None = _flag(
        None,
        "details of the teacher as JSON or YAML: {weight: 1, temperature: 0.01}; weight of this loss, that of the "
        "contrastive one being 1, and the temperature of the teacher's similarities (its own)",
    )
    num_train_epochs: int = _flag(None, "passes over the training images (derived)")
    max_steps: int | None = _flag(None, "stop after N optimizer steps")
    time_limit: str | None = _flag(
        None,
        "as many steps as fit into a time such as 90s, 20m or 1.5h, from the start of the command to its end; "
        "overrides the epochs, steps and warm-up of a recipe",
    )
    learning_rate: float | None = _flag(
        None,
        "learning rate of all parts; on the command line, overrides the rates of a recipe; the next three flags "
        "override it for one part",
    )
    head_learning_rate: float = _flag(None, "learning rate of the projection heads and the temperature (derived)")
    vision_learning_rate: float = _flag(None, "learning rate of the image tower (derived)")
    text_learning_rate: float = _flag(None, "learning rate of the text tower (derived)")
    layer_decay: float = _flag(
        None, "layer-wise learning-rate decay: each layer's rate is this factor times that of the next layer (derived)"
    )
    weight_decay: float = _flag(None, "AdamW weight decay, applied to weight matrices only (derived)")
    max_grad_norm: float = _flag(1.0, "clip gradients to this norm")
    lr_scheduler_type: Literal["plateau", "cosine"] = _flag(
        None,
        "plateau: lower the rates when the validation loss stops falling; cosine: warm up, then decay to 0 (derived)",
    )
    lr_scheduler_kwargs: str | None = _flag(
        None,
        "details of the schedule as JSON or YAML: {patience: 1, factor: 0.8} of plateau, the validations without "
        "improvement after which the rates are multiplied by the factor; {hold_steps: 0} of cosine, the steps at the "
        "full rates between warm-up and decay",
    )
    warmup_steps: int = _flag(None, "cosine: steps of linear warm-up (derived)")
    ema_decay: float | None = _flag(
        None,
        "validate and export an exponential moving average of the weights with this decay, such as 0.999; 0 is off "
        "(derived)",
    )
    augmentation: str | None = _flag(
        None,
        "albumentations transforms for training images: list of {name, arguments} as JSON or YAML, [] for none "
        "(derived; none for a frozen image tower, which then runs only once)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(
        None, "precision of the forward pass (bf16 if the accelerator supports it, otherwise no)"
    )
    compile_towers: bool = _flag(
        False,
        "compile the towers with torch.compile: takes minutes at the start, then steps are faster on a GPU; rarely "
        "pays off on a CPU",
    )
    blend: str | None = _flag(
        None,
        "at the end, move the weights of the best model back towards those of model_name_or_path: the share of the "
        "best model that is kept, such as 0.5, or auto, which validates 0, 0.1, ... 1 and takes the best (off)",
    )
    seed: int = _flag(0, "random seed for weights, batches, captions, augmentation and dropout")
    overfit_batch: bool = _flag(
        False,
        "check that the model can learn: train on the first batch only, without augmentation and dropout, for up to "
        "max_steps (300) steps, and report whether the loss reaches zero; writes nothing",
    )

    # Output
    output_dir: str = _flag("miniclip-output", "folder for the results")
    overwrite_output_dir: bool = _flag(False, "delete an earlier run in output_dir")
    resume_from_checkpoint: str | None = _flag(
        None, "'latest' (from scratch if there is none yet), or a folder in output_dir/checkpoints"
    )
    discard_later_checkpoints: bool = _flag(False, "delete the checkpoints after the one in resume_from_checkpoint")
    checkpointing_steps: str = _flag("epoch", "steps between checkpoints, or 'epoch' for one after each epoch")
    save_total_limit: int = _flag(2, "number of checkpoints to keep; the last and the best are always kept")
    eval_steps: int | None = _flag(None, "validate every N steps, in addition to the end of each epoch (off)")
    best_metric: str = _flag(None, "validation metric that selects the exported model (derived)")
    early_stopping_patience: int | None = _flag(None, "stop after N validations in which best_metric did not improve")
    logging_steps: int = _flag(10, "steps between lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _flag("none", "experiment tracker")
    push_to_hub: bool = _flag(False, "upload the export to the Hub (see hub_strategy)")
    hub_strategy: Literal["end", "every_save"] = _flag(
        "end", "with push_to_hub: upload once at the end, or also each time a new best model is exported"
    )
    hub_model_id: str | None = _flag(None, "Hub repository to upload to (your account, named like output_dir)")
    hub_private_repo: bool = _flag(False, "create the repository as private; reject an existing public one")
    hub_revision: str | None = _flag(None, "branch to upload to; created if it does not exist (main)")
    hub_license: str | None = _flag(
        None, "license in the model card: a Hub identifier such as mit (that of the model it starts from, or unknown)"
    )


# Fields that start a new group of flags.
FLAG_GROUPS = {"recipe": "Data", "vision_model": "Model", "batch_size": "Optimization", "output_dir": "Output"}

# A model comes from one of these: two pretrained towers, random weights, or a trained model.
MODEL_SOURCES = (("vision_model", "text_model"), ("preset",), ("model_name_or_path",))

# The parts of a model that have their own learning rate; --learning_rate sets all three.
PART_RATES = ("head_learning_rate", "vision_learning_rate", "text_learning_rate")

# Flags whose defaults depend on the data and the model, see `derived.py`: None until the data is known. In this order
# they are derived and shown.
DERIVED = (
    "freeze", "batch_size", "captions_per_image", "num_train_epochs", "lr_scheduler_type", "warmup_steps",
    "head_learning_rate", "vision_learning_rate", "text_learning_rate", "layer_decay", "frozen_vision_fraction",
    "weight_decay", "ema_decay", "best_metric", "projection_dim", "projection_dropout", "crop_pct", "image_size",
    "train_image_size", "augmentation",
)  # fmt: skip

LOWER_BOUNDS = {
    **dict.fromkeys(("batch_size", "captions_per_image", "num_train_epochs", "max_steps", "logging_steps"), 1),
    **dict.fromkeys(("max_train_images", "stream_first_rows", "num_views"), 1),
    **dict.fromkeys(("image_size", "train_image_size", "max_length", "projection_dim"), 1),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience", "eval_steps"), 1),
    "chunk_size": 2,
    "lora_rank": 1,
    **dict.fromkeys(("num_workers", "seed", "warmup_steps", "weight_decay"), 0),
    **dict.fromkeys(("max_validation_images", "shard_cache_gb", "projection_depth"), 0),
}


def choices_of(hint: Any) -> tuple[str, ...]:
    """The values that a `Literal` type, or an optional one, allows; empty for any other type."""
    for kind in (hint, *get_args(hint)):
        if get_args(kind) and all(isinstance(choice, str) for choice in get_args(kind)):
            return get_args(kind)
    return ()


def element_of(hint: Any) -> Any:
    """The type of the elements of a list, or of an optional one; None for any other type."""
    return next((get_args(kind)[0] for kind in (hint, *get_args(hint)) if get_origin(kind) is list), None)


def build_parser() -> ArgumentParser:
    """The parser of the command line, made from the fields of [`TrainingArguments`].

    It raises `UsageError` instead of ending the process, and its help is [`describe_flags`].
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(re.sub(r"^argument (--\w+)[^:]*", r"\1", message))

        def format_help(self) -> str:
            return describe_flags()

    return Parser(TrainingArguments, prog="train_miniclip.py", allow_abbrev=False)


def describe_flags() -> str:
    """The text of `--help`: all flags in groups, with choices and defaults."""
    lines = ["usage: train_miniclip.py [--flag value ...]", ""]
    lines += textwrap.wrap(
        "Train your own CLIP on captioned images. Without arguments, it runs the built-in recipe 'scenes'. Flags "
        "override the recipe, and the recipe overrides the defaults, which are in parentheses; derived ones depend on "
        "the data and the model (docs/train.md), and a run prints them at its start. --debug shows the "
        f"traceback of an error. {EXIT_CODES}", 100
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
    """Name and meaning of each flag, with its choices first and its default last."""
    hints = get_type_hints(TrainingArguments)
    texts = []
    for flag in fields(TrainingArguments):
        text = flag.metadata["help"]
        if choices_of(hints[flag.name]):
            text = f"{', '.join(choices_of(hints[flag.name]))}: {text}"
        if flag.default is not None:
            text += f" ({str(flag.default).lower() if isinstance(flag.default, bool) else flag.default})"
        texts.append((flag.name, text))
    return texts


def write_flag_tables(readme: Path) -> None:
    """Replace the text between `<!-- flags -->` and `<!-- end of flags -->` in a Markdown file by the tables."""
    replace_between_marks(readme, "flags", flag_tables())


if __name__ == "__main__":
    write_flag_tables(PACKAGE.parent / "configuration" / "README.md")
