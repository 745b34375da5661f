"""Train your own CLIP.

    python train_miniclip.py                          # built-in scenes, no download
    python train_miniclip.py --dataset captions.csv   # your images, ResNet-50 + DistilBERT
    accelerate launch --config_file configuration/accelerate/cpu2.yaml train_miniclip.py --recipe scenes

Read this file from top to bottom; it is the path of a training row:

    main -> prepare -> train -> train_one_epoch -> train_step -> compute_loss_and_gradients -> validate -> finish

Flags: `configuration/README.md`. Building blocks: `modeling_miniclip/training/`.
"""

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from modeling_miniclip.utils.interrupts import STARTED, TERMINATED, quit_at_interrupt

if Path(sys.argv[0]).stem in ("train_miniclip", "train-miniclip"):
    quit_at_interrupt()

# Set before the libraries are imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network access at import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader processes already run in parallel
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks is computed on its CPU

from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import command_line, exit_on_wrong_flags, parse_arguments
from modeling_miniclip.utils.commands import run_command

if Path(sys.argv[0]).stem in ("train_miniclip", "train-miniclip"):
    exit_on_wrong_flags()  # after 1 s: --help and typing errors do not wait for the imports below, which take 6 s

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from modeling_miniclip.data.loading.collation import model_inputs
from modeling_miniclip.data.loading.loader import readable_worker_errors
from modeling_miniclip.evaluation.metrics import is_better
from modeling_miniclip.modeling_miniclip import MiniClipOutput
from modeling_miniclip.training import setup
from modeling_miniclip.training.finetune.blend import blend_with_start
from modeling_miniclip.training.finetune.retention import build_retention, load_retention
from modeling_miniclip.training.grad_cache import backward_in_chunks, split_batch
from modeling_miniclip.training.hard_negatives import choose_hard_negatives
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.matryoshka import check_lengths, loss_prefixes
from modeling_miniclip.training.memory.steps import Exchange, compute_step
from modeling_miniclip.training.optimizer import clamp_logit_scale
from modeling_miniclip.training.processes.deepspeed import check_engine_state, describe_engine
from modeling_miniclip.training.processes.distributed import exchange_device, full_tensor
from modeling_miniclip.training.processes.heartbeat import ends_with_lost_processes
from modeling_miniclip.training.publish import export_best, push_export
from modeling_miniclip.training.reports.callbacks import Callbacks
from modeling_miniclip.training.reports.figures import draw_curves, draw_retrieval, read_metrics
from modeling_miniclip.training.reports.measure import (
    classify_images,
    embed_validation_split,
    log_steps,
    measure_embeddings,
    metric_intervals,
    report_retention,
    validate_start,
)
from modeling_miniclip.training.reports.overfit import check_overfitting
from modeling_miniclip.training.reports.reload_check import load_checked_export
from modeling_miniclip.training.reports.reporting import describe_best, describe_validation
from modeling_miniclip.training.reports.several_datasets import report_datasets
from modeling_miniclip.training.reports.shared_captions import recall_with_shared
from modeling_miniclip.training.reports.short_embeddings import report_lengths
from modeling_miniclip.training.reports.word_order import report_word_order
from modeling_miniclip.training.resuming.checkpoints import INTERRUPTED_EXPORT, drop_repeated_export
from modeling_miniclip.training.resuming.output_dir import how_to_resume, locked_output_dir
from modeling_miniclip.training.row_order import choose_shuffle
from modeling_miniclip.training.run import TrainingRun
from modeling_miniclip.training.settings import choose_settings
from modeling_miniclip.training.time_limit import NO_END, keep_time
from modeling_miniclip.training.towers.layers import set_training_mode
from modeling_miniclip.training.towers.teacher import check_teacher, load_teacher
from modeling_miniclip.training.towers.text_groups import lengths_for_groups
from modeling_miniclip.training.zero_shot import build_zero_shot, load_zero_shot
from modeling_miniclip.utils.processes import ended_children


def main(argv: list[str] | None = None, started: float | None = None) -> Path:
    """Train a model as the flags say; [`train`][modeling_miniclip.api.train.train] does the same from Python.

    Args:
        argv: flags, as on the command line; None takes those of this process.
        started: `time.perf_counter()` at the start of the command, for `--time_limit`; None is now.

    Returns:
        The folder of the exported model.

    Raises:
        MiniClipError: the flags or the data are wrong; the message says where, and how to fix it. With
            `--overfit_batch`, the loss did not reach zero. If the disk is full, the message says what was saved.
        SystemExit: after SIGTERM, with code 143; a checkpoint was saved.
    """
    started = started or time.perf_counter()
    return run_training(parse_arguments(argv), started)


def run_training(arguments: TrainingArguments, started: float, callbacks: Callbacks | None = None) -> Path:
    """Train a model from its arguments to its export; results and errors as in [`main`]."""
    advice = partial(how_to_resume, arguments.output_dir)
    with ends_with_lost_processes(advice), readable_worker_errors(), ended_children():
        if arguments.overfit_batch:
            return check_overfitting(arguments, train_step)
        with locked_output_dir(arguments):
            run = prepare(arguments)
            run.pace.started, run.callbacks = started, callbacks or Callbacks()
            with run.signals:  # Ctrl-C and SIGTERM wait for the end of a step
                train(run)
            if run.signals.terminated:  # seconds are left: no figures, no push
                run.close()
                sys.exit(TERMINATED)
            blend_with_start(run)
            return finish(run)


# --- prepare: find everything that can go wrong before any long work ------------------------------------------------


def prepare(arguments: TrainingArguments) -> TrainingRun:
    """Check the output folder, build data, model, loaders, optimizer and schedule, and load a checkpoint to resume."""
    launch = setup.check_launch(arguments)
    check_lengths(arguments)
    check_teacher(arguments)
    checkpoint = setup.prepare_output_dir(arguments)
    hub_model_id = setup.prepare_hub_repo(arguments)
    accelerator = setup.build_accelerator(arguments, launch)  # joins the processes and sets the seed
    check_engine_state(checkpoint, accelerator)
    arguments = replace(arguments, hub_model_id=hub_model_id, mixed_precision=accelerator.mixed_precision)

    splits = setup.load_splits(arguments)  # rows {image, image_id, captions}
    arguments = choose_settings(splits, checkpoint, arguments, accelerator)
    setup.report_splits(splits, arguments, accelerator)
    shared = setup.find_shared(splits, arguments, accelerator)
    arguments = choose_shuffle(splits, checkpoint, arguments, accelerator)
    arguments = choose_hard_negatives(splits, arguments, accelerator)
    classified, retained = load_zero_shot(arguments, accelerator), load_retention(arguments, accelerator)
    fingerprint = setup.fingerprint_data(splits, checkpoint, arguments, accelerator, classified, retained)
    model, processor = setup.build_model(splits, arguments, accelerator)
    teacher = load_teacher(arguments, accelerator)
    setup.fingerprint_model(fingerprint, model, processor, checkpoint, arguments, accelerator, teacher)
    evidence = setup.probe_captions(splits, model, processor, arguments, accelerator)
    features = setup.compute_frozen_features(model, processor, splits, arguments, accelerator, teacher)  # minutes
    loaders = setup.build_loaders(splits, features, processor, arguments, accelerator, shared)
    zero_shot = build_zero_shot(classified, model, processor, arguments, accelerator)
    retention = build_retention(retained, model, processor, arguments, accelerator)

    further = evidence, shared, zero_shot, retention, teacher
    run = setup.build_run(model, processor, splits, features, loaders, arguments, accelerator, fingerprint, *further)
    setup.start_or_resume(run, checkpoint)
    return run


# --- train ----------------------------------------------------------------------------------------------------------


def train(run: TrainingRun) -> None:
    """Train until the last step, early stopping or a signal; validate and save checkpoints when due."""
    progress, arguments, accelerator = run.progress, run.arguments, run.accelerator
    if arguments.model_name_or_path is not None and progress.validated_step < 0:
        validate_start(run)
    last = f"as many as fit into {arguments.time_limit}" if run.last_step == NO_END else run.last_step
    run.say(
        f"steps {progress.step + 1} to {last} of {arguments.batch_size} images on "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
        f"{describe_engine(accelerator)}"
    )
    while not run.should_stop():
        train_one_epoch(run)
        if not run.epoch_is_trained or run.signals.terminated:
            break
        validate(run)
        progress.end_epoch()
        if run.checkpoint_is_due:
            run.save_checkpoint()
    run.save_checkpoint()
    if run.out_of_patience:
        validations = progress.validations_without_improvement
        unit = "epochs" if arguments.eval_steps is None else "validations"
        run.say(f"early stopping: {arguments.best_metric} did not improve for {validations} {unit}")
    if not run.signals.terminated and (progress.validated_step < progress.step or progress.best_value is None):
        improved = validate(run)  # after the checkpoint: a resumed run repeats the rest of this epoch without it
        if run.signals.agreed is not None:
            kept = f"; if the run is resumed, it stays as {INTERRUPTED_EXPORT}" if improved else ""
            run.say(f"exported: the model of step {progress.best_step}{kept}")


def train_one_epoch(run: TrainingRun) -> None:
    """Train the rest of the current epoch, one optimizer step per batch, up to a signal or early stopping."""
    progress, arguments = run.progress, run.arguments
    if run.validation_is_due:  # a signal came before it
        validate(run)
        if run.out_of_patience or run.signals.received_by_any_process(run.accelerator):
            return
    set_training_mode(run.unwrapped_model, arguments.freeze, bool(arguments.freeze_batch_norm))
    run.train_batches.epoch, run.train_batches.first_batch = progress.epoch, progress.step_in_epoch
    run.meter.start_epoch(progress.step_in_epoch)
    title = f"epoch {progress.epoch + 1}/{arguments.num_train_epochs or '?'}"
    bar = tqdm(total=run.steps_per_epoch, initial=progress.step_in_epoch, desc=title, unit="step", leave=False,
               disable=not run.accelerator.is_main_process)  # fmt: skip
    for batch in run.train_loader:
        skipped = run.bad_images.record_undecodable("train", batch.pop("undecodable", []))
        images = run.train_batches.images_in(progress.step_in_epoch) - skipped
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        if images > 0:  # a step without images counts, but teaches nothing
            train_step(run, batch, images)
        # Log before the schedule changes the rates, so that a line shows the rates that its step used.
        if run.meter.losses and (progress.step % arguments.logging_steps == 0 or progress.step == run.last_step):
            log_steps(run, bar)
        if arguments.lr_scheduler_type == "cosine":
            run.scheduler.step()
        bar.update()
        keep_time(run)
        run.after_step()
        ends = run.signals.received_by_any_process(run.accelerator) or progress.step == run.last_step
        if run.validation_is_due and not ends:
            validate(run)
            set_training_mode(run.unwrapped_model, arguments.freeze, bool(arguments.freeze_batch_norm))
            ends = run.signals.received_by_any_process(run.accelerator)
        if run.checkpoint_is_due:
            run.save_checkpoint()
        if ends or run.out_of_patience:
            break
    bar.close()


def train_step(run: TrainingRun, batch: dict[str, Any], images: int) -> None:
    """Take one optimizer step.

    Args:
        run: run whose model is trained.
        batch: this process's share of the global batch, see [`compute_loss_and_gradients`].
        images: number of images in the global batch.
    """
    run.optimizer.zero_grad(set_to_none=True)
    loss = compute_step(run, batch, compute_loss_and_gradients)  # in chunks, if it does not fit into memory
    parameters = run.unwrapped_model.parameters()
    gradient_norm = full_tensor(run.accelerator.clip_grad_norm_(parameters, run.arguments.max_grad_norm))
    run.optimizer.step()
    clamp_logit_scale(run.unwrapped_model)
    if run.ema is not None:
        run.ema.update()
    run.count_step(batch, images, loss, gradient_norm)


def compute_loss_and_gradients(
    run: TrainingRun, batch: dict[str, Any], model: nn.Module | None = None, exchange: Exchange = nullcontext
) -> Tensor:
    """Run the model forward and backward, in chunks with `--chunk_size`.

    Args:
        run: run whose model gets the gradients.
        batch: this process's share of the global batch, b images and n texts: `pixel_values` `[b, 3, H, W]` uint8,
            `input_ids` and `attention_mask` `[n, L]`, `image_id` `[b]` and `text_image_id` `[n]`, and `image_keys`,
            `text_keys` and `is_negative` as in [`global_contrastive_loss`], if there are any. For frozen towers
            `vision_pooler_output` `[b, width]` and `text_pooler_output` `[n, width]` instead. With a teacher,
            `taught_image` `[b, width]` and `taught_text` `[n, width]`. In chunks, the pixels are taken out of it.
        model: model to call; None is that of the run.
        exchange: context for the block in which the processes exchange embeddings.

    Returns:
        This process's part of the loss; the loss is the sum over the processes.
    """
    accelerator, chunk_size = run.accelerator, run.arguments.chunk_size
    model = run.model if model is None else model  # a compiled model has no truth value
    chunks = [batch] if chunk_size is None else split_batch(batch, chunk_size, accelerator.device)
    ids: dict[str, Any] = {
        name: torch.cat([chunk[name] for chunk in chunks]).to(exchange_device(accelerator))
        for name in ("image_id", "text_image_id", "image_keys", "text_keys", "is_negative")
        if name in batch
    }
    teacher = None if run.teacher is None else run.teacher.embed(chunks)

    def inputs_of(chunk: dict[str, Any]) -> dict[str, Any]:
        lengths = lengths_for_groups(run.unwrapped_model, chunk)
        return {**model_inputs(chunk, run.processor, accelerator.device), **lengths, "return_logits": False}

    def loss_of(output: MiniClipOutput) -> Tensor:
        with exchange():
            return global_contrastive_loss(
                output["image_embeds"].float(),  # [b, dim]
                output["text_embeds"].float(),  # [n, dim]
                output["logit_scale"],
                loss_type=run.unwrapped_model.config.loss_type,
                logit_bias=output.logit_bias,
                prefixes=loss_prefixes(run.unwrapped_model.config),
                teacher=teacher,
                **ids,
            )

    if len(chunks) > 1:
        return backward_in_chunks(accelerator, model, chunks, inputs_of, loss_of)
    loss = loss_of(model(**inputs_of(chunks[0])))
    # DistributedDataParallel averages the gradients over the processes; the parts of the loss must be summed.
    accelerator.backward(loss * accelerator.num_processes)
    return loss


# --- validate -------------------------------------------------------------------------------------------------------


def validate(run: TrainingRun) -> bool:
    """Validate the model, with its averaged weights if there are any, and export it if it is the best so far.

    Returns:
        Whether the model is the best so far.

    Raises:
        MiniClipError: the loss is not finite.
    """
    start = time.perf_counter()
    with run.final_weights():
        improved = validate_weights(run)
    run.progress.count_validation(improved)
    run.meter.leave_out(time.perf_counter() - start)
    run.pace.add_validation(time.perf_counter() - start)
    run.after_validation()
    return improved


def validate_weights(run: TrainingRun) -> bool:
    """Measure the whole validation split, step the plateau schedule, and export the model if it is the best so far."""
    progress, arguments, is_main = run.progress, run.arguments, run.accelerator.is_main_process
    start = time.perf_counter()
    embeddings = embed_validation_split(run)
    classified, class_ranks = classify_images(run)
    metrics = measure_embeddings(run, embeddings) | classified
    run.write_metrics("validation", metrics, seconds=time.perf_counter() - start)
    if isinstance(run.scheduler, ReduceLROnPlateau):
        run.scheduler.step(metrics["loss"])
    value = metrics[arguments.best_metric]
    improved = is_better(arguments.best_metric, value, progress.best_value)
    run.say(describe_validation(f"epoch {run.epoch:.4g}", metrics, improved))
    report_datasets(run, embeddings)
    by_length, retained = report_lengths(run, embeddings), report_retention(run)
    if is_main:
        run.diagnosis.after_validation(progress.step, *embeddings)
    if improved:
        progress.best_value, progress.best_step = value, progress.step
        intervals = metric_intervals(run, embeddings, class_ranks) if is_main else {}
        with_shared = recall_with_shared(run, embeddings) if is_main else None
        export_best(run, metrics, intervals, with_shared, by_length, retained)
        run.exported.record(*embeddings)
    return improved


# --- finish ---------------------------------------------------------------------------------------------------------


def finish(run: TrainingRun) -> Path:
    """Check the export, draw curves and retrieved images, and push; returns the folder of the export."""
    run.accelerator.wait_for_everyone()
    run.close()
    if not run.accelerator.is_main_process:  # only rank 0 draws and uploads, and the others need not wait
        return run.export_dir
    if bad := run.bad_images.describe():
        run.say(bad)
    drop_repeated_export(run.export_dir)
    draw_curves(read_metrics(run.log.path), run.output_dir / "curves.png", run.progress.best_step)
    exported = load_checked_export(run)
    draw_retrieval(run, exported, run.output_dir / "retrieval.png")
    report_word_order(run, exported)
    for line in describe_best(run.arguments.best_metric, run.progress):
        run.say(line)
    run.say(f"model: {run.export_dir}")
    if doubt := run.diagnosis.doubt():
        run.say(doubt)
    if run.arguments.push_to_hub:
        push_export(run)
    return run.export_dir


def cli() -> int:
    """The console script.

    Returns:
        The exit code, see [`run_command`][modeling_miniclip.utils.commands.run_command].
    """
    argv, debug = command_line()
    return run_command(lambda: main(argv, STARTED), debug)


if __name__ == "__main__":
    sys.exit(cli())
