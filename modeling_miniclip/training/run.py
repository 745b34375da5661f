"""The state of a training run: what `prepare` builds and the training loop changes."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..data.loading.batches import GlobalBatches
from ..data.loading.loader import BatchLoader
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .bad_images import BadImages
from .command_line.arguments import TrainingArguments
from .command_line.check_arguments import checkpoint_interval
from .ema import AveragedWeights
from .finetune.retention import RetentionSet
from .loss.pair_counts import counts_of_batch
from .memory.sizes import StepSizes
from .pace import Pace
from .processes.distributed import exchange_device
from .reports.callbacks import Callback, Callbacks, asks_to_stop
from .reports.diagnostics import Diagnosis, chance_loss, floor_loss
from .reports.reporting import MetricsLog, StepMeter, say
from .resuming.checkpoints import ExportedEmbeddings, Progress, check_finite_weights, save_checkpoint
from .resuming.fingerprint import Fingerprint
from .resuming.signals import SignalHandler
from .towers.feature_cache import FeatureRows
from .towers.features import FrozenFeatures
from .towers.teacher import RunTeacher
from .zero_shot import ZeroShotSet


@dataclass
class TrainingRun:
    """Everything that training reads and changes.

    Args:
        arguments: flags of the run, all resolved.
        accelerator: device, processes and precision.
        model: the model as Accelerate prepared it, for forward passes.
        unwrapped_model: the same model without Accelerate's wrapper, for everything but forward passes.
        processor: preprocessing of images and texts.
        optimizer: AdamW, as Accelerate prepared it.
        scheduler: schedule of the learning rates.
        train_loader: this process's share of the training batches.
        validation_loader: this process's share of the validation batches.
        validation_split: validation images with their captions, for the pictures.
        validation_features: features of the validation split from frozen towers.
        zero_shot: images to classify at each validation; None without `--zero_shot_dataset`.
        retention: images that must still be found; None without `--retention_dataset`.
        before_training: weights before the first step that training may change, on rank 0; empty without `--blend`.
        validation_parts: rows of the validation split by dataset; empty unless several datasets have some.
        card_data: name and sizes of the dataset, and the licence, for the model card.
        log: writer of `metrics.jsonl`.
        meter: collector of losses and throughput since the last log line.
        progress: epoch, step and best value so far.
        signals: handler of Ctrl-C and SIGTERM.
        diagnosis: watcher that warns if the run does not learn.
        bad_images: images that could not be decoded so far.
        steps_per_epoch: optimizer steps per epoch.
        last_step: number of the step after which training ends; with a time limit, not known at first.
        exported: what the exported model embeds, to check the export at the end.
        ema: moving average of the weights; None without `--ema_decay`.
        teacher: CLIP whose similarities the model learns; None without `--teacher`.
        fingerprint: what the run trains on and with, on rank 0; each checkpoint has it.
        pace: times of steps, validations and checkpoints.
        sizes: which steps fit into memory.
        saved_position: `position` of the last checkpoint; at first the start of the run, which needs none.
        callbacks: functions of the program that started the run.
        latest: metrics that were written last, by split: `train` or `validation`.
    """

    arguments: TrainingArguments
    accelerator: Accelerator
    model: nn.Module
    unwrapped_model: MiniClipModel
    processor: MiniClipProcessor
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    train_loader: BatchLoader
    validation_loader: BatchLoader
    validation_split: Dataset
    validation_features: FrozenFeatures
    validation_parts: dict[str, range]
    card_data: dict[str, Any]
    log: MetricsLog
    meter: StepMeter
    progress: Progress
    signals: SignalHandler
    diagnosis: Diagnosis
    bad_images: BadImages
    steps_per_epoch: int
    last_step: int
    zero_shot: ZeroShotSet | None = None
    retention: RetentionSet | None = None
    before_training: dict[str, Tensor] = field(default_factory=dict)
    exported: ExportedEmbeddings = field(default_factory=ExportedEmbeddings)
    ema: AveragedWeights | None = None
    teacher: RunTeacher | None = None
    fingerprint: Fingerprint | None = None
    pace: Pace = field(default_factory=Pace)
    sizes: StepSizes = field(default_factory=StepSizes)
    saved_position: tuple[int, int] = (0, 0)
    callbacks: Callbacks = field(default_factory=Callbacks)
    latest: dict[str, dict[str, float]] = field(default_factory=dict)
    output_dir: Path = field(init=False)
    export_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.arguments.output_dir)
        self.export_dir = self.output_dir / "export"

    def say(self, line: str) -> None:
        """Print a line once, not once per process."""
        say(self.accelerator, line)

    @property
    def train_batches(self) -> GlobalBatches:
        """Sampler of the training batches."""
        return cast(GlobalBatches, self.train_loader.batches)

    @property
    def position(self) -> tuple[int, int]:
        """Number of complete epochs, each with its validation, and of steps after them."""
        return self.progress.epoch, self.progress.step_in_epoch

    @property
    def epoch(self) -> float:
        """Passes over the training images so far, for logs."""
        return self.progress.epoch + self.progress.step_in_epoch / self.steps_per_epoch

    @property
    def epoch_is_trained(self) -> bool:
        """Whether only the validation of the current epoch is left."""
        return self.progress.step_in_epoch == self.steps_per_epoch

    @property
    def out_of_patience(self) -> bool:
        """Whether `--early_stopping_patience` validations passed without improvement."""
        return self.progress.validations_without_improvement >= (self.arguments.early_stopping_patience or math.inf)

    def should_stop(self) -> bool:
        """Whether nothing is left to train. Every process must call it, as a signal may have reached only one."""
        interrupted = self.signals.received_by_any_process(self.accelerator)
        done = self.progress.step >= self.last_step and not self.epoch_is_trained
        return interrupted or done or self.out_of_patience

    def final_weights(self) -> AbstractContextManager[None]:
        """Within the block, the model has the weights that are validated and exported."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    @property
    def validation_is_due(self) -> bool:
        """Whether `--eval_steps` asks for a validation now; the end of an epoch has its own."""
        step, interval = self.progress.step, self.arguments.eval_steps
        if interval is None or step == self.progress.validated_step or self.epoch_is_trained:
            return False
        return step > 0 and step % interval == 0

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether `--checkpointing_steps` asks for a checkpoint now; an epoch is saved after its validation."""
        interval = checkpoint_interval(self.arguments)
        if interval is None:
            return self.progress.step_in_epoch == 0
        return self.progress.step % interval == 0 and not self.epoch_is_trained

    def save_checkpoint(self) -> None:
        """Save a checkpoint unless this step already has one.

        Raises:
            MiniClipError: a weight is not finite.
        """
        if self.saved_position == self.position:
            return
        start = time.perf_counter()
        check_finite_weights(self.unwrapped_model, self.accelerator)
        folder, keep = self.output_dir / "checkpoints", self.arguments.save_total_limit
        save_checkpoint(
            self.accelerator, self.unwrapped_model, folder, self.progress, self.fingerprint, keep, self.export_dir
        )
        self.saved_position = self.position
        self.pace.add_checkpoint(time.perf_counter() - start)

    def count_step(self, batch: dict[str, Any], images: int, loss: Tensor, norm: Any) -> None:
        """Count a step for the next line of the log.

        Args:
            batch: this process's share of the global batch.
            images: number of images in the global batch.
            loss: this process's part of the loss.
            norm: norm of the gradient.
        """
        negatives = int(batch["is_negative"].sum()) if "is_negative" in batch else 0
        texts = len(batch["text_image_id"]) - negatives
        loss_type = self.unwrapped_model.config.loss_type
        counts = counts_of_batch(batch, images, exchange_device(self.accelerator))
        bounds = chance_loss(counts, loss_type), floor_loss(counts, loss_type)
        loss, divergence = (loss, None) if self.teacher is None else self.teacher.taken_out(loss)
        self.meter.update(loss, norm, texts, *bounds, divergence)

    def write_metrics(self, split: str, values: dict[str, float], **only_in_file: float) -> None:
        """Write values to `metrics.jsonl` and the trackers.

        Args:
            split: `train` or `validation`.
            values: metrics by name.
            **only_in_file: values for `metrics.jsonl` only.
        """
        self.latest[split] = values
        self.log.write(self.progress.step, self.epoch, split, values | only_in_file)
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=self.progress.step)

    def after_step(self) -> None:
        """Call `on_step` of the program; the run ends cleanly if it returns False."""
        self._call(self.callbacks.on_step, "train")

    def after_validation(self) -> None:
        """Call `on_validation` of the program; the run ends cleanly if it returns False."""
        self._call(self.callbacks.on_validation, "validation")

    def _call(self, callback: Callback | None, split: str) -> None:
        is_main = self.accelerator.is_main_process
        if is_main and asks_to_stop(callback, self.progress.step, self.latest.get(split, {})):
            self.signals.stop()

    def validation_image_features(self) -> FeatureRows | None:
        """`[rows, width]` features of a frozen image tower for the validation images, else None."""
        return None if self.validation_features.vision is None else self.validation_features.vision[0]

    def close(self) -> None:
        """End the loader processes, which would otherwise take 5 s each at exit, and the trackers."""
        del self.train_loader, self.validation_loader
        self.zero_shot = self.retention = None
        self.accelerator.end_training()
