"""What happens to each flag that has another value when a run is resumed than it had before."""

from dataclasses import asdict
from typing import Any

from ..command_line.arguments import DERIVED, TrainingArguments

# Every flag is in exactly one of these.
RESUME_RULES: dict[str, tuple[str, ...]] = {
    # Position, optimizer's state or best value in the checkpoint would lose their meaning: an error.
    "fixed": (
        "seed", "batch_size", "shuffle", "dataset_weights", "freeze", "frozen_vision_fraction", "frozen_text_fraction",
        "num_views", "layer_decay", "lr_scheduler_type", "ema_decay", "best_metric", "matryoshka_dims",
        "time_limit", "lora_rank", "lora_kwargs", "blend",
    ),
    # What they select is compared instead: rows, model, vocabulary, preprocessing and augmentation.
    "compared": (
        "dataset", "validation_dataset", "zero_shot_dataset", "retention_dataset", "image_dir", "allow_outside_images",
        "image_column", "caption_column", "caption_template", "dataset_revision", "stream_first_rows",
        "validation_fraction", "max_train_images", "max_validation_images", "vision_model", "text_model", "preset",
        "model_name_or_path", "text_pooling", "projection_dim", "projection_depth", "loss_type", "image_size",
        "train_image_size", "crop_pct", "max_length", "augmentation", "teacher",
    ),
    # The new value holds from the next step on, and the log says so.
    "applied": (
        "num_train_epochs", "max_steps", "head_learning_rate", "vision_learning_rate", "text_learning_rate",
        "warmup_steps", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "dropout", "projection_dropout",
        "freeze_batch_norm", "captions_per_image", "hard_negatives", "teacher_kwargs", "chunk_size",
        "mixed_precision", "early_stopping_patience", "max_bad_image_fraction", "eval_steps",
    ),
    # They do not change what is trained. `learning_rate` is in the rates of the parts.
    "free": (
        "recipe", "learning_rate", "num_workers", "feature_cache_dir", "dataset_cache_dir", "compile_towers",
        "shard_cache_gb", "overfit_batch", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
        "discard_later_checkpoints", "checkpointing_steps", "save_total_limit", "logging_steps", "report_to",
        "push_to_hub", "hub_strategy", "hub_model_id", "hub_private_repo", "hub_revision", "hub_license",
    ),
}  # fmt: skip

# A resumed run keeps the value in the checkpoint unless the flag is given.
KEPT = ("shuffle", *DERIVED, "lr_scheduler_kwargs", "time_limit", "chunk_size")

# Flags that name a place; what they select is compared, and a checkpoint does not mention the place.
PLACES = (
    "dataset", "validation_dataset", "zero_shot_dataset", "retention_dataset", "image_dir", "vision_model",
    "text_model", "preset", "model_name_or_path", "teacher",
)  # fmt: skip


def recorded_flags(arguments: TrainingArguments) -> dict[str, Any]:
    """The flags that a checkpoint remembers, with their values."""
    values = asdict(arguments)
    names = (name for rule in ("fixed", "compared", "applied") for name in RESUME_RULES[rule])
    return {name: values[name] for name in names if name not in PLACES}


def changed_flags(saved: dict[str, Any], arguments: TrainingArguments, rule: str) -> dict[str, tuple[Any, Any]]:
    """The flags under a rule that have changed, with their values in the checkpoint and now."""
    now = recorded_flags(arguments)
    return {
        name: (saved.get(name), now[name])
        for name in RESUME_RULES[rule]
        if name in now and saved.get(name) != now[name] and not (now[name] is None and name in KEPT)
    }


def describe_flags(changed: dict[str, tuple[Any, Any]]) -> str:
    """Changed flags in one line: `--max_steps 5 -> 9, --dropout none -> 0.1`."""
    return ", ".join(f"--{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in changed.items())


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
