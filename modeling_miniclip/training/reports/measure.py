"""The figures of the steps and of a validation: embeddings of the whole split, retrieval metrics, intervals."""

import math
import time
from functools import partial

from torch import Tensor
from tqdm.auto import tqdm

from ...evaluation.metrics import recall_intervals, validation_metrics
from ...utils.performance import release_freed_memory
from ..finetune.retention import SPLIT as RETENTION_SPLIT
from ..processes.distributed import broadcast_buffers, compute_on_main, scale_and_bias
from ..run import TrainingRun
from ..towers.features import embed_split
from ..zero_shot import measure_zero_shot, zero_shot_intervals
from .diagnostics import not_finite
from .reporting import describe_validation
from .several_datasets import report_datasets
from .short_embeddings import report_lengths


def log_steps(run: TrainingRun, bar: tqdm) -> None:
    """Log the means of the steps since the last line, warn if nothing is learned, and update the progress bar."""
    values = run.meter.read()
    values["logit_scale"], _ = scale_and_bias(run.unwrapped_model)
    run.write_metrics("train", values)
    run.diagnosis.after_steps(run.progress.step, values, run.meter.steps, run.meter.chance, run.meter.floor)
    rate = run.optimizer.param_groups[-1]["lr"]
    bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{rate:.1e}", pairs_s=f"{values['pairs_per_second']:.0f}")


def validate_start(run: TrainingRun) -> None:
    """Measure the trained model that a run starts from; it is no candidate for the export."""
    start = time.perf_counter()
    embeddings = embed_validation_split(run)
    metrics = measure_embeddings(run, embeddings) | classify_images(run)[0]
    run.write_metrics("validation", metrics, seconds=time.perf_counter() - start)
    run.say(describe_validation("before training", metrics))
    report_datasets(run, embeddings)
    report_lengths(run, embeddings)
    run.progress.at_start, run.progress.validated_step = metrics, run.progress.step
    run.progress.retained_at_start = report_retention(run)
    run.pace.add_validation(time.perf_counter() - start)


def embed_validation_split(run: TrainingRun) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, dim]` image and `[N, dim]` text embeddings of the whole split, and `[N]`, the row of each text's image."""
    broadcast_buffers(run.unwrapped_model)
    release_freed_memory()
    return embed_split(
        run.unwrapped_model,
        run.validation_loader,
        run.processor,
        run.accelerator.device,
        "validate" if run.accelerator.is_main_process else None,
        partial(run.bad_images.record_undecodable, "validation"),
    )


def measure_embeddings(run: TrainingRun, embeddings: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Loss and retrieval metrics of the split, computed on rank 0 and broadcast, so that all ranks decide alike."""
    model, accelerator = run.unwrapped_model, run.accelerator
    logit_scale, logit_bias = scale_and_bias(model)
    metrics = compute_on_main(
        lambda: validation_metrics(*embeddings, logit_scale, model.config.loss_type, logit_bias),
        accelerator.is_main_process,
    )
    if not math.isfinite(metrics["loss"]):
        raise not_finite("validation loss", metrics["loss"], accelerator.mixed_precision)
    return metrics


def classify_images(run: TrainingRun) -> tuple[dict[str, float], Tensor | None]:
    """Accuracy on `--zero_shot_dataset`, and the rank of the right class of each image; nothing without it."""
    return measure_zero_shot(run.zero_shot, run.unwrapped_model, run.processor, run.accelerator, run.bad_images)


def measure_retention(run: TrainingRun) -> dict[str, float] | None:
    """Loss and retrieval metrics on `--retention_dataset`, the same in every process; None without it."""
    if run.retention is None:
        return None
    release_freed_memory()
    embeddings = embed_split(
        run.unwrapped_model,
        run.retention.loader,
        run.processor,
        run.accelerator.device,
        "retention" if run.accelerator.is_main_process else None,
        partial(run.bad_images.record_undecodable, RETENTION_SPLIT),
    )
    return measure_embeddings(run, embeddings)


def report_retention(run: TrainingRun) -> dict[str, float] | None:
    """Like [`measure_retention`]; writes the metrics to the log and metrics.jsonl. Every process must call it."""
    metrics = measure_retention(run)
    if run.retention is not None and metrics is not None:
        run.write_metrics("retention", metrics)
        run.say(describe_validation(f"  retained, {run.retention.name}", metrics))
    return metrics


def metric_intervals(
    run: TrainingRun, embeddings: tuple[Tensor, Tensor, Tensor], class_ranks: Tensor | None
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics for the model card, from a bootstrap over images."""
    intervals = recall_intervals(*embeddings)
    if run.zero_shot is not None and class_ranks is not None:
        intervals |= zero_shot_intervals(run.zero_shot.data, class_ranks)
    return intervals
