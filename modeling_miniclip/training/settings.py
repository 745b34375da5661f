"""The settings of a run that depend on its data and its model: derived, or those of the checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import DatasetDict

from ..clips.source import read_source
from ..configuration_miniclip import MiniClipConfig, vision_tower_config
from ..data.tables.row_blocks import caption_counts
from ..inference.loading import check_export_folder
from ..modeling_miniclip import vision_class_of
from ..processing_miniclip import MiniClipProcessor, image_processor_of
from .command_line.arguments import DERIVED, TrainingArguments
from .command_line.derived import LARGER, Facts, asks_about_tower, derive, multiple_of_stride
from .processes.distributed import compute_on_main
from .reports.reporting import say
from .resuming.fingerprint import Fingerprint
from .towers.layers import knows_layers


def choose_settings(
    splits: DatasetDict, checkpoint: Path | None, arguments: TrainingArguments, accelerator: Accelerator
) -> TrainingArguments:
    """Arguments with every derived flag: as given, as in the checkpoint, or by the rules of `derived.py`."""
    if checkpoint is not None:
        return saved_settings(arguments, Fingerprint.load(checkpoint).flags)
    if all(getattr(arguments, name) is not None for name in DERIVED):
        return arguments
    # A file that one process cannot read for a moment must not give it other settings.
    facts = compute_on_main(lambda: facts_of(splits, arguments, accelerator), accelerator.is_main_process)
    arguments, lines = derive(arguments, facts)
    for line in lines:
        say(accelerator, line)
    return arguments


def saved_settings(arguments: TrainingArguments, flags: dict[str, Any]) -> TrainingArguments:
    """Arguments in which flags that a run chooses itself have the values of a checkpoint, unless they are given.

    Args:
        arguments: flags of this start of the run.
        flags: flags in the checkpoint. If a time limit has set the number of steps, it stays.
    """
    names = [*DERIVED, "lr_scheduler_kwargs", "time_limit", "chunk_size"]
    if flags.get("time_limit") is not None and arguments.num_train_epochs is None:
        names.append("max_steps")
    return replace(arguments, **{name: flags[name] for name in names if getattr(arguments, name) is None})


def facts_of(splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator) -> Facts:
    """What the derived flags depend on."""
    train = splits["train"]
    return Facts(
        images=len(train),
        captions=float(caption_counts(train).mean()),
        **_image_tower(arguments),
        spreads_weights=accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED),
    )


def _image_tower(arguments: TrainingArguments) -> dict[str, Any]:
    """What is known of the image tower before it is created: some of the arguments of [`Facts`]."""
    from .. import auto  # noqa: F401  (otherwise transformers asks whether to trust the code in an export)

    if not asks_about_tower(arguments):
        return {}
    try:
        if arguments.model_name_or_path is not None:
            if read_source(arguments.model_name_or_path, "--model_name_or_path").kind != "miniclip":
                return {"is_clip": True}
            check_export_folder("--model_name_or_path", arguments.model_name_or_path)
            config = MiniClipConfig.from_pretrained(arguments.model_name_or_path).vision_config
            crop = MiniClipProcessor.from_pretrained(arguments.model_name_or_path).image_processor.crop_size
        else:
            config = vision_tower_config(str(arguments.vision_model))
            crop = image_processor_of(config).crop_size
        cfg = {}
        if config.model_type == "timm_wrapper":
            cfg = config.pretrained_cfg or timm.get_pretrained_cfg(config.architecture).to_dict()
        size = crop["height"] if crop["height"] == crop["width"] else None
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # no weights are needed
            tower = vision_class_of(config)(config).eval()
        takes_others = size is not None and not cfg.get("fixed_input_size") and _takes_others(tower, size)
        is_clip = arguments.model_name_or_path is not None and config.model_type != "timm_wrapper"
        known = {"tower_size": size, "takes_other_sizes": takes_others, "knows_layers": knows_layers(tower)}
        return known | {"is_clip": is_clip}
    except Exception:  # of many classes; what is wrong with a tower is said when the model is created
        return {}


def _takes_others(tower: Any, size: int) -> bool:
    """Whether a tower without weights takes the sizes that the rules may choose; true if it cannot be tried."""

    @torch.no_grad()
    def takes(side: int) -> bool:
        try:
            getattr(tower, "timm_model", tower)(torch.empty(1, 3, side, side, device="meta"))
        except Exception:  # of many classes
            return False
        return True

    others = (multiple_of_stride(size * LARGER), multiple_of_stride(size / LARGER))
    return not takes(size) or all(map(takes, others))
