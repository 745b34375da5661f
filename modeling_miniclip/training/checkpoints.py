"""What a run keeps on disk while it trains: its log, its resumable state, its folder; and how a signal ends it."""

import filecmp
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..utils.files import commit_folder, discard_folder, link_folder, recover_folder, replace_text, replaced_folder
from .arguments import TrainingArguments


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
        self.lines = 0

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Append a line: `step`, `epoch`, `split`, then the values (`loss` first)."""
        if self.is_main:
            line = {"step": step, "epoch": round(epoch, 4), "split": split} | {
                k: significant(v) for k, v in values.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.lines += 1

    def state_dict(self) -> dict[str, int]:
        """For `accelerator.register_for_checkpointing`: how long the log is."""
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what [`state_dict`][MetricsLog.state_dict] gave; the file itself is left to `rewind`."""
        self.lines = state["lines"]

    def rewind(self) -> None:
        """Forget the lines behind the checkpoint from which a run is resumed: they will be written again."""
        if self.is_main and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines[: self.lines] if line.endswith("\n")]
            replace_text(self.path, "".join(kept))
            self.lines = len(kept)


def significant(value: float, digits: int = 6) -> float:
    """A number with so many significant digits, as a log needs them."""
    return float(f"{value:.{digits}g}")


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


RESULTS = ("checkpoints", "export", "metrics.jsonl", "curves.png", "retrieval.png", "arguments.yaml")


def prepare_output_dir(arguments: TrainingArguments) -> Path:
    """The run's folder, new or to be resumed. Nothing in it is deleted yet: see [`clear_output_dir`].

    Raises:
        UsageError: it holds an earlier run and neither resuming nor overwriting was asked for.
    """
    output_dir = Path(arguments.output_dir)
    may_exist = arguments.overwrite_output_dir or arguments.resume_from_checkpoint is not None
    if not may_exist and any((output_dir / name).exists() for name in RESULTS):
        raise UsageError(
            f"{output_dir} holds an earlier run: go on with it by --resume_from_checkpoint latest, choose another "
            "--output_dir, or delete it by --overwrite_output_dir"
        )
    recover_folder(output_dir / "export")
    return output_dir


def clear_output_dir(output_dir: Path) -> None:
    """Delete an earlier run's results; called when everything else about the new run has been found right."""
    for path in (output_dir / name for name in RESULTS):
        if path.is_file():
            path.unlink()
        else:
            discard_folder(path)


# What is told at a signal. SIGTERM, which leaves less time, goes first where processes got different ones.
HANDLED = {
    signal.SIGTERM: "SIGTERM: saving after this step",
    signal.SIGINT: "Ctrl-C: saving after this step; again to stop at once",
}


class Interrupt:
    """Within the block Ctrl-C and SIGTERM only make themselves known, so that a run ends in good order.

    A second Ctrl-C ends it at once, as SIGKILL does. SIGTERM is what schedulers (Slurm, Kubernetes) send some seconds
    before that.

    Args:
        told: called with a line when the first one came.
    """

    def __init__(self, told: Callable[[str], None]):
        self.told = told
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None  # as `in_any_process` found last
        self.since = 0.0

    def __enter__(self) -> "Interrupt":
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that gets signals
            self.previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a loader's process that was just forked
            return
        # A launcher passes on what the terminal or the scheduler sent to all: that is not a second one.
        if self.received is None:
            self.received, self.since = signal.Signals(number), time.monotonic()
            self.told(HANDLED[self.received])
        elif number == signal.SIGTERM:
            self.received = signal.SIGTERM
        elif time.monotonic() > self.since + 1:
            signal.signal(number, self.previous[number] or signal.SIG_DFL)
            signal.raise_signal(number)

    def in_any_process(self, accelerator: Any) -> bool:
        """Whether any process was interrupted; every process has to ask at the same step and gets the same answer."""
        if accelerator.num_processes == 1:
            self.agreed = self.received
        else:
            flags = torch.tensor([self.received == s for s in HANDLED], device=accelerator.device).int()
            flags = accelerator.reduce(flags, "sum")
            self.agreed = next((s for s, count in zip(HANDLED, flags, strict=True) if count), None)
        return self.agreed is not None
