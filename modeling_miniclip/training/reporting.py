"""What a training run tells: lines on the terminal, the log of its steps, and the data for its card."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import printable
from ..evaluation.metrics import DIRECTIONS, RECALL_AT
from ..modeling_miniclip import MiniClipModel
from ..utils.files import replace_text
from .diagnostics import not_finite

# Groups of parameters whose rate is logged: that of each part, which the others follow.
RATES = ("head", "vision", "text")


def say(accelerator: Any, text: str) -> None:
    """Print once, not once per process, without breaking a progress bar."""
    if accelerator.is_main_process:
        tqdm.write(printable(text))


def describe_splits(splits: Any) -> str:
    """Numbers of images and captions of each split, in a line."""
    sizes = split_sizes(splits)
    return "; ".join(f"{name}: {size['images']} images, {size['captions']} captions" for name, size in sizes.items())


def split_sizes(splits: Any) -> dict[str, dict[str, int]]:
    """`images` and `captions` of each split."""
    return {
        name: {"images": len(rows), "captions": sum(len(captions) for captions in rows["captions"])}
        for name, rows in splits.items()
    }


def describe_model(model: MiniClipModel) -> str:
    """Towers, size of the shared space and numbers of parameters, in a line."""
    config = model.config
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{config.vision_config.architecture} + {config.text_config.model_type}, {config.projection_dim}-d, "
        f"{total / 1e6:.1f} M parameters ({trainable / 1e6:.1f} M trained)"
    )


def describe_validation(epoch: float, metrics: dict[str, float], improved: bool) -> str:
    """Loss and recalls of a validation, in a line; a star marks the best so far."""
    recalls = [
        f"{direction.replace('_', ' ')} " + " / ".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in RECALL_AT)
        for direction in DIRECTIONS
    ]
    line = f"epoch {epoch:g}: loss {metrics['loss']:.4f}, R@1/5/10 {', '.join(recalls)}, rsum {metrics['rsum']:.1f}"
    return line + (" *" if improved else "")


class StepMeter:
    """Collects steps and gives their means: loss over all processes, pairs a second, rates and norm of the last step.

    What was not read yet is part of a checkpoint, so that a resumed run logs what an uninterrupted one does.

    Args:
        accelerator: of the run.
        optimizer: whose groups have a `name`.
    """

    def __init__(self, accelerator: Any, optimizer: Any):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.chance = math.nan  # the mean of `chance` over the steps that were read last
        self.steps = 0  # and their number
        self.start_epoch(0)

    def start_epoch(self, step_in_epoch: int) -> None:
        """Measure the time from now on; at the first step of an epoch forget what the one before left unread."""
        self.start, self.pairs = time.perf_counter(), 0
        self.norm: Any = math.nan
        if step_in_epoch == 0:
            self.losses: list[Tensor] = []
            self.chances: list[float] = []

    def update(self, loss: Tensor, norm: Any, pairs: int, chance: float) -> None:
        """Take note of one step of this process without waiting for the device.

        Args:
            loss: this process's part.
            norm: of the gradient.
            pairs: texts of this process.
            chance: the loss of a model that cannot tell one pair of this step from another.
        """
        self.losses.append(loss.detach())
        self.chances.append(chance)
        self.norm = norm
        self.pairs += pairs

    def read(self) -> dict[str, float]:
        """Means since the last reading; every process has to call it.

        Raises:
            MiniClipError: the loss is not finite.
        """
        own = torch.stack([torch.stack(self.losses).mean(), self.losses[-1].new_tensor(self.pairs)])
        loss, pairs = self.accelerator.reduce(own, "sum").tolist()
        if not math.isfinite(loss):
            raise not_finite("training loss", loss, self.accelerator.mixed_precision)
        groups = [group for group in self.optimizer.param_groups if group["name"] in RATES]
        values = {
            "loss": loss,
            **{f"{group['name']}_learning_rate": group["lr"] for group in groups},
            "gradient_norm": float(self.norm),
            "pairs_per_second": pairs / (time.perf_counter() - self.start),
        }
        self.steps, self.chance = len(self.chances), sum(self.chances) / len(self.chances)
        self.start_epoch(0)
        return values

    def state_dict(self) -> dict[str, list[float]]:
        """For `accelerator.register_for_checkpointing`; every process has to call it."""
        losses = self.accelerator.reduce(torch.stack(self.losses), "sum").tolist() if self.losses else []
        return {"losses": losses, "chances": list(self.chances)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take over what [`state_dict`][StepMeter.state_dict] gave: one process the losses, the others zeros."""
        losses = torch.tensor(state["losses"], device=self.accelerator.device)
        self.losses = list(losses if self.accelerator.is_main_process else torch.zeros_like(losses))
        self.chances = list(state["chances"])


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
