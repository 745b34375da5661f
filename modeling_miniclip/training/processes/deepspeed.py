"""Train with ZeRO of DeepSpeed: when it can run, which of its settings are used, and what differs from other engines.

ZeRO-1 and 2 spread optimizer states and gradients over the processes, ZeRO-3 the parameters too. The steps are those
of DistributedDataParallel, because what decides them comes from the flags of the training script, never from
DeepSpeed's configuration. Parameters stay in float32; bf16 is used by autocast, as everywhere else.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.nn import Parameter

from ...errors import UsageError
from ..command_line.arguments import TrainingArguments
from ..command_line.launch import Launch

STAGES = (1, 2, 3)
# With ZeRO-2, earlier releases lose the gradients of all chunks but the last, or fail with torch 2.14.
OLDEST = (0, 19)
ENGINE_FOLDER = "pytorch_model"  # in a checkpoint: what the engine saved

# Settings of DeepSpeed that change speed, memory and reports, but not what is learned. They are used as they are.
USED = frozenset(
    "zero_optimization steps_per_print wall_clock_breakdown memory_breakdown dump_state comms_logger "
    "flops_profiler".split()
)
USED_OF_ZERO = frozenset(
    "stage allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size "
    "contiguous_gradients round_robin_gradients sub_group_size stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_gather_16bit_weights_on_model_save".split()
)
# What to use instead of settings that flags decide.
INSTEAD = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "--batch_size"),
    "gradient_accumulation_steps": "--batch_size with --chunk_size",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type",
    **dict.fromkeys(("fp16", "bf16", "amp", "torch_autocast"), "--mixed_precision"),
    **dict.fromkeys(("offload_optimizer", "offload_param", "activation_checkpointing"), "--chunk_size"),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "--report_to"),
}
# Settings of `accelerate launch` that it does not combine with a file of DeepSpeed's settings.
ONLY_WITHOUT_FILE = ("gradient_clipping", "gradient_accumulation_steps", "zero_stage", "zero3_save_16bit_model")


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether a run trains with DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO of a run that trains with DeepSpeed."""
    return int(accelerator.deepspeed_plugin.zero_stage)


# --- before any work: can it run? ------------------------------------------------------------------------------------


def check_deepspeed(launch: Launch, arguments: TrainingArguments) -> None:
    """If the launcher asks for DeepSpeed, check that it can run, with these settings and flags.

    Raises:
        UsageError: it cannot; the message says what to do.
    """
    asked = launch.settings.get("use_deepspeed")
    if asked is None:
        return
    place = asked.place
    _check_release(place)
    if launch.on_cpu:
        other = launch.settings["cpu"].place
        raise UsageError(
            f"{place} and {other}: Accelerate would train without DeepSpeed; leave out one of them, and set "
            "DS_ACCELERATOR=cpu to try DeepSpeed on CPUs"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(f"{place}: DeepSpeed needs a launcher; start with accelerate launch")
    wants_cpu, has_gpu = os.environ.get("DS_ACCELERATOR") == "cpu", torch.accelerator.is_available()
    if not wants_cpu and not has_gpu:
        raise UsageError(
            f"{place}: there is no GPU; set DS_ACCELERATOR=cpu to try DeepSpeed on CPUs, or use "
            "configuration/accelerate/cpu2.yaml"
        )
    if wants_cpu and has_gpu:
        raise UsageError(f"{place}: DS_ACCELERATOR=cpu, but there is a GPU; unset it, or hide the GPUs from this run")
    _check_flags(launch, arguments, place)
    _check_settings(launch)


def _check_release(place: str) -> None:
    try:
        release = version("deepspeed")
    except PackageNotFoundError:
        raise UsageError(f"{place}: DeepSpeed is not installed; pip install deepspeed") from None
    major, minor = release.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        raise UsageError(f"{place}: DeepSpeed {release} is too old; pip install 'deepspeed>=0.19'")


def _check_flags(launch: Launch, arguments: TrainingArguments, place: str) -> None:
    precision = arguments.mixed_precision or launch.mixed_precision
    if arguments.ema_decay:
        raise UsageError(f"--ema_decay does not work with DeepSpeed, which spreads the weights; set it to 0 ({place})")
    if arguments.lora_rank is not None:
        raise UsageError(f"--lora_rank does not work with DeepSpeed; leave one of them out, or use FSDP ({place})")
    if arguments.compile_towers or "dynamo_backend" in launch.settings:
        flag = "--compile_towers" if arguments.compile_towers else launch.settings["dynamo_backend"].place
        raise UsageError(
            f"{flag} does not work with DeepSpeed, which runs code between layers; leave it out ({place})"
        )
    if precision == "fp16":
        raise UsageError(f"--mixed_precision fp16 does not work with DeepSpeed here; use bf16 or no ({place})")


def _check_settings(launch: Launch) -> None:
    """Check the settings of `accelerate launch` for DeepSpeed, and the file that they may name."""
    file = launch.settings.get("deepspeed_config_file")
    if file is None:
        stage = launch.value("zero_stage") or "2"
        if stage not in map(str, STAGES):
            raise UsageError(f"{launch.settings['zero_stage'].place}: expected a stage of ZeRO: 1, 2 or 3")
        return
    for name in ONLY_WITHOUT_FILE:
        if name in launch.settings:
            raise UsageError(f"{launch.settings[name].place}: write it into {file.value} instead")
    check_config(read_config(Path(file.value)), file.value)


def read_config(path: Path) -> dict[str, Any]:
    """DeepSpeed's settings in a JSON file.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the file of DeepSpeed's settings cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: DeepSpeed's settings must be a JSON object")
    return config


def check_config(config: dict[str, Any], place: str) -> None:
    """Check that DeepSpeed's settings leave to the flags what decides a step.

    Args:
        config: DeepSpeed's settings.
        place: where they are, for messages.

    Raises:
        UsageError: one of them cannot be used; the message says what to use instead.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES:
        raise UsageError(f'{place}: "zero_optimization" needs a "stage": 1, 2 or 3')
    for used, settings, inside in ((USED, config, ""), (USED_OF_ZERO, zero, "zero_optimization.")):
        for name, value in settings.items():
            if name in used or _asks_for_nothing(name, value):
                continue
            hint = f"use {INSTEAD[name]} of the training script" if name in INSTEAD else "it is not supported"
            raise UsageError(f"{place}: remove {inside}{name}: {hint}")


def _asks_for_nothing(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", value.get("device", "")) in (False, "auto", "none", None)
    return value in (None, "auto", False) or (name == "gradient_accumulation_steps" and value == 1)


# --- start it --------------------------------------------------------------------------------------------------------


def before_joining(on_cpu: bool) -> None:
    """Prepare Accelerate and DeepSpeed, which then join the processes.

    Args:
        on_cpu: whether the run uses CPUs.
    """
    os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = ""  # Accelerate's own check, which rejects unused settings too
    if on_cpu:
        import deepspeed

        # An extension that DeepSpeed would compile first, which takes a minute and a compiler.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def complete_config(accelerator: Accelerator, arguments: TrainingArguments, precision: str) -> None:
    """Write into DeepSpeed's configuration what the flags of the training script decide.

    Args:
        accelerator: processes and engine of the run.
        arguments: flags of the run.
        precision: `no` or `bf16`.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    if zero["stage"] not in STAGES:
        raise UsageError(f"DeepSpeed's zero_stage is {zero['stage']}; expected 1, 2 or 3")
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # of any precision; the export needs it
    # For DeepSpeed's reports only: a derived batch size is not known yet.
    images = max(1, (arguments.batch_size or 0) // accelerator.num_processes)
    config |= {"zero_optimization": zero, "train_micro_batch_size_per_gpu": images, "gradient_accumulation_steps": 1}
    config |= {"train_batch_size": images * accelerator.num_processes, "gradient_clipping": arguments.max_grad_norm}
    config |= {"fp16": {"enabled": False}, "bf16": {"enabled": precision == "bf16"}}
    unset_hf_deepspeed_config()  # otherwise transformers would spread the towers while they are loaded


def prepare_engine(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as `accelerator.prepare` returns them, computing in the run's precision.

    DeepSpeed's own bf16 would round the parameters too, and with them the temperature.
    """
    if accelerator.mixed_precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    bf16 = accelerator.deepspeed_plugin.deepspeed_config["bf16"]
    precision, bf16["enabled"] = bf16["enabled"], False
    prepared = accelerator.prepare(model, optimizer)
    bf16["enabled"] = precision  # which `accelerator.mixed_precision` reads
    return prepared


def describe_engine(accelerator: Accelerator) -> str:
    """End of a log line: DeepSpeed's stage; empty without DeepSpeed."""
    return f", DeepSpeed ZeRO-{zero_stage(accelerator)}" if is_deepspeed(accelerator) else ""


def check_engine_state(checkpoint: Path | None, accelerator: Accelerator) -> None:
    """Check that a checkpoint was saved by the same engine in as many processes: DeepSpeed would load nothing.

    Args:
        checkpoint: the checkpoint to resume from, if any.
        accelerator: processes and engine of the run.

    Raises:
        UsageError: it was not; the message says how to resume it.
    """
    if checkpoint is None:
        return
    saved = list((checkpoint / ENGINE_FOLDER).glob("*zero_pp_rank_*_optim_states.pt"))
    spread = any((checkpoint / ENGINE_FOLDER).glob("zero_pp_rank_*_model_states.pt"))
    problem = ""
    if is_deepspeed(accelerator) != bool(saved):
        was, start = ("was", "with") if saved else ("was not", "without")
        problem = f"{was} saved with DeepSpeed; start the run {start} it"
    elif saved and len(saved) != accelerator.num_processes:
        problem = f"was saved by {len(saved)} processes; DeepSpeed resumes it with --num_processes {len(saved)} only"
    elif saved and spread != (zero_stage(accelerator) == 3):
        problem = f"was saved with ZeRO-{'3' if spread else '1 or 2'}; start the run with that stage"
    if problem:
        raise UsageError(f"--resume_from_checkpoint: {checkpoint} {problem}")


# --- a step ----------------------------------------------------------------------------------------------------------


@contextmanager
def without_step(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within the block, `accelerator.backward` only adds to the gradients: they are complete, and DeepSpeed takes its
    step, at the next one after the block."""
    if not is_deepspeed(accelerator):
        with accelerator.no_sync(model):
            yield
        return
    accelerator.sync_gradients = False
    try:
        yield
    finally:
        accelerator.sync_gradients = True


@contextmanager
def gathered(*parameters: Parameter | None) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 spread over processes can be read. Every process must enter it."""
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield


@contextmanager
def changed_on_main(parameter: Tensor) -> Iterator[None]:
    """Within the block, a parameter that ZeRO-3 has spread is whole, and gets the values that rank 0 gives it.

    Every process must enter it.
    """
    if not hasattr(parameter, "ds_tensor"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


@torch.no_grad()
def clamp_parameter(parameter: Parameter, bound: float) -> None:
    """Bring a parameter back to its upper bound after a step, and the copy that DeepSpeed's optimizer has of it."""
    parameter.clamp_(max=bound)
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        parameter.ds_tensor.clamp_(max=bound)
        local = safe_get_local_fp32_param(parameter)
        if local is not None:  # it is trained
            safe_set_local_fp32_param(parameter, local.clamp(max=bound))
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.detach())
