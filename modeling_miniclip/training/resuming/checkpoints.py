"""Resumable checkpoints: save them completely or not at all, delete old ones, find one, and rewind to it."""

import filecmp
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...errors import UsageError
from ...modeling_miniclip import MiniClipModel
from ...utils.files import (
    commit_folder,
    discard_folder,
    disk_errors,
    is_same_file,
    link_folder,
    move_folder,
    replaced_folder,
)
from ..finetune.lora import only_trained_weights
from ..processes.distributed import local_tensor
from ..reports.diagnostics import not_finite
from .fingerprint import Fingerprint

INTERRUPTED_EXPORT = "export-interrupted"  # next to `export`: the best model of a run that stopped within an epoch


@dataclass
class Progress:
    """Position and best value of a run; saved in each checkpoint.

    Args:
        epoch: number of complete epochs.
        step: number of optimizer steps.
        step_in_epoch: number of steps in the current epoch.
        best_value: best value of `--best_metric`; None before the first validation.
        best_step: step of the best value.
        validated_step: step of the last validation; -1 before the first one.
        validations_without_improvement: number of validations since the best value.
        at_start: metrics of the validation before the first step; None if there was none.
        retained_at_start: those on `--retention_dataset`; None without it.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best_value: float | None = None
    best_step: int = 0
    validated_step: int = -1
    validations_without_improvement: int = 0
    at_start: dict[str, float] | None = None
    retained_at_start: dict[str, float] | None = None

    def count_validation(self, improved: bool) -> None:
        """Count a validation of the model that is trained."""
        self.validated_step = self.step
        self.validations_without_improvement = 0 if improved else self.validations_without_improvement + 1

    def end_epoch(self) -> None:
        """Count an epoch whose validation is done."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """State for `accelerator.register_for_checkpointing`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`][Progress.state_dict] returned."""
        vars(self).update(state)


class ExportedEmbeddings:
    """What the model that was exported last embeds: the first validation images, and the first caption of each.

    Saved in each checkpoint, so that the end of a resumed run can check an export of its first part.
    """

    ROWS = 16

    def __init__(self) -> None:
        self.images: Tensor | None = None  # [n, dim]
        self.texts: Tensor | None = None  # [n, dim]

    def record(self, images: Tensor, texts: Tensor, image_row: Tensor) -> None:
        """Keep the first rows of a split's embeddings, as `embed_split` returns them."""
        rows = torch.arange(min(self.ROWS, len(images)))
        self.images = images[rows].clone()
        self.texts = texts[torch.searchsorted(image_row, rows)].clone()

    def state_dict(self) -> dict[str, Any]:
        """State for `accelerator.register_for_checkpointing`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`][ExportedEmbeddings.state_dict] returned."""
        vars(self).update(state)


@torch.no_grad()
def check_finite_weights(model: MiniClipModel, accelerator: Accelerator) -> None:
    """Check that all weights are finite before they are saved; every process must call it and gets the same answer.

    Raises:
        MiniClipError: a parameter contains NaN or infinity, in any process.
    """
    wrong = torch.stack([~local_tensor(parameter).isfinite().all() for parameter in model.parameters()]).any()
    if accelerator.reduce(wrong.int(), "sum").item():
        raise not_finite("weights", math.nan, accelerator.mixed_precision)


def save_checkpoint(
    accelerator: Accelerator,
    model: MiniClipModel,
    folder: Path,
    progress: Progress,
    fingerprint: Fingerprint | None,
    keep: int,
    export_dir: Path,
) -> Path:
    """Write a resumable state as `folder/step-<step>`, completely or not at all, and delete the oldest beyond `keep`.

    The checkpoint includes the best model so far, as `export`, because a later validation may replace `export_dir`
    before the run is killed. Every process must call this function.

    Args:
        accelerator: processes and registered state of the run.
        model: the model, without what wraps it; of one with adapters, only what is trained is saved.
        folder: folder of all checkpoints.
        progress: position and best value of the run.
        fingerprint: what the run trains on and with; only rank 0 needs it.
        keep: number of checkpoints to keep.
        export_dir: folder of the best model so far; may not exist yet.

    Returns:
        The new checkpoint.
    """
    target = folder / f"step-{progress.step:08d}"
    fresh = folder / f".{target.name}.new"
    if accelerator.is_main_process:
        clear_unfinished(folder)
        fresh.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with disk_errors(fresh), only_trained_weights(model):
            accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if fingerprint is not None:
                fingerprint.save(fresh)
            if export_dir.exists():
                link_folder(export_dir, fresh / "export")
            commit_folder(fresh, target)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the space
        raise
    if accelerator.is_main_process:
        delete_expired(folder, keep, progress.best_step)
    accelerator.wait_for_everyone()
    return target


def clear_unfinished(folder: Path) -> None:
    """Delete what is left of checkpoints that were being saved or deleted when a run was killed."""
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def delete_expired(folder: Path, keep: int, best_step: int) -> None:
    """Delete the [`expired_checkpoints`] in a folder."""
    for old in expired_checkpoints(list_checkpoints(folder), keep, best_step):
        discard_folder(old)


def expired_checkpoints(paths: list[Path], keep: int, best_step: int) -> list[Path]:
    """The oldest checkpoints beyond `keep`; never the last or the best one, as in transformers' Trainer.

    Args:
        paths: checkpoints, oldest first.
        keep: number of checkpoints to keep; with 1, the last and the best may be two.
        best_step: step of the best model.
    """
    expendable = [path for path in paths[:-1] if path.name != f"step-{best_step:08d}"]
    return expendable[: max(0, len(paths) - keep)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names.

    Returns:
        The folder; None for `latest` if the run has not saved any yet or never started, so that a job that is
        restarted until it finishes can use the same command every time.

    Raises:
        UsageError: there is no checkpoint of that name (the message lists those that exist), or a finished run has
            none left.
    """
    found = list_checkpoints(output_dir / "checkpoints")
    if wanted == "latest":
        if not found and (output_dir / "curves.png").exists():
            raise UsageError(
                f"--resume_from_checkpoint latest: the run in {output_dir} is finished and its checkpoints are gone; "
                f"continue from its model with --model_name_or_path {output_dir / 'export'} and another --output_dir"
            )
        return found[-1] if found else None
    for path in found:
        if wanted == path.name or is_same_file(Path(wanted).resolve(), path.resolve()):
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir / 'checkpoints'}; it has: {names}"
    )


def check_later_checkpoints(checkpoint: Path) -> None:
    """Check that resuming from a checkpoint deletes no later one.

    Raises:
        UsageError: it would; the message names what would be lost.
    """
    later = [path.name for path in list_checkpoints(checkpoint.parent) if path.name > checkpoint.name]
    if later:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint.name}: this deletes the later {', '.join(later)}, their log and "
            "any better export made since; add --discard_later_checkpoints true, resume from latest, or copy "
            f"{checkpoint.parent.parent} and resume there"
        )


def rewind_folders(checkpoint: Path, export_dir: Path, within_epoch: bool = False) -> bool:
    """Restore `checkpoints/` and `export/` to what they were when a checkpoint was written.

    Args:
        checkpoint: checkpoint from which the run goes on.
        export_dir: folder of the best model so far.
        within_epoch: whether `export_dir` may have been written when the run stopped within an epoch. The resumed run
            does not validate there, so that the model is kept as [`INTERRUPTED_EXPORT`].

    Returns:
        Whether there was such a model.
    """
    clear_unfinished(checkpoint.parent)
    for path in reversed(list_checkpoints(checkpoint.parent)):  # newest first: if killed here, the latest is complete
        if path.name > checkpoint.name:
            discard_folder(path)
    best = checkpoint / "export"
    kept = within_epoch and export_dir.exists() and not _same_weights(best, export_dir)
    if kept:
        discard_folder(export_dir.with_name(INTERRUPTED_EXPORT))
        move_folder(export_dir, export_dir.with_name(INTERRUPTED_EXPORT))
    if not best.exists():
        discard_folder(export_dir)
    elif not _same_weights(best, export_dir):
        with replaced_folder(export_dir) as fresh:
            link_folder(best, fresh)
    return kept


def drop_repeated_export(export_dir: Path) -> None:
    """Delete the [`INTERRUPTED_EXPORT`] if it has the weights of the export."""
    interrupted = export_dir.with_name(INTERRUPTED_EXPORT)
    if _same_weights(interrupted, export_dir):
        discard_folder(interrupted)


def _same_weights(one: Path, other: Path) -> bool:
    first, second = (folder / "model.safetensors" for folder in (one, other))
    if not (first.exists() and second.exists()):
        return False
    return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)
