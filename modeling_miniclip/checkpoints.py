"""What a run keeps on disk while it trains: its log, its resumable state, its folder; and how Ctrl-C ends it."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arguments import TrainingArguments
from .errors import UsageError
from .files import commit_folder, recover_folder


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


class MetricsLog:
    """`metrics.jsonl`: one object a line, in the order of the steps. Only the main process writes."""

    def __init__(self, path: Path, is_main: bool):
        self.path, self.is_main = path, is_main

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Append a line: `step`, `epoch`, `split`, then the values (`loss` first)."""
        if self.is_main:
            line = {"step": step, "epoch": round(epoch, 4), "split": split} | {
                k: significant(v) for k, v in values.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def drop_after(self, step: int) -> None:
        """Forget the lines behind the checkpoint from which a run is resumed: they will be written again."""
        if self.is_main and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            fresh = self.path.with_suffix(".new")
            fresh.write_text("".join(kept), encoding="utf-8")
            fresh.replace(self.path)


def significant(value: float, digits: int = 6) -> float:
    """A number with so many significant digits, as a log needs them."""
    return float(f"{value:.{digits}g}")


def save_checkpoint(accelerator: Any, folder: Path, progress: Progress, keep: int) -> Path:
    """Write a resumable state as `folder/step-<step>`, complete or not at all, and drop the oldest beyond `keep`."""
    target = folder / f"step-{progress.step:08d}"
    fresh = folder / f".{target.name}.new"
    if accelerator.is_main_process:
        for unfinished in folder.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        fresh.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit_folder(fresh, target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def drop_checkpoints_after(folder: Path, step: int) -> None:
    """Delete the checkpoints behind the one from which a run is resumed, as its log forgets its later lines."""
    for path in checkpoints(folder):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


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


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The folder that `--resume_from_checkpoint` means.

    Raises:
        UsageError: there is none; those that are there are listed.
    """
    found = checkpoints(output_dir / "checkpoints")
    if wanted == "latest" and found:
        return found[-1]
    for path in found:
        if wanted == path.name or Path(wanted).resolve() == path.resolve():
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: no such checkpoint in {output_dir / 'checkpoints'}; there: {names}"
    )


RESULTS = ("checkpoints", "export", "metrics.jsonl", "curves.png", "retrieval.png", "arguments.yaml")


def prepare_output_dir(arguments: TrainingArguments) -> Path:
    """The run's folder, new or to be resumed. Nothing in it is deleted yet: see [`clear_output_dir`].

    Raises:
        UsageError: it holds an earlier run and neither resuming nor overwriting was asked for, or cannot be written.
    """
    output_dir = Path(arguments.output_dir)
    may_exist = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if not may_exist and any((output_dir / name).exists() for name in RESULTS):
        raise UsageError(
            f"{output_dir} holds an earlier run: go on with it by --resume_from_checkpoint latest, choose another "
            "--output_dir, or delete it by --overwrite_output_dir"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        os.unlink(probe)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    recover_folder(output_dir / "export")
    return output_dir


def clear_output_dir(output_dir: Path) -> None:
    """Delete an earlier run's results; called when everything else about the new run has been found right."""
    for path in (output_dir / name for name in RESULTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Interrupt:
    """Within the block the first Ctrl-C only sets `requested`, so that a run ends in good order; a second one kills.

    Args:
        told: called when the first one came.
    """

    def __init__(self, told: Callable[[], None]):
        self.told = told
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self.handles = threading.current_thread() is threading.main_thread()  # the only one that gets signals
        if self.handles:
            self.previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.handles:
            signal.signal(signal.SIGINT, self.previous)

    def _handle(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)
        self.told()

    def in_any_process(self, accelerator: Any) -> bool:
        """Whether any process was interrupted; every process has to ask at the same step and gets the same answer."""
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())
