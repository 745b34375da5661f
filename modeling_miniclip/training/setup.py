"""The steps of `prepare` in `train_miniclip.py`, in the order in which it calls them."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, TorchDynamoPlugin, set_seed
from datasets import Dataset, DatasetDict

from ..configuration_miniclip import declared_pooling
from ..data.checking.check import quick_check
from ..data.columns import ColumnNames
from ..data.load_rows import SeededSplit, Splits, load_datasets
from ..data.loading.augmentation import build_augmentation
from ..data.loading.batches import GlobalBatches
from ..data.loading.dataset import CaptionRows
from ..data.loading.loader import BatchLoader
from ..data.loading.order import InOrder
from ..data.loading.pair_keys import SharedCaptions, count_shared
from ..data.rows import ReadOptions
from ..data.shards.remote_shards import use_cache
from ..data.tables.image_copies import MOST_READ
from ..data.tables.row_blocks import Captions, caption_counts, record_batches, sample_of_captions
from ..data.tables.table_cache import default_cache_dir
from ..errors import ModelError, UsageError, one_line
from ..evaluation.eval_sets import EvalSet
from ..hub.push import prepare_push
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.performance import (
    allow_tf32,
    best_mixed_precision,
    compile_towers,
    keep_freed_memory,
    release_freed_memory,
    to_channels_last,
)
from ..utils.processes import process_rank
from .bad_images import BadImages
from .command_line.arguments import TrainingArguments
from .command_line.check_arguments import augmentation_list
from .command_line.launch import Launch, read_launch
from .command_line.recipes import save_arguments
from .ema import AveragedWeights
from .finetune.blend import weights_to_change
from .finetune.lora import add_adapters, only_trained_weights
from .finetune.retention import SPLIT as RETENTION_SPLIT
from .finetune.retention import RetentionSet, retention_about, retention_checksum
from .hard_negatives import hard_negatives_of
from .limit_splits import limit_splits
from .matryoshka import choose_lengths, describe_lengths
from .memory.sizes import StepSizes
from .optimizer import apply_flags, build_scheduler, parameter_groups
from .processes.deepspeed import before_joining, check_deepspeed, complete_config, is_deepspeed, prepare_engine
from .processes.distributed import check_on_main, compute_on_main
from .processes.heartbeat import join_processes, run_is_ending
from .publish import data_for_card, lacks_license, license_for_card
from .reports import caption_probe
from .reports.caption_probe import CaptionEvidence
from .reports.diagnostics import NO_EVIDENCE, Diagnosis
from .reports.reporting import MetricsLog, StepMeter, describe_model, describe_splits, say, split_sizes
from .reports.several_datasets import validation_parts
from .resuming.changes import check_data, check_flags, check_model
from .resuming.checkpoints import (
    INTERRUPTED_EXPORT,
    Progress,
    check_later_checkpoints,
    delete_expired,
    find_checkpoint,
    rewind_folders,
)
from .resuming.fingerprint import Fingerprint, add_model, fingerprint_of_data
from .resuming.output_dir import check_output_dir, clear_output_dir
from .resuming.resume_rules import changed_flags, describe_flags
from .resuming.signals import SignalHandler
from .row_order import order_checksum, training_order
from .run import TrainingRun
from .time_limit import last_step_of
from .towers.create_model import create_model
from .towers.feature_cache import KeptValue, cache_of, digest_of_texts, digest_of_tokenizer
from .towers.features import EVALUATION_BATCH, FrozenFeatures, frozen_image_features, frozen_text_features
from .towers.layers import freeze_layers
from .towers.teacher import RunTeacher, compute_taught
from .towers.text_groups import group_texts_by_length
from .zero_shot import SPLIT as ZERO_SHOT_SPLIT
from .zero_shot import ZeroShotSet, zero_shot_about, zero_shot_checksum

COUNTED_CAPTIONS = 20_000  # of a large split, in which truncated ones are counted
PIECE = 32  # images that a loader process reads at a time for a batch in chunks
MOST_PIECES_AHEAD = 32  # of each loader process: each of them holds a file open
TOKENIZED_TOGETHER = 128  # images, which takes little memory
SCALER = "scaler.pt"  # accelerate's file of fp16's scale of the loss


def prepare_output_dir(arguments: TrainingArguments) -> Path | None:
    """Check that `--output_dir` can be used; nothing in it is deleted yet.

    Returns:
        The checkpoint to resume from; None to start from scratch.

    Raises:
        UsageError: the folder cannot be used, later checkpoints would be lost, or a flag differs that a resumed run
            cannot change.
    """
    if process_rank() == 0:
        check_output_dir(arguments)
    if arguments.resume_from_checkpoint is None:
        return None
    checkpoint = find_checkpoint(Path(arguments.output_dir), arguments.resume_from_checkpoint)
    if checkpoint is not None:
        if not arguments.discard_later_checkpoints:
            check_later_checkpoints(checkpoint)
        check_flags(Fingerprint.load(checkpoint), arguments)
    return checkpoint


def prepare_hub_repo(arguments: TrainingArguments) -> str | None:
    """With `--push_to_hub`, create the repository or check that it can be pushed to; rank 0 only.

    Returns:
        Full name of the repository, `user/name`; without a push, `--hub_model_id` as given.
    """
    if not arguments.push_to_hub or process_rank() != 0:
        return arguments.hub_model_id
    return prepare_push(
        arguments.hub_model_id, Path(arguments.output_dir), arguments.hub_private_repo, arguments.hub_revision
    )


def check_launch(arguments: TrainingArguments) -> Launch:
    """Read what the launcher was given, and check that each of its settings can be used."""
    launch = read_launch()
    launch.check(runs_on_cpu(launch), arguments.mixed_precision)
    check_deepspeed(launch, arguments)
    return launch


def runs_on_cpu(launch: Launch) -> bool:
    """Whether the run uses the CPU: as asked, or because there is nothing else."""
    return launch.on_cpu or not torch.accelerator.is_available()


def build_accelerator(arguments: TrainingArguments, launch: Launch) -> Accelerator:
    """Choose device, processes and precision, and set the seed.

    Raises:
        UsageError: the device does not have the precision, or FSDP does not go with another flag.
    """
    keep_freed_memory()
    # Without cpu=True, Accelerate does not start gloo and every process would train alone.
    on_cpu = runs_on_cpu(launch)
    backend = None
    if "use_deepspeed" in launch.settings:
        before_joining(on_cpu)
        # With cpu=True, Accelerate would do without DeepSpeed, and without gloo take each process for the only one.
        backend, on_cpu = ("gloo" if on_cpu else None), False
    device = join_processes(on_cpu, backend).device
    precision = arguments.mixed_precision or launch.mixed_precision or best_mixed_precision(device)
    if device.type == "mps" and precision != "no":
        raise UsageError(f"--mixed_precision {precision}: a run on mps is in float32; set --mixed_precision no")
    AcceleratorState._reset_state()  # an earlier run of this process may have had other settings
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        dynamo_plugin=compilation(launch),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else a variable would decide
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
    )
    if arguments.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("--ema_decay does not work with FSDP, which spreads the weights over processes; set it to 0")
    if is_deepspeed(accelerator):
        complete_config(accelerator, arguments, precision)
    launch.check_joined(accelerator.num_processes)
    allow_tf32(accelerator.device)
    set_seed(arguments.seed)
    return accelerator


def compilation(launch: Launch) -> TorchDynamoPlugin:
    """How `accelerator.prepare` compiles the model: as the launcher was asked, by default not at all."""
    plugin = TorchDynamoPlugin(
        backend=launch.value("dynamo_backend") or "no",
        mode=launch.value("dynamo_mode") or "default",
        fullgraph="dynamo_use_fullgraph" in launch.settings,
    )
    # The launcher's default is to compile again for each length of text.
    plugin.dynamic = True if "dynamo_use_dynamic" in launch.settings else None
    return plugin


def load_splits(arguments: TrainingArguments) -> Splits:
    """Splits of the datasets, one row `{image, image_id, captions}` per image.

    `--max_train_images` and `--max_validation_images` limit their length.
    """
    use_cache(limit_gb=arguments.shard_cache_gb)
    columns = ColumnNames(arguments.image_column, arguments.caption_column, arguments.allow_outside_images)
    options = ReadOptions(
        columns,
        arguments.image_dir,
        arguments.dataset_revision,
        arguments.stream_first_rows,
        arguments.caption_template,
    )
    splits = load_datasets(
        arguments.dataset or ["scenes"],
        options,
        SeededSplit(arguments.validation_fraction, arguments.seed),
        arguments.dataset_cache_dir,
        arguments.validation_dataset,
        arguments.max_bad_image_fraction,
    )
    limit_splits(splits, arguments)
    release_freed_memory()  # what reading a source took
    return splits


def report_splits(splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """Print the size of the splits and a warning for each kind of problem in their captions."""
    say(accelerator, describe_splits(splits))
    if accelerator.is_main_process:
        for line in quick_check(splits, ", ".join(arguments.dataset or ["scenes"]), arguments.batch_size):
            say(accelerator, f"warning: {line}")


def find_shared(splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator) -> SharedCaptions:
    """Count and report the training captions that belong to several images, which are pairs of each of them.

    Images that are not read in training, as their features are kept, are all compared now.
    """
    train, cache_dir = splits["train"], Path(arguments.dataset_cache_dir or default_cache_dir())
    most_read = len(train) if arguments.freeze in ("vision", "both") else MOST_READ
    shared = compute_on_main(
        lambda: count_shared(train, most_read=most_read, cache_dir=cache_dir), accelerator.is_main_process
    )
    if line := describe_shared(shared, arguments):
        say(accelerator, line)
    return shared


def describe_shared(shared: SharedCaptions | None, arguments: TrainingArguments) -> str | None:
    """One line about captions that belong to several images; None without any."""
    return None if shared is None else shared.describe(arguments.batch_size, arguments.captions_per_image)


def fingerprint_data(
    splits: DatasetDict,
    checkpoint: Path | None,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    classified: EvalSet | None = None,
    retained: Dataset | None = None,
) -> Fingerprint | None:
    """Fingerprint of the data, on rank 0; when a run is resumed, it must be that of the checkpoint.

    Args:
        splits: rows of the run.
        checkpoint: checkpoint to resume from, or None.
        arguments: flags of the run.
        accelerator: processes of the run.
        classified: class folders of `--zero_shot_dataset`.
        retained: rows of `--retention_dataset`.

    Raises:
        DataError: images, captions or splits changed.
    """
    found: list[Fingerprint] = []

    def compute() -> None:
        saved = None if checkpoint is None else Fingerprint.load(checkpoint)
        found.append(fingerprint_of_data(splits, arguments, None if saved is None else saved.by_content))
        found[0].order, found[0].zero_shot = order_checksum(splits, arguments), zero_shot_checksum(classified)
        found[0].retention = retention_checksum(retained)
        if saved is not None:
            saved.add_undecodable(Path(arguments.output_dir))
            check_data(saved, found[0], splits, arguments)

    check_on_main(compute, accelerator.is_main_process)
    return found[0] if found else None


def fingerprint_model(
    fingerprint: Fingerprint | None,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    checkpoint: Path | None,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    teacher: RunTeacher | None = None,
) -> None:
    """Complete the fingerprint; model, preprocessing and teacher of a resumed run must be those of the checkpoint.

    Raises:
        ModelError: one of them changed.
    """

    def compute() -> None:
        assert fingerprint is not None, "rank 0 has it"
        add_model(fingerprint, model, processor, arguments, None if teacher is None else teacher.settings())
        if checkpoint is not None:
            check_model(Fingerprint.load(checkpoint), fingerprint, arguments)

    check_on_main(compute, accelerator.is_main_process)


def build_model(
    splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator
) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Build model and processor, freeze layers, and report how many captions will be truncated."""
    train = splits["train"]
    learned_from = sample_of_captions(train)
    if arguments.preset is not None and len(learned_from) < len(train):
        say(accelerator, f"the vocabulary is learned from the captions of {len(learned_from)} images, drawn at random")
    model, processor = create_model(arguments, Captions(learned_from))
    if accelerator.is_main_process and lacks_license(arguments, model):
        start = arguments.model_name_or_path
        warn(accelerator, f"{start} states no licence: ask its authors before you share what you make of it, and name "
             "the licence with --hub_license")  # fmt: skip
    choose_lengths(model.config, arguments)
    freeze_layers(model, arguments)
    if arguments.lora_rank is not None:
        say(accelerator, add_adapters(model, processor, arguments))
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        to_channels_last(model.vision_model, accelerator.device)  # these need contiguous parameters,
        group_texts_by_length(model)  # and all its processes must run a tower equally often
    if arguments.compile_towers:
        compile_towers(model.vision_model, model.text_model)
    say(accelerator, describe_model(model))
    if line := describe_lengths(model.config):
        say(accelerator, line)
    if arguments.text_model is not None and arguments.text_pooling is None:
        if (declared := declared_pooling(arguments.text_model)) is not None:
            say(accelerator, f"--text_pooling {declared}, as {arguments.text_model} declares")
    if accelerator.is_main_process:
        line = describe_truncated(train, sample_of_captions(train, COUNTED_CAPTIONS), processor, cache_of(arguments))
        if line is not None:
            say(accelerator, line)
    return model.to(accelerator.device), processor


def describe_truncated(
    rows: Dataset, looked_at: Dataset, processor: MiniClipProcessor, cache_dir: Path | None = None
) -> str | None:
    """One line with the number of training captions that are too long for the tokenizer; None if there are none.

    Args:
        rows: training rows.
        looked_at: those of them to count in.
        processor: processor of the model.
        cache_dir: folder where the number is kept, so that a run with the same captions and tokenizer need not count.
    """
    kept = truncated = None
    if cache_dir is not None:
        texts = [digest_of_texts(batch["captions"].flatten()) for batch in record_batches(looked_at, ["captions"])]
        about = {"captions": texts, "tokenizer": digest_of_tokenizer(processor.tokenizer)}
        kept = KeptValue(cache_dir, "truncated", about)
        truncated = kept.read()
    if not isinstance(truncated, int):
        batches = record_batches(looked_at, ["captions"], TOKENIZED_TOGETHER)
        truncated = sum(processor.count_truncated(batch["captions"].flatten().to_pylist()) for batch in batches)
        if kept is not None:
            kept.write(truncated)
    if not truncated:
        return None
    sampled, limit = "sampled " if len(looked_at) < len(rows) else "", processor.tokenizer.model_max_length
    total = int(caption_counts(looked_at).sum())
    return f"{truncated} of {total} {sampled}training captions will be truncated to {limit} tokens"


def compute_frozen_features(
    model: MiniClipModel,
    processor: MiniClipProcessor,
    splits: DatasetDict,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    teacher: RunTeacher | None = None,
) -> dict[str, FrozenFeatures]:
    """Run the frozen towers over both splits, and a teacher over the training split, which takes minutes.

    Results are cached on disk.

    Returns:
        Features of `train` and `validation`; None for a tower that is trained or whose images are augmented in every
        epoch.
    """
    taught = compute_taught(teacher, splits, arguments, accelerator)
    found = {"train": FrozenFeatures(taught=taught), "validation": FrozenFeatures()}
    if (cache_dir := cache_of(arguments)) is None:
        return found
    for split, features in found.items():
        rows = caption_rows(splits, split, FrozenFeatures(), processor, arguments)
        views = 1 if rows.augmentation is None else arguments.num_views
        if arguments.freeze in ("vision", "both") and views is not None:
            features.vision = frozen_image_features(model, rows, views, arguments.num_workers, cache_dir, accelerator)
        runs_anyway = split == "train" and hard_negatives_of(arguments) is not None  # they differ in each epoch
        if arguments.freeze in ("text", "both") and not runs_anyway:
            features.text = frozen_text_features(model, splits[split], processor, cache_dir, accelerator)
    return found


def caption_rows(
    splits: DatasetDict,
    split: str,
    features: FrozenFeatures,
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    captions_per_image: int | None = None,
    shared: SharedCaptions | None = None,
) -> CaptionRows:
    """A split as a torch dataset; training images are augmented.

    Args:
        splits: all splits.
        split: name of the split, `train` or `validation`.
        features: features to use instead of running a frozen tower, and those of a teacher.
        processor: preprocessing of the images.
        arguments: flags of the run.
        captions_per_image: number of captions to draw for each image; None takes all.
        shared: which captions belong to several images; None does not look for any in a batch.
    """
    augmentation = None
    if split == "train":
        crop, side = processor.image_processor.crop_size, arguments.train_image_size
        size = (side or crop["height"], side or crop["width"])
        augmentation = build_augmentation(augmentation_list(arguments), size)
    negatives = hard_negatives_of(arguments) if split == "train" else None
    # A wrong caption of one image may be right for another one, whose captions it is then among.
    finds_pairs = shared is not None and (shared.may_occur or negatives is not None)
    return CaptionRows(
        splits[split], processor, augmentation, captions_per_image, arguments.seed, features.vision, features.text,
        finds_pairs=finds_pairs, copies=None if shared is None else shared.copies, hard_negatives=negatives,
        taught=features.taught,
    )  # fmt: skip


def probe_captions(
    splits: DatasetDict,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> CaptionEvidence:
    """Look whether captions belong to their images, on rank 0, and warn if they do not.

    The result is kept with the features of a frozen image tower: with these, a run opens no image.
    """
    found = [CaptionEvidence()]
    cache_dir = cache_of(arguments) if arguments.freeze in ("vision", "both") else None

    def probe() -> None:
        found.append(
            caption_probe.probe_captions(
                splits, model, processor, accelerator.device, arguments.preset is None, cache_dir
            )
        )

    check_on_main(probe, accelerator.is_main_process)
    if line := found[-1].warning():
        say(accelerator, f"warning: {line}")
    return found[-1]


def build_loaders(
    splits: DatasetDict,
    features: dict[str, FrozenFeatures],
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    shared: SharedCaptions | None = None,
) -> tuple[BatchLoader, BatchLoader]:
    """Loaders of this process's share of the training and of the validation batches; `shared` of [`find_shared`]."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loaders = []
    for split, captions_per_image, batch_size in (
        ("train", arguments.captions_per_image, arguments.batch_size),
        ("validation", None, EVALUATION_BATCH * world_size),
    ):
        pairs = shared if split == "train" else None
        rows = caption_rows(splits, split, features[split], processor, arguments, captions_per_image, pairs)
        order = training_order(splits, arguments) if split == "train" else InOrder(len(rows))
        batches = GlobalBatches(order, batch_size, rank, world_size)
        # Rows of features are ready to use: handing them from one process to another would cost more.
        workers = arguments.num_workers if rows.vision_features is None else 0
        piece, prefetch = None, 2
        if split == "train" and arguments.chunk_size is not None:  # a quarter of such a batch is read ahead
            piece, share = PIECE, -(-batch_size // world_size)
            prefetch = min(max(1, share // (4 * PIECE * max(1, workers))), MOST_PIECES_AHEAD)
        pin = accelerator.device.type == "cuda" and piece is None
        loaders.append(BatchLoader(rows, batches, workers, pin, prefetch, piece))
    return loaders[0], loaders[1]


def prepare_optimizer(
    model: MiniClipModel, arguments: TrainingArguments, accelerator: Accelerator
) -> tuple[Any, Any, torch.optim.Optimizer]:
    """The model and its optimizer, wrapped for the processes of the run, and the optimizer itself."""
    fused = accelerator.device.type == "cuda"  # one kernel per step
    adamw = torch.optim.AdamW(parameter_groups(model, arguments), fused=fused)
    prepare = prepare_engine if is_deepspeed(accelerator) else Accelerator.prepare
    return *prepare(accelerator, model, adamw), adamw


def build_run(
    model: MiniClipModel,
    processor: MiniClipProcessor,
    splits: DatasetDict,
    features: dict[str, FrozenFeatures],
    loaders: tuple[BatchLoader, BatchLoader],
    arguments: TrainingArguments,
    accelerator: Accelerator,
    fingerprint: Fingerprint | None = None,
    evidence: CaptionEvidence = NO_EVIDENCE,
    shared: SharedCaptions | None = None,
    zero_shot: ZeroShotSet | None = None,
    retention: RetentionSet | None = None,
    teacher: RunTeacher | None = None,
) -> TrainingRun:
    """Build optimizer and schedule, and the state of a run at its start."""
    classified = None if zero_shot is None else zero_shot.data
    retained = None if retention is None else retention.rows
    before_training = weights_to_change(model) if arguments.blend and accelerator.is_main_process else {}
    prepared, optimizer, adamw = prepare_optimizer(model, arguments, accelerator)
    train_loader, validation_loader = loaders
    steps_per_epoch = len(train_loader)
    last_step = last_step_of(arguments, steps_per_epoch)
    return TrainingRun(
        arguments=arguments,
        accelerator=accelerator,
        model=prepared,
        unwrapped_model=model,  # `accelerator.unwrap_model` would import DeepSpeed in every run, if it is installed
        processor=processor,
        optimizer=optimizer,
        scheduler=build_scheduler(adamw, arguments, last_step),
        train_loader=train_loader,
        validation_loader=validation_loader,
        validation_split=splits["validation"],
        validation_features=features["validation"],
        validation_parts=validation_parts(splits, arguments),
        card_data=data_for_card(arguments, splits)
        | {"license": license_for_card(arguments) if accelerator.is_main_process else None}
        | {"shared": describe_shared(shared, arguments)}
        | zero_shot_about(classified)
        | retention_about(retained, arguments),
        log=MetricsLog(Path(arguments.output_dir) / "metrics.jsonl", accelerator.is_main_process),
        meter=StepMeter(accelerator, optimizer),
        progress=Progress(),
        signals=SignalHandler(lambda line: None if run_is_ending() else say(accelerator, line)),
        diagnosis=Diagnosis(
            partial(warn, accelerator),
            arguments.warmup_steps,
            model.config.logit_scale_max,
            has_softmax=model.config.loss_type != "sigmoid",
            evidence=evidence,
        ),
        bad_images=watch_images(splits, classified, retained, arguments, accelerator, fingerprint),
        steps_per_epoch=steps_per_epoch,
        last_step=last_step,
        ema=AveragedWeights(model, arguments.ema_decay) if arguments.ema_decay else None,
        fingerprint=fingerprint,
        zero_shot=zero_shot,
        retention=retention,
        before_training=before_training,
        teacher=teacher,
        sizes=StepSizes(is_given=arguments.chunk_size is not None),
    )


def warn(accelerator: Accelerator, line: str) -> None:
    """Print a warning, once for all processes."""
    say(accelerator, f"warning: {line}")


def watch_images(
    splits: DatasetDict,
    classified: EvalSet | None,
    retained: Dataset | None,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    fingerprint: Fingerprint | None,
) -> BadImages:
    """Counts of images that cannot be decoded in the splits and other datasets, kept in the fingerprint."""

    def remember(bad_rows: dict[str, list[int]]) -> None:
        if fingerprint is not None:
            fingerprint.mark_undecodable(bad_rows, Path(arguments.output_dir))

    sizes = split_sizes(splits)
    if classified is not None:
        sizes[ZERO_SHOT_SPLIT] = {"images": len(classified.image_ids)}
    if retained is not None:
        sizes[RETENTION_SPLIT] = {"images": len(retained)}
    report = partial(warn, accelerator)
    return BadImages(sizes, arguments.max_bad_image_fraction, report, accelerator.device, remember)


def start_or_resume(run: TrainingRun, checkpoint: Path | None) -> None:
    """Load the checkpoint, or empty the output folder; from now on the run writes to it."""
    arguments, accelerator = run.arguments, run.accelerator
    saved = (run.progress, run.scheduler, run.log, run.meter, run.bad_images, run.exported, run.ema)
    accelerator.register_for_checkpointing(*(state for state in saved if state is not None))
    if checkpoint is not None:
        resume(run, checkpoint)
    elif arguments.resume_from_checkpoint is not None:
        run.say(f"no checkpoint in {run.output_dir}: starting from scratch")
    if accelerator.is_main_process:
        if checkpoint is None:
            clear_output_dir(run.output_dir)
        save_arguments(arguments, run.output_dir / "arguments.yaml")
    values = {name: value for name, value in asdict(arguments).items() if value is not None}
    config = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    purge = {"tensorboard": {"purge_step": run.progress.step + 1}}  # hide what an earlier start logged after this step
    accelerator.init_trackers("miniclip", config=config, init_kwargs=purge)


def resume(run: TrainingRun, checkpoint: Path) -> None:
    """Load a checkpoint, apply changed flags, and delete what an earlier start logged and saved after it."""
    flags = Fingerprint.load(checkpoint).flags
    if run.accelerator.scaler is not None and not (checkpoint / SCALER).exists():
        raise UsageError(
            f"--mixed_precision fp16: {checkpoint} has no scale of the loss ({SCALER}): it is damaged, or was saved "
            "in another precision; resume with --mixed_precision bf16 or no, or from another checkpoint"
        )
    try:
        with only_trained_weights(run.unwrapped_model):
            run.accelerator.load_state(str(checkpoint))
    except Exception as error:  # of many classes, for a damaged file or different parameters
        raise ModelError(
            f"--resume_from_checkpoint: {checkpoint} is damaged or of another model: {one_line(error)}; resume with "
            f"the original flags (--recipe {run.output_dir / 'arguments.yaml'}) or from another checkpoint"
        ) from error
    changed = changed_flags(flags, run.arguments, "applied")
    if changed:
        apply_flags(run.optimizer.optimizer, run.scheduler, run.arguments, flags)
    if is_deepspeed(run.accelerator):
        run.optimizer.optimizer.clip_grad = run.arguments.max_grad_norm  # it has loaded the checkpoint's
    if run.accelerator.is_main_process:
        last, interval = run.log.last_validation() or 0, run.arguments.eval_steps
        repeated = last % run.steps_per_epoch == 0 or (interval is not None and last % interval == 0)
        if rewind_folders(checkpoint, run.export_dir, not repeated):
            run.say(f"{INTERRUPTED_EXPORT}: the model of step {last}, exported when the run stopped within an epoch")
        delete_expired(checkpoint.parent, run.arguments.save_total_limit, run.progress.best_step)
    run.log.rewind()
    run.saved_position = run.position
    run.say(f"resumed from {checkpoint} at step {run.progress.step}")
    if changed:
        run.say(f"changed from here on: {describe_flags(changed)}")
