"""What a run keeps on disk while it trains: its log, its resumable state, its folder; and how a signal ends it."""

import filecmp
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..modeling_miniclip import MiniClipModel
from ..utils.files import commit_folder, discard_folder, link_folder, replaced_folder
from .diagnostics import not_finite
from .distributed import own_part


@dataclass
class Progress:
    """Where a run is; saved in each checkpoint. The first three say what its steps are made of and never change."""

    batch_size: int
    seed: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best_value: float | None = None
    best_step: int = 0
    epochs_without_improvement: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.register_for_checkpointing`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what [`state_dict`][Progress.state_dict] gave."""
        vars(self).update(state)


def save_checkpoint(accelerator: Any, folder: Path, progress: Progress, keep: int, export_dir: Path) -> Path:
    """Write a resumable state as `folder/step-<step>`, complete or not at all, and drop the oldest beyond `keep`.

    The best model so far is part of it, as `export`: a validation that a killed run does not remember may have
    replaced the one in `export_dir`.
    """
    target = folder / f"step-{progress.step:08d}"
    fresh = folder / f".{target.name}.new"
    if accelerator.is_main_process:
        clear_unfinished(folder)
        fresh.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if export_dir.exists():
                link_folder(export_dir, fresh / "export")
            commit_folder(fresh, target)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room
        raise
    if accelerator.is_main_process:
        drop_surplus(folder, keep, progress.best_step)
    accelerator.wait_for_everyone()
    return target


def clear_unfinished(folder: Path) -> None:
    """Delete what a run left that was killed while it saved or dropped a checkpoint."""
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def surplus(paths: list[Path], keep: int, best_step: int) -> list[Path]:
    """The oldest checkpoints beyond `keep`. As in transformers' Trainer, neither the last nor the best is among them.

    Args:
        paths: checkpoints, oldest first.
        keep: how many shall stay; with 1 that may be two, the last and the best.
        best_step: step of the best model.
    """
    droppable = [path for path in paths[:-1] if path.name != f"step-{best_step:08d}"]
    return droppable[: max(0, len(paths) - keep)]


def drop_surplus(folder: Path, keep: int, best_step: int) -> None:
    """Delete the checkpoints that are [`surplus`]."""
    for old in surplus(checkpoints(folder), keep, best_step):
        discard_folder(old)


def rewind_folders(checkpoint: Path, export_dir: Path) -> None:
    """Bring `checkpoints/` and `export/` back to what they were when a checkpoint was written."""
    clear_unfinished(checkpoint.parent)
    for path in reversed(checkpoints(checkpoint.parent)):  # so that, killed in here, the latest is always a whole one
        if path.name > checkpoint.name:
            discard_folder(path)
    best = checkpoint / "export"
    if not best.exists():
        discard_folder(export_dir)
    elif not _same_weights(best, export_dir):
        with replaced_folder(export_dir) as fresh:
            link_folder(best, fresh)


def _same_weights(one: Path, other: Path) -> bool:
    first, second = (folder / "model.safetensors" for folder in (one, other))
    if not (first.exists() and second.exists()):
        return False
    return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)


def check_resumed(progress: Progress, expected: Progress) -> None:
    """Make sure that a checkpoint's steps are made of the same batches as this run's.

    Raises:
        UsageError: the batch size, the seed or the number of training images changed.
    """
    for name in ("batch_size", "seed", "steps_per_epoch"):
        saved, now = getattr(progress, name), getattr(expected, name)
        if saved != now:
            raise UsageError(
                f"--resume_from_checkpoint: the checkpoint was made with {name} {saved}, this run has {now}; resume "
                "with the flags and data of the first start (its arguments.yaml is a recipe of them)"
            )


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means.

    Returns:
        None for `latest` where a run was ended before it saved one, or was never started: a job that is started anew
        until it ends has the same command each time.

    Raises:
        UsageError: there is no checkpoint of that name (those that are there are listed), or none of a run that ended.
    """
    found = checkpoints(output_dir / "checkpoints")
    if wanted == "latest":
        if not found and (output_dir / "curves.png").exists():
            raise UsageError(
                f"--resume_from_checkpoint latest: {output_dir} holds a run that ended, without its checkpoints; "
                f"train on from its model by --model_name_or_path {output_dir / 'export'} and another --output_dir"
            )
        return found[-1] if found else None
    for path in found:
        if wanted == path.name or Path(wanted).resolve() == path.resolve():
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir / 'checkpoints'}; there: {names}"
    )


@torch.no_grad()
def check_weights(model: MiniClipModel, accelerator: Any) -> None:
    """Make sure that what is going to be saved are numbers; every process has to ask, and gets the same answer.

    Raises:
        MiniClipError: a parameter holds NaN or infinity, in any process.
    """
    wrong = torch.stack([~own_part(parameter).isfinite().all() for parameter in model.parameters()]).any()
    if accelerator.reduce(wrong.int(), "sum").item():
        raise not_finite("weights", math.nan, accelerator.mixed_precision)
