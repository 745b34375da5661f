"""Report a training run: lines on the terminal, `metrics.jsonl`, losses and throughput."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import DatasetDict
from torch import Tensor
from tqdm.auto import tqdm

from ...configuration_miniclip import tower_name
from ...data.load_rows import Splits
from ...data.tables.row_blocks import caption_counts
from ...errors import printable
from ...evaluation.metrics import DIRECTIONS, RECALL_AT, ZERO_SHOT_METRICS, is_better
from ...modeling_miniclip import MiniClipModel
from ...utils.files import replace_text
from ..resuming.checkpoints import Progress
from .diagnostics import not_finite

# Parameter groups whose learning rates are logged: one for each part, as the others are proportional.
RATES = ("head", "vision", "text")


def say(accelerator: Accelerator, text: str) -> None:
    """Print once, not once per process, without breaking a progress bar."""
    if accelerator.is_main_process:
        tqdm.write(printable(text))


def describe_splits(splits: DatasetDict) -> str:
    """One line with the number of images and captions of each split, and what a sample was drawn from."""
    parts = []
    for name, size in split_sizes(splits).items():
        images = f"{size['images']} images"
        if "seed" in size:
            images = f"{size['images']} of {size['drawn_from']} images, drawn with seed {size['seed']}"
        parts.append(f"{name}: {images}, {size['captions']} captions")
    return "; ".join(parts)


def split_sizes(splits: DatasetDict) -> dict[str, dict[str, int]]:
    """Number of `images` and `captions` of each split; for a sample, the images it was `drawn_from` and the `seed`."""
    sizes = {name: {"images": len(rows), "captions": int(caption_counts(rows).sum())} for name, rows in splits.items()}
    for name, sample in splits.samples.items() if isinstance(splits, Splits) else ():
        sizes[name] |= {"drawn_from": sample.images, "seed": sample.seed}
    return sizes


def describe_model(model: MiniClipModel) -> str:
    """One line with the towers, the dimensions of the shared space and the number of parameters."""
    config = model.config
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{tower_name(config.vision_config)} + {config.text_config.model_type} ({config.text_pooling}), "
        f"{config.projection_dim}-d, "
        f"{total / 1e6:.1f} M parameters ({trainable / 1e6:.1f} M trained)"
    )


def describe_validation(when: str, metrics: dict[str, float], improved: bool = False) -> str:
    """One line with the loss, recalls and zero-shot accuracy of a validation; a star marks the best so far."""
    recalls = [
        f"{direction.replace('_', ' ')} " + " / ".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in RECALL_AT)
        for direction in DIRECTIONS
    ]
    line = f"{when}: loss {metrics['loss']:.4f}, R@1/5/10 {', '.join(recalls)}, rsum {metrics['rsum']:.1f}"
    found = [f"{metrics[name]:.1f}" for name in ZERO_SHOT_METRICS if name in metrics]
    if found:
        line += f", zero-shot top-1{'/5' if len(found) == 2 else ''} {' / '.join(found)}"
    return line + (" *" if improved else "")


def describe_best(metric: str, progress: Progress) -> list[str]:
    """One line with the best value of a run, and a warning if the model that it started from was better."""
    best, start = progress.best_value, (progress.at_start or {}).get(metric)
    line = f"best {metric} {best:.4g} at step {progress.best_step}"
    if start is None:
        return [line]
    lines = [f"{line}, before training {start:.4g}"]
    if is_better(metric, start, best):
        lines.append(
            f"warning: no validation was as good as that of the model the run started from ({metric} {start:.4g}): "
            "likely the learning rates are too high, or the data is another than it was trained on"
        )
    return lines


class StepMeter:
    """Collects steps and averages them: loss over all processes, pairs per second, rates and norm of the last step.

    A checkpoint includes the steps since the last reading, so that a resumed run logs what an uninterrupted one would.

    Args:
        accelerator: processes of the run.
        optimizer: optimizer whose groups have a `name`.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.chance = self.floor = math.nan  # means over the steps that `read` averaged last
        self.steps = 0  # their number
        self.start_epoch(0)

    def start_epoch(self, step_in_epoch: int) -> None:
        """Restart the clock; at the first step of an epoch, drop the steps of the last one that were not read."""
        self.start, self.pairs = time.perf_counter(), 0
        self.norm: Any = math.nan
        if step_in_epoch == 0:
            self.losses: list[Tensor] = []
            self.chances: list[float] = []
            self.floors: list[float] = []
            self.divergences: list[Tensor] = []

    def leave_out(self, seconds: float) -> None:
        """Leave the time of a validation out of the throughput."""
        self.start += seconds

    def update(
        self,
        loss: Tensor,
        norm: Any,
        pairs: int,
        chance: float,
        floor: float = 0.0,
        divergence: Tensor | None = None,
    ) -> None:
        """Add a step of this process without waiting for the device.

        Args:
            loss: this process's part of the contrastive loss.
            norm: norm of the gradient.
            pairs: number of texts of this process.
            chance: loss of a model that cannot distinguish the pairs of this step.
            floor: what the loss of this step cannot be below.
            divergence: this process's part of the divergence from a teacher, in all steps or in none.
        """
        self.losses.append(loss.detach())
        if divergence is not None:
            self.divergences.append(divergence.detach())
        self.chances.append(chance)
        self.floors.append(floor)
        self.norm = norm
        self.pairs += pairs

    def read(self) -> dict[str, float]:
        """Means since the last reading; every process must call it.

        Raises:
            MiniClipError: the loss is not finite.
        """
        own = [torch.stack(self.losses).mean(), self.losses[-1].new_tensor(self.pairs)]
        own += [torch.stack(self.divergences).mean()] if self.divergences else []
        loss, pairs, *divergence = self.accelerator.reduce(torch.stack(own), "sum").tolist()
        if not math.isfinite(loss):
            raise not_finite("training loss", loss, self.accelerator.mixed_precision)
        groups = [group for group in self.optimizer.param_groups if group["name"] in RATES]
        values = {
            "loss": loss,
            **({"teacher_divergence": divergence[0]} if divergence else {}),
            **{f"{group['name']}_learning_rate": group["lr"] for group in groups},
            "gradient_norm": float(self.norm),
            "pairs_per_second": pairs / (time.perf_counter() - self.start),
        }
        self.steps = len(self.chances)
        self.chance, self.floor = sum(self.chances) / self.steps, sum(self.floors) / self.steps
        self.start_epoch(0)
        return values

    def state_dict(self) -> dict[str, list[float]]:
        """State for `accelerator.register_for_checkpointing`; every process must call it."""
        sums = {
            name: self.accelerator.reduce(torch.stack(parts), "sum").tolist() if parts else []
            for name, parts in (("losses", self.losses), ("divergences", self.divergences))
        }
        return sums | {"chances": list(self.chances), "floors": list(self.floors)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore what [`state_dict`][StepMeter.state_dict] returned: rank 0 gets the losses, the others zeros."""
        saved = (torch.tensor(state[name], device=self.accelerator.device) for name in ("losses", "divergences"))
        is_main = self.accelerator.is_main_process
        self.losses, self.divergences = (list(one if is_main else torch.zeros_like(one)) for one in saved)
        self.chances, self.floors = list(state["chances"]), list(state["floors"])


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, in the order of the steps. Only rank 0 writes."""

    def __init__(self, path: Path, is_main: bool):
        self.path, self.is_main = path, is_main
        self.lines = 0

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Append a line: `step`, `epoch`, `split`, then the values (`loss` first)."""
        if self.is_main:
            line = {"step": step, "epoch": round(epoch, 4), "split": split} | {
                k: round_to_digits(v) for k, v in values.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.lines += 1

    def state_dict(self) -> dict[str, int]:
        """State for `accelerator.register_for_checkpointing`: the length of the log."""
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what [`state_dict`][MetricsLog.state_dict] returned; `rewind` then shortens the file."""
        self.lines = state["lines"]

    def last_validation(self) -> int | None:
        """Step of the last validation in the file, also if it comes after the checkpoint that was loaded."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        steps = [line["step"] for line in map(json.loads, (line for line in lines if line.endswith("\n")))
                 if line["split"] == "validation"]  # fmt: skip
        return steps[-1] if steps else None

    def rewind(self) -> None:
        """Delete the lines after the checkpoint that a run resumes from: they will be written again."""
        if self.is_main and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines[: self.lines] if line.endswith("\n")]
            replace_text(self.path, "".join(kept))
            self.lines = len(kept)


def round_to_digits(value: float, digits: int = 6) -> float:
    """A number rounded to `digits` significant digits."""
    return float(f"{value:.{digits}g}")
