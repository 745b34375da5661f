"""What a run exports and pushes: its best model with a measured card."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import TrainingArguments
from .reporting import split_sizes

# Arguments that say where things lie on the machine of the run, or what it showed and kept there: no business of a
# card's readers.
LOCAL_ARGUMENTS = frozenset(
    "recipe num_workers output_dir overwrite_output_dir resume_from_checkpoint save_total_limit "
    "checkpointing_steps overfit_batch logging_steps report_to feature_cache_dir push_to_hub hub_model_id "
    "hub_private_repo hub_revision hub_strategy hub_license".split()
)


# Arguments that may be a path.
PATH_ARGUMENTS = frozenset("dataset image_dir vision_model text_model preset model_name_or_path".split())


def data_for_card(arguments: TrainingArguments, splits: Any) -> dict[str, Any]:
    """What the card says of the data: its name, never a path of this machine, and the size of its splits."""
    dataset = arguments.dataset or "scenes"
    data = {"name": without_path(dataset), "splits": split_sizes(splits)}
    on_hub = dataset != "scenes" and not Path(dataset).expanduser().exists()
    return data | ({"hub_id": dataset} if on_hub else {})


def arguments_for_card(arguments: TrainingArguments) -> dict[str, Any]:
    """The arguments that were given a value, without what only means something on this machine."""
    return {
        name: without_path(value) if name in PATH_ARGUMENTS else value
        for name, value in asdict(arguments).items()
        if name not in LOCAL_ARGUMENTS and value is not None
    }


def command_for_card(arguments: TrainingArguments) -> str:
    """The command line that repeats a run, given what its paths stand for."""
    defaults = TrainingArguments()
    flags = [
        f"--{name}={value}"
        for name, value in arguments_for_card(arguments).items()
        if value != getattr(defaults, name)
    ]
    return shlex.join(["python", "train_miniclip.py", *flags])


def without_path(value: str) -> str:
    """The last part of a path that exists here; anything else as it is (a Hub name, a timm name)."""
    path = Path(value).expanduser()
    return path.resolve().name if path.exists() else value
