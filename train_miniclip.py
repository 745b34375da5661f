"""Train a CLIP of your own.

    python train_miniclip.py                                      # the built-in recipe, no network needed
    python train_miniclip.py --dataset captions.csv               # your images: ResNet-50 + DistilBERT
    accelerate launch --config_file configuration/accelerate/cpu2.yaml train_miniclip.py --recipe scenes

The flags are in `configuration/README.md`, the pieces in `modeling_miniclip/training.py`. Read this file from top to
bottom: `main` prepares, `train` goes through the epochs, `finish` leaves the result.
"""

import math
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# Both have to be set before the libraries are imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network call at import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's processes are the parallelism

from modeling_miniclip.errors import DataError, MiniClipError, ModelError, UsageError, run_command  # noqa: E402
from modeling_miniclip.training.arguments import TrainingArguments
from modeling_miniclip.training.output_dir import own_rank
from modeling_miniclip.training.parsing import checkpoint_interval, parse_arguments


@dataclass
class Run:
    """Everything that training touches, made by [`prepare`]."""

    arguments: TrainingArguments
    output_dir: Path
    accelerator: Any
    model: Any  # as prepared by Accelerate; `plain` is the MiniClipModel within
    plain: Any
    processor: Any
    optimizer: Any
    scheduler: Any
    train_loader: Any
    validation_loader: Any
    validation: Any  # the split, for the pictures
    data: dict[str, Any]  # what the card says of it
    log: Any
    meter: Any
    progress: Any
    interrupt: Any
    diagnosis: Any
    bad_images: Any
    steps_per_epoch: int
    averages: Any = None  # AveragedWeights, with `--ema_decay`
    saved: tuple[int, int] = (0, 0)  # `position` of the last checkpoint; the beginning needs none
    last_step: int = field(init=False)

    def __post_init__(self) -> None:
        if self.arguments.ema_decay is not None:
            from modeling_miniclip.training.ema import AveragedWeights

            self.averages = AveragedWeights(self.plain, self.arguments.ema_decay)
        steps = self.arguments.num_train_epochs * self.steps_per_epoch
        self.last_step = min(steps, self.arguments.max_steps or steps)

    @property
    def epoch_is_trained(self) -> bool:
        """Whether all that is left of the current epoch is its validation."""
        return bool(self.progress.step_in_epoch == self.steps_per_epoch)

    def final_weights(self) -> AbstractContextManager[None]:
        """Within the block the model has the weights that are validated and exported."""
        return nullcontext() if self.averages is None else self.averages.in_place()

    @property
    def position(self) -> tuple[int, int]:
        """Whole epochs, each with its validation, and steps behind them."""
        return self.progress.epoch, self.progress.step_in_epoch

    @property
    def epoch(self) -> float:
        """Passes over the training images so far, for logs."""
        return self.progress.epoch + self.progress.step_in_epoch / self.steps_per_epoch


def main(argv: list[str] | None = None) -> Path:
    """Train as the arguments say.

    Args:
        argv: flags, as on the command line; None takes those of the process. From a notebook:
            `notebook_launcher(main, ([...],), num_processes=2)`.

    Returns:
        The folder of the exported model.

    Raises:
        MiniClipError: the arguments or the data are wrong; the message says where and how to mend it. With
            `--overfit_batch`: the loss did not reach zero. The disk became full: it says what is left.
        SystemExit: after SIGTERM, with code 143; a checkpoint was saved.
    """
    from modeling_miniclip.training.output_dir import own_folder

    arguments = parse_arguments(argv)
    with own_folder(arguments):
        return run_to_the_end(arguments)


def run_to_the_end(arguments: TrainingArguments) -> Path:
    """What [`main`] does once the output folder is its own."""
    from modeling_miniclip.data.loader import readable_worker_errors

    with readable_worker_errors():
        run = prepare(arguments)
        if run.arguments.overfit_batch:
            return overfit_batch(run)
        with run.interrupt:
            train(run)
    if run.interrupt.agreed == signal.SIGTERM:  # seconds are left: no pictures, no push
        run.train_loader = run.validation_loader = None
        run.accelerator.end_training()
        sys.exit(128 + signal.SIGTERM)
    return finish(run)


# --- prepare: everything that can be wrong is found here, before any long work --------------------------------------


def prepare(arguments: TrainingArguments) -> Run:
    """Output folder, data, model, loaders, optimiser, schedule; a resumed run's state."""
    from modeling_miniclip.data.check import quick_check
    from modeling_miniclip.training.bad_images import BadImages
    from modeling_miniclip.training.checkpoints import Progress
    from modeling_miniclip.training.diagnostics import Diagnosis
    from modeling_miniclip.training.optimizer import build_scheduler
    from modeling_miniclip.training.publish import data_for_card
    from modeling_miniclip.training.reporting import MetricsLog, StepMeter, describe_splits, say, split_sizes
    from modeling_miniclip.training.signals import Interrupt

    if arguments.overfit_batch:
        arguments = without_noise(arguments)

    # Where: output folder, repository, device
    output_dir, checkpoint = prepare_places(arguments)
    accelerator = build_accelerator(arguments, output_dir)

    def warn(line: str) -> None:
        say(accelerator, f"warning: {line}")

    # What: data, and a model with its processor
    splits = load_splits(arguments)
    say(accelerator, describe_splits(splits))
    if accelerator.is_main_process:
        for line in quick_check(splits, str(arguments.dataset), arguments.batch_size):
            warn(line)
    bad_images = BadImages(split_sizes(splits), arguments.max_bad_image_fraction, warn, accelerator.device)
    model, processor = build_model(arguments, accelerator, splits)

    if arguments.overfit_batch:
        splits = first_batch(splits, arguments)

    # How: loaders, optimiser, schedule
    train_loader, validation_loader = build_loaders(arguments, accelerator, model, processor, splits)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, arguments, accelerator.device))
    run = Run(
        arguments=arguments,
        output_dir=output_dir,
        accelerator=accelerator,
        model=prepared,
        plain=accelerator.unwrap_model(prepared),
        processor=processor,
        optimizer=optimizer,
        scheduler=None,
        train_loader=train_loader,
        validation_loader=validation_loader,
        validation=splits["validation"],
        data=data_for_card(arguments, splits),
        log=MetricsLog(output_dir / "metrics.jsonl", accelerator.is_main_process),
        meter=StepMeter(accelerator, optimizer),
        progress=Progress(arguments.batch_size, arguments.seed, len(train_loader.batch_sampler)),
        interrupt=Interrupt(lambda line: say(accelerator, line)),
        diagnosis=Diagnosis(
            warn,
            arguments.warmup_steps,
            model.config.logit_scale_max,
            has_softmax=model.config.loss_type != "sigmoid",
        ),
        bad_images=bad_images,
        steps_per_epoch=len(train_loader.batch_sampler),
    )
    run.scheduler = build_scheduler(optimizer.optimizer, arguments, run.last_step)
    if arguments.overfit_batch:
        return run
    begin(run, checkpoint)
    return run


def begin(run: Run, checkpoint: Path | None) -> None:
    """From where: a checkpoint, or an empty output folder; from now on the run leaves its marks there."""
    from modeling_miniclip.training.output_dir import clear_output_dir
    from modeling_miniclip.training.parsing import save_arguments
    from modeling_miniclip.training.reporting import say

    arguments, accelerator = run.arguments, run.accelerator
    kept = (run.progress, run.scheduler, run.log, run.meter, run.bad_images, run.averages)
    accelerator.register_for_checkpointing(*(state for state in kept if state is not None))
    if checkpoint is not None:
        resume(run, checkpoint)
    elif arguments.resume_from_checkpoint is not None:
        say(accelerator, f"no checkpoint in {run.output_dir} yet: from the start")
    if accelerator.is_main_process:
        if checkpoint is None:
            clear_output_dir(run.output_dir)
        save_arguments(arguments, run.output_dir / "arguments.yaml")
    config = {k: v for k, v in asdict(arguments).items() if v is not None}
    again = {"tensorboard": {"purge_step": run.progress.step + 1}}  # hides what an earlier start logged behind it
    accelerator.init_trackers("miniclip", config=config, init_kwargs=again)


def resume(run: Run, checkpoint: Path) -> None:
    """Take over a checkpoint's state, and forget what an earlier start logged and saved behind it."""
    from modeling_miniclip.training.checkpoints import check_resumed, drop_surplus, rewind_folders
    from modeling_miniclip.training.reporting import say

    expected = replace(run.progress)
    try:
        run.accelerator.load_state(str(checkpoint))
    except Exception as error:  # whatever the libraries raise at a damaged file or at other parameters
        raise ModelError(
            f"--resume_from_checkpoint: {checkpoint} is damaged or of another model: {' '.join(str(error).split())}; "
            "resume with the flags of the first start (its arguments.yaml is a recipe of them), or name another one"
        ) from error
    check_resumed(run.progress, expected)
    if run.accelerator.is_main_process:
        rewind_folders(checkpoint, run.output_dir / "export")
        drop_surplus(checkpoint.parent, run.arguments.save_total_limit, run.progress.best_step)
    run.log.rewind()
    run.saved = run.position
    say(run.accelerator, f"resumed from {checkpoint} at step {run.progress.step}")


def prepare_places(arguments: TrainingArguments) -> tuple[Path, Path | None]:
    """The output folder, and the checkpoint to go on from; the repository of a push is created now."""
    from modeling_miniclip.hub.push import prepare_push
    from modeling_miniclip.training.checkpoints import find_checkpoint
    from modeling_miniclip.training.output_dir import prepare_output_dir

    output_dir = Path(arguments.output_dir)
    if arguments.overfit_batch:
        return output_dir, None
    if own_rank() == 0:  # one process speaks for all, before there is an Accelerator
        prepare_output_dir(arguments)
        if arguments.push_to_hub:
            private, revision = arguments.hub_private_repo, arguments.hub_revision
            arguments.hub_model_id = prepare_push(arguments.hub_model_id, output_dir, private, revision)
    if arguments.resume_from_checkpoint is None:
        return output_dir, None
    return output_dir, find_checkpoint(output_dir, arguments.resume_from_checkpoint)


def build_accelerator(arguments: TrainingArguments, output_dir: Path) -> Any:
    """Device, processes and precision; the seed is set."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import parse_flag_from_env, set_seed

    from modeling_miniclip.utils.performance import allow_tf32, best_mixed_precision, keep_freed_memory

    keep_freed_memory()
    # Told to use the CPU, Accelerate joins its processes by gloo; left to find out, it trains each by itself.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=arguments.mixed_precision or best_mixed_precision(PartialState(cpu=on_cpu).device),
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=str(output_dir),
    )
    arguments.mixed_precision = accelerator.mixed_precision
    if arguments.ema_decay is not None and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise UsageError(
            f"--ema_decay: {accelerator.distributed_type} spreads the weights over processes; leave it out"
        )
    allow_tf32(accelerator.device)
    set_seed(arguments.seed)
    return accelerator


def load_splits(arguments: TrainingArguments) -> Any:
    """The data set's splits with one row per image, cut to `--max_train_images` and `--max_validation_images`."""
    from modeling_miniclip.data.captions import load_captions

    splits = load_captions(
        arguments.dataset or "scenes",
        image_dir=arguments.image_dir,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        validation_fraction=arguments.validation_fraction,
        seed=arguments.seed,
        revision=arguments.dataset_revision,
        stream_first_rows=arguments.stream_first_rows,
        allow_outside_images=arguments.allow_outside_images,
    )
    for name, limit in (("train", arguments.max_train_images), ("validation", arguments.max_validation_images)):
        if limit is not None:
            splits[name] = splits[name].select(range(min(limit, len(splits[name]))))
    return splits


def build_model(arguments: TrainingArguments, accelerator: Any, splits: Any) -> tuple[Any, Any]:
    """Model on its device and processor, frozen towers marked, and a word on captions that will be cut."""
    from accelerate.utils import DistributedType

    from modeling_miniclip.training import build_model as building
    from modeling_miniclip.training.layers import freeze_layers
    from modeling_miniclip.training.reporting import describe_model, say
    from modeling_miniclip.training.text_groups import group_texts_by_length
    from modeling_miniclip.utils.performance import compile_towers, to_channels_last

    captions = list(splits["train"]["captions"])
    model, processor = building.build_model(arguments, captions)
    if arguments.freeze_batch_norm is None:
        arguments.freeze_batch_norm = arguments.preset is None
    freeze_layers(model, arguments)
    if accelerator.distributed_type != DistributedType.FSDP:
        to_channels_last(model.vision_model)  # FSDP takes contiguous parameters only
        group_texts_by_length(model)  # and every process must run a tower equally often
    if arguments.compile_towers:
        compile_towers(model.vision_model, model.text_model)
    say(accelerator, describe_model(model))
    cut = processor.count_truncated([text for row in captions for text in row])
    if cut:
        limit = processor.tokenizer.model_max_length
        say(accelerator, f"{cut} of {sum(map(len, captions))} training captions will be cut to {limit} tokens")
    return model.to(accelerator.device), processor


def build_loaders(
    arguments: TrainingArguments, accelerator: Any, model: Any, processor: Any, splits: Any
) -> tuple[Any, Any]:
    """Loaders of this process's share of the training and validation batches; frozen features are computed here."""
    from modeling_miniclip.data.augmentation import build_augmentation
    from modeling_miniclip.data.dataset import CaptionRows
    from modeling_miniclip.data.loader import BatchLoader, GlobalBatches
    from modeling_miniclip.training import features
    from modeling_miniclip.training.feature_cache import default_cache_dir
    from modeling_miniclip.training.parsing import augmentation_list

    cache_dir = Path(arguments.feature_cache_dir or default_cache_dir())
    crop, side = processor.image_processor.crop_size, arguments.train_image_size
    size = (side or crop["height"], side or crop["width"])
    augmentation = build_augmentation(augmentation_list(arguments), size)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loaders = []
    for split, augment in (("train", augmentation), ("validation", None)):
        rows = CaptionRows(splits[split], processor, augment, None, arguments.seed)
        views = 1 if augment is None else arguments.num_views
        if arguments.freeze in ("vision", "both") and views is not None:
            rows.vision_features = features.frozen_image_features(
                model, rows, views, arguments.num_workers, cache_dir, accelerator
            )
        if arguments.freeze in ("text", "both"):
            rows.text_features = features.frozen_text_features(model, rows.captions, processor, cache_dir, accelerator)
        is_train = split == "train"
        rows.captions_per_image = arguments.captions_per_image if is_train else None
        batch_size = arguments.batch_size if is_train else features.EVALUATION_BATCH * world_size
        batches = GlobalBatches(len(rows), batch_size, is_train, arguments.seed, rank, world_size)
        # Rows of features cost nothing to make: handing them from one process to another would cost more.
        workers = arguments.num_workers if rows.vision_features is None else 0
        prefetch = 2 if arguments.chunk_size is None else 1  # batches larger than memory are not kept in store
        loaders.append(BatchLoader(rows, batches, workers, accelerator.device.type == "cuda", prefetch))
    return loaders[0], loaders[1]


def build_optimizer(model: Any, arguments: TrainingArguments, device: Any) -> Any:
    """AdamW over the trainable parameters, in one kernel on a GPU."""
    import torch

    from modeling_miniclip.training.optimizer import parameter_groups

    return torch.optim.AdamW(parameter_groups(model, arguments), fused=device.type == "cuda")


# --- train ----------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Epochs until the last step, early stopping or a signal; validation after each, checkpoints as asked for."""
    from modeling_miniclip.training.reporting import say

    progress, arguments, accelerator = run.progress, run.arguments, run.accelerator
    interval = checkpoint_interval(arguments)
    say(
        accelerator,
        f"steps {progress.step + 1} to {run.last_step} of {arguments.batch_size} images on "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}",
    )
    while not is_over(run):
        train_epoch(run)
        if not run.epoch_is_trained or run.interrupt.agreed == signal.SIGTERM:
            break
        with run.final_weights():
            improved = validate(run)
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        progress.epochs_without_improvement = 0 if improved else progress.epochs_without_improvement + 1
        if interval is None or progress.step % interval == 0:
            save(run)
    save(run)
    if progress.epochs_without_improvement >= (arguments.early_stopping_patience or math.inf):
        epochs = progress.epochs_without_improvement
        say(accelerator, f"early stopping: {arguments.best_metric} did not improve for {epochs} epochs")
    terminated = run.interrupt.agreed == signal.SIGTERM
    if not terminated and (progress.step_in_epoch > 0 or progress.best_value is None):
        with run.final_weights():
            validate(run)  # behind the checkpoint: a resumed run knows nothing of it


def is_over(run: Run) -> bool:
    """Whether nothing is left to train. Every process has to ask, for a signal may have come to one of them."""
    interrupted = run.interrupt.in_any_process(run.accelerator)
    done = run.progress.step >= run.last_step and not run.epoch_is_trained
    patience = run.arguments.early_stopping_patience or math.inf
    return interrupted or done or run.progress.epochs_without_improvement >= patience


def save(run: Run) -> None:
    """A checkpoint of the run as it is, if there is none yet.

    Raises:
        MiniClipError: a weight is not finite.
    """
    from modeling_miniclip.training.checkpoints import check_weights, save_checkpoint

    if run.saved == run.position:
        return
    check_weights(run.plain, run.accelerator)
    keep, folder = run.arguments.save_total_limit, run.output_dir / "checkpoints"
    save_checkpoint(run.accelerator, folder, run.progress, keep, run.output_dir / "export")
    run.saved = run.position


def train_epoch(run: Run) -> None:
    """The rest of the current epoch, one optimiser step a batch."""
    from tqdm.auto import tqdm

    from modeling_miniclip.training.layers import set_training_mode

    progress, arguments, accelerator = run.progress, run.arguments, run.accelerator
    set_training_mode(run.plain, arguments.freeze, bool(arguments.freeze_batch_norm))
    sampler = run.train_loader.batch_sampler
    sampler.epoch, sampler.first_batch = progress.epoch, progress.step_in_epoch
    title = f"epoch {progress.epoch + 1}/{arguments.num_train_epochs}"
    bar = tqdm(total=run.steps_per_epoch, initial=sampler.first_batch, desc=title, unit="step", leave=False,
               disable=not accelerator.is_main_process)  # fmt: skip
    interval = checkpoint_interval(arguments)
    run.meter.start_epoch(progress.step_in_epoch)
    for batch in run.train_loader:
        lost = run.bad_images.lose("train", batch.pop("undecodable", []))
        images = sampler.images_in(progress.step_in_epoch) - lost
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        if images > 0:  # else there is nothing to learn from, but the step counts
            take_step(run, batch, images)
        # Log, then the schedule, so that a line tells the rate that its step was taken with
        if run.meter.losses and (progress.step % arguments.logging_steps == 0 or progress.step == run.last_step):
            log_step(run, run.meter.read(), bar)
        if arguments.lr_scheduler_type == "cosine":
            run.scheduler.step()
        bar.update()
        if interval is not None and progress.step % interval == 0 and not run.epoch_is_trained:
            save(run)
        if run.interrupt.in_any_process(accelerator) or progress.step == run.last_step:
            break
    bar.close()


def take_step(run: Run, batch: dict[str, Any], images: int) -> None:
    """One optimiser step.

    Args:
        run: whose model it is.
        batch: this process's share of the global batch.
        images: of the global batch.
    """
    from modeling_miniclip.training.diagnostics import chance_loss
    from modeling_miniclip.training.distributed import whole_tensor
    from modeling_miniclip.training.optimizer import clamp_temperature

    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_and_backward(run, batch)
    norm = whole_tensor(run.accelerator.clip_grad_norm_(run.plain.parameters(), run.arguments.max_grad_norm))
    run.optimizer.step()
    clamp_temperature(run.plain)
    if run.averages is not None:
        run.averages.update()
    pairs = len(batch["text_image_id"])
    texts = images * pairs / len(batch["image_id"])
    run.meter.update(loss, norm, pairs, chance_loss(images, texts, run.plain.config.loss_type))


def forward_and_backward(run: Run, batch: dict[str, Any]) -> Any:
    """This process's share of the global batch; the loss over all of it, and its gradients.

    Returns:
        This process's part of the loss; the loss is their sum.
    """
    import torch

    from modeling_miniclip.data.loader import model_inputs
    from modeling_miniclip.training.distributed import global_contrastive_loss
    from modeling_miniclip.training.grad_cache import backward_in_chunks, split_batch

    accelerator, chunk_size = run.accelerator, run.arguments.chunk_size
    chunks = [batch] if chunk_size is None else split_batch(batch, chunk_size, accelerator.device)
    image_id, text_image_id = (
        torch.cat([chunk[name] for chunk in chunks]).to(accelerator.device) for name in ("image_id", "text_image_id")
    )

    def inputs_of(rows: dict[str, Any]) -> dict[str, Any]:
        return model_inputs(rows, run.processor, accelerator.device)

    def loss_of(output: Any) -> Any:
        return global_contrastive_loss(
            output.image_embeds.float(),
            output.text_embeds.float(),
            output.logit_scale,
            image_id,
            text_image_id,
            run.plain.config.loss_type,
            output.logit_bias,
        )

    if len(chunks) > 1:
        return backward_in_chunks(accelerator, run.model, chunks, inputs_of, loss_of)
    loss = loss_of(run.model(**inputs_of(chunks[0])))
    # DistributedDataParallel averages over the processes what is to be summed
    accelerator.backward(loss * accelerator.num_processes)
    return loss


def log_step(run: Run, values: dict[str, float], bar: Any) -> None:
    """A line of `metrics.jsonl`, the trackers, and the progress bar's postfix."""
    from modeling_miniclip.training.distributed import whole_tensor

    values["logit_scale"] = whole_tensor(run.plain.inverse_temperature()).item()
    run.log.write(run.progress.step, run.epoch, "train", values)
    run.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=run.progress.step)
    run.diagnosis.after_steps(run.progress.step, values, run.meter.steps, run.meter.chance)
    rate = run.optimizer.param_groups[-1]["lr"]
    bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{rate:.1e}", pairs_s=f"{values['pairs_per_second']:.0f}")


def validate(run: Run) -> bool:
    """Measure the whole validation split, step the plateau schedule, export the model if it is the best so far.

    Raises:
        MiniClipError: the loss is not finite.
    """
    from accelerate.utils import broadcast_object_list

    from modeling_miniclip.evaluation.metrics import is_better, recall_intervals, validation_metrics
    from modeling_miniclip.training.diagnostics import not_finite
    from modeling_miniclip.training.distributed import share_buffers, whole_tensor
    from modeling_miniclip.training.features import embed_split
    from modeling_miniclip.training.reporting import describe_validation, say
    from modeling_miniclip.utils.performance import release_freed_memory

    progress, arguments, accelerator = run.progress, run.arguments, run.accelerator
    start = time.perf_counter()
    share_buffers(run.plain)
    release_freed_memory()
    embeddings = embed_split(
        run.plain,
        run.validation_loader,
        run.processor,
        accelerator.device,
        accelerator.is_main_process,
        partial(run.bad_images.lose, "validation"),
    )
    # One process measures and tells the others: all must take the same decisions.
    told: list[Any] = [None]
    logit_scale, bias = whole_tensor(run.plain.inverse_temperature()).item(), run.plain.logit_bias
    logit_bias = None if bias is None else whole_tensor(bias).item()
    if accelerator.is_main_process:
        told[0] = validation_metrics(*embeddings, logit_scale, run.plain.config.loss_type, logit_bias)
    metrics = broadcast_object_list(told)[0]
    if not math.isfinite(metrics["loss"]):
        raise not_finite("validation loss", metrics["loss"], accelerator.mixed_precision)
    run.log.write(progress.step, run.epoch, "validation", {**metrics, "seconds": time.perf_counter() - start})
    accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress.step)
    if arguments.lr_scheduler_type == "plateau":
        run.scheduler.step(metrics["loss"])
    value = metrics[arguments.best_metric]
    improved = is_better(arguments.best_metric, value, progress.best_value)
    say(accelerator, describe_validation(run.epoch, metrics, improved))
    if accelerator.is_main_process:
        run.diagnosis.after_validation(progress.step, *embeddings)
    if improved:
        progress.best_value, progress.best_step = value, progress.step
        export_best(run, metrics, recall_intervals(*embeddings) if accelerator.is_main_process else {})
    return improved


def export_best(run: Run, metrics: dict[str, float], intervals: dict[str, tuple[float, float]]) -> None:
    """Replace `export/` by the model as it is now, with its measured card; upload it if each best is to be."""
    from modeling_miniclip.hub.export import export
    from modeling_miniclip.training.publish import arguments_for_card, command_for_card
    from modeling_miniclip.training.reporting import say

    arguments = run.arguments
    state_dict = run.accelerator.get_state_dict(run.model)  # by all processes: with FSDP each has but a part
    if run.accelerator.is_main_process:
        card = {
            "name": arguments.hub_model_id or run.output_dir.resolve().name,
            "metrics": metrics,
            "intervals": intervals,
            "arguments": arguments_for_card(arguments),
            "command": command_for_card(arguments),
            "license": arguments.hub_license,
            "data": {**run.data, "left_out": run.bad_images.describe()},
        }
        folder = export(run.plain, run.processor, run.output_dir / "export", card, state_dict)
        if arguments.push_to_hub and arguments.hub_strategy == "every_save":
            try:
                push_export(run, folder)
            except MiniClipError as error:  # a bad hour of the Hub is no reason to end a run
                say(run.accelerator, f"not pushed: {error}")
    run.accelerator.wait_for_everyone()


def push_export(run: Run, folder: Path) -> None:
    """Upload the export and say where it is."""
    from modeling_miniclip.hub.push import push
    from modeling_miniclip.training.reporting import say

    message, arguments = f"Model of step {run.progress.best_step}", run.arguments
    url = push(folder, str(arguments.hub_model_id), arguments.hub_private_repo, message, arguments.hub_revision)
    say(run.accelerator, f"pushed: {url}")


# --- a test instead of a run ----------------------------------------------------------------------------------------


def without_noise(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments for `--overfit_batch`: nothing random between steps, a rate that stays, nothing written."""
    return replace(
        arguments,
        augmentation="[]",
        num_views=None,
        dropout=0.0,
        projection_dropout=None,
        ema_decay=None,
        lr_scheduler_type="plateau",
        checkpointing_steps="epoch",
        logging_steps=1,
        num_workers=0,
        report_to="none",
    )


def first_batch(splits: Any, arguments: TrainingArguments) -> Any:
    """The splits with the training images of the first step alone, and one to validate, which is not looked at."""
    from modeling_miniclip.data.loader import GlobalBatches

    batch = next(iter(GlobalBatches(len(splits["train"]), arguments.batch_size, True, arguments.seed)))
    rows = {"train": [row for _, row in batch], "validation": [0]}
    return {name: splits[name].select(indices) for name, indices in rows.items()}


def overfit_batch(run: Run) -> Path:
    """Train on the first batch alone and tell whether its loss reaches zero.

    Returns:
        The output folder, in which nothing was written.

    Raises:
        MiniClipError: it does not; with the likely cause.
    """
    from modeling_miniclip.training import overfit
    from modeling_miniclip.training.reporting import say

    batch = next(iter(run.train_loader))
    lost = run.bad_images.lose("train", batch.pop("undecodable", []))
    least, chance = overfit.batch_bounds(batch, run.plain.config.loss_type, run.accelerator.device)
    images = run.train_loader.batch_sampler.images_in(0) - lost
    if images == 0:
        raise DataError(f"none of the {lost} images of the first batch can be decoded; `miniclip check` names them")
    run.steps_per_epoch = run.last_step = run.arguments.max_steps or overfit.STEPS
    run.log = log = overfit.KeptLog()
    run.train_loader = overfit.RepeatedBatch(
        batch, images, run.last_step, lambda: bool(log.lines) and log.lines[-1]["loss"] < least + overfit.REACHED
    )
    run.diagnosis.tell = lambda line: None  # the verdict comes at the end
    say(run.accelerator, f"one batch of {images} images, at most {run.last_step} steps")
    train_epoch(run)
    reached, verdict = overfit.judge_overfit(log.lines, least, chance)
    if not reached:
        raise MiniClipError(verdict)
    say(run.accelerator, verdict)
    return run.output_dir


# --- finish ---------------------------------------------------------------------------------------------------------


def finish(run: Run) -> Path:
    """Curves, a picture of what the exported model finds, the trackers' end, and the push."""
    from modeling_miniclip.training.figures import draw_curves, read_metrics
    from modeling_miniclip.training.reporting import say

    export_dir, progress = run.output_dir / "export", run.progress
    image_features = run.validation_loader.rows.vision_features
    run.train_loader = run.validation_loader = None  # ends their workers now; the garbage collector takes 5 s for each
    # What follows is the first process's alone: the others need not wait for drawing and uploading.
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if run.accelerator.is_main_process:
        if bad := run.bad_images.describe():
            say(run.accelerator, bad)
        draw_curves(read_metrics(run.log.path), run.output_dir / "curves.png", progress.best_step)
        draw_retrieval(run, export_dir, None if image_features is None else image_features[0])
        say(
            run.accelerator, f"best {run.arguments.best_metric} {progress.best_value:.4g} at step {progress.best_step}"
        )
        say(run.accelerator, f"model: {export_dir}")
        if run.arguments.push_to_hub:
            push_export(run, export_dir)
    return export_dir


def draw_retrieval(run: Run, export_dir: Path, image_features: Any) -> None:
    """`retrieval.png`: validation captions with the images that the exported model, loaded again, finds for them.

    A frozen image tower is not run again: its features (`[rows, width]`, else None) are there.
    """
    import torch

    from modeling_miniclip.inference.encode import encode_batches, encode_images, encode_texts
    from modeling_miniclip.modeling_miniclip import MiniClipModel
    from modeling_miniclip.training.figures import example_queries
    from modeling_miniclip.utils.match_grid import draw_matches, match_rows

    def project(features: list[Any]) -> Any:
        return model(vision_pooler_output=torch.stack(features).to(model.device)).image_embeds

    model = MiniClipModel.from_pretrained(export_dir).to(run.accelerator.device)
    good = run.bad_images.good_rows("validation")
    split = run.validation.select(good)
    if image_features is None:
        images = encode_images(model, (row["image"] for row in split), run.processor, progress=False)
    else:
        images = encode_batches(model, image_features[good], project, 256, "images", progress=False)
    queries = example_queries(list(split["captions"]), 6)
    texts = encode_texts(model, [text for _, text in queries], run.processor, progress=False)
    rows = match_rows(queries, texts @ images.T, lambda i: split[i]["image"].convert("RGB"))
    draw_matches(run.output_dir / "retrieval.png", rows, "Validation captions and the images found for them")


def cli() -> int:
    """The console script.

    Returns:
        The exit code of [`run_command`][modeling_miniclip.errors.run_command].
    """
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    return run_command(lambda: main(argv), debug=len(argv) < len(sys.argv) - 1)


if __name__ == "__main__":
    sys.exit(cli())
