"""Export a run's best model with a card of measured values, and push it to the Hub."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from datasets import DatasetDict

from ..clips.convert import license_of
from ..data.readers.memory import is_memory
from ..data.shards.shard_patterns import is_pattern
from ..data.source_kinds import hub_id
from ..errors import MiniClipError
from ..hub.export import export
from ..hub.push import push
from ..modeling_miniclip import MiniClipModel
from .command_line.arguments import TrainingArguments
from .finetune.lora import merged_weights
from .reports.reporting import split_sizes
from .run import TrainingRun

# Arguments that matter only on the machine of the run: folders, logs, checkpoints, uploads. The card leaves them out.
LOCAL_ARGUMENTS = frozenset(
    "recipe num_workers output_dir overwrite_output_dir resume_from_checkpoint discard_later_checkpoints "
    "save_total_limit checkpointing_steps overfit_batch logging_steps report_to feature_cache_dir dataset_cache_dir "
    "shard_cache_gb push_to_hub hub_model_id hub_private_repo hub_revision hub_strategy hub_license".split()
)

# Arguments that may be a path.
PATH_ARGUMENTS = frozenset(
    "dataset validation_dataset zero_shot_dataset retention_dataset image_dir vision_model text_model preset "
    "model_name_or_path teacher".split()
)


def export_best(
    run: TrainingRun,
    metrics: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    with_shared: dict[str, Any] | None = None,
    by_length: dict[int, dict[str, float]] | None = None,
    retained: dict[str, float] | None = None,
    blended: dict[str, Any] | None = None,
) -> None:
    """Replace `export/` by the current model with its measured card; with `--hub_strategy every_save`, upload it.

    Args:
        run: the run, with the weights to export.
        metrics: validation metrics of these weights.
        intervals: confidence intervals of the recalls, on the main process.
        with_shared: what `recall_with_shared` found, on the main process.
        by_length: validation metrics of short embeddings, on the main process.
        retained: metrics on `--retention_dataset`.
        blended: what `--blend` has chosen, for the card: the `share`, whether it `is_auto`, and the `rows` measured.
    """
    arguments = run.arguments
    state_dict = full_state_dict(run)  # by all processes: with FSDP each has only a part
    if run.accelerator.is_main_process:
        card = {
            "name": arguments.hub_model_id or run.output_dir.resolve().name,
            "metrics": metrics,
            "intervals": intervals,
            "by_length": by_length,
            "at_start": run.progress.at_start,
            "with_shared": with_shared,
            "retained": retained,
            "retained_at_start": run.progress.retained_at_start,
            "blended": blended,
            "arguments": arguments_for_card(arguments),
            "command": command_for_card(arguments),
            "license": run.card_data["license"],
            "data": {**run.card_data, "left_out": run.bad_images.describe()},
        }
        weights = merged_weights(state_dict, run.unwrapped_model)  # without adapters
        export(run.unwrapped_model, run.processor, run.export_dir, card, weights)
        if arguments.push_to_hub and arguments.hub_strategy == "every_save":
            try:
                push_export(run)
            except MiniClipError as error:  # the Hub may be down for an hour; the run continues
                run.say(f"not pushed: {error}")
    run.accelerator.wait_for_everyone()


def full_state_dict(run: TrainingRun) -> dict[str, Any]:
    """All weights of the model under their own names, whatever wraps it. Every process must call it."""
    accelerator = run.accelerator
    if accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return run.unwrapped_model.state_dict()
    is_engine = accelerator.distributed_type == DistributedType.DEEPSPEED  # it gathers the weights itself
    state: dict[str, Any] = accelerator.get_state_dict(run.model if is_engine else run.unwrapped_model)
    return state


def push_export(run: TrainingRun) -> None:
    """Upload the export and print its address."""
    message, arguments = f"Model of step {run.progress.best_step}", run.arguments
    url = push(
        run.export_dir, str(arguments.hub_model_id), arguments.hub_private_repo, message, arguments.hub_revision
    )
    run.say(f"pushed: {url}")


def license_for_card(arguments: TrainingArguments) -> str | None:
    """`--hub_license`, or the licence in the card of the model that a run starts from; None without either."""
    start = arguments.model_name_or_path
    return arguments.hub_license or (license_of(start) if start is not None else None)


def lacks_license(arguments: TrainingArguments, model: MiniClipModel) -> bool:
    """Whether a run starts from somebody's CLIP that states no licence. An export may be your own."""
    starts_from_clip = arguments.model_name_or_path is not None and model.loaded_from is None
    return starts_from_clip and license_for_card(arguments) is None


def data_for_card(arguments: TrainingArguments, splits: DatasetDict) -> dict[str, Any]:
    """The dataset in the model card: its name, never a path on this machine, and the sizes of its splits."""
    names = arguments.dataset or ["scenes"]
    return {
        "name": ", ".join("data of a Python program" if is_memory(name) else without_path(name) for name in names),
        "splits": split_sizes(splits),
        "hub_ids": [name for name in map(hub_id, names) if name is not None],
    }


def arguments_for_card(arguments: TrainingArguments) -> dict[str, Any]:
    """The arguments that have a value, without [`LOCAL_ARGUMENTS`] and without paths on this machine.

    A time limit is left out once it has set the number of steps.
    """
    left_out = LOCAL_ARGUMENTS if arguments.num_train_epochs is None else LOCAL_ARGUMENTS | {"time_limit"}
    return {
        name: _without_paths(value) if name in PATH_ARGUMENTS else value
        for name, value in asdict(arguments).items()
        if name not in left_out and value is not None
    }


def command_for_card(arguments: TrainingArguments) -> str:
    """The command that repeats a run on a machine that has the same data and models."""
    defaults = TrainingArguments()
    flags: list[str] = []
    for name, value in arguments_for_card(arguments).items():
        if value != getattr(defaults, name):
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return shlex.join(["python", "train_miniclip.py", *flags])


def _without_paths(value: str | list[str]) -> str | list[str]:
    return [without_path(one) for one in value] if isinstance(value, list) else without_path(value)


def without_path(value: str) -> str:
    """The last part of a path that exists here, or of a pattern; other values (a Hub or timm name) unchanged."""
    path = Path(value).expanduser()
    return path.resolve().name if path.exists() or is_pattern(value) else value
