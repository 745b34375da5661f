"""The settings of `accelerate launch`, and what happens to each: for `launch.py` and for the training guide."""

from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ...utils.files import replace_between_marks
from ...utils.resources import PACKAGE


class Setting(NamedTuple):
    """One or more options of `accelerate launch` and what happens to them.

    Args:
        options: their names, separated by spaces; `*` at the end of a name stands for all that start like it.
        effect: what they do, for the guide.
        instead: for options that are an error: what to do instead.
        needs: an option without which they have no effect, which is an error.
    """

    options: str
    effect: str
    instead: str = ""
    needs: str = ""


NO_ACCUMULATION = (
    "a step has all images of --batch_size, which counts those of all processes; use --chunk_size to compute a large "
    "batch in little memory"
)
NO_FP8 = "use --mixed_precision bf16"
NO_MODEL_PARALLEL = "use FSDP (--config_file configuration/accelerate/fsdp.yaml) for towers that do not fit on one GPU"
NO_TPU = "start it on GPUs or CPUs"

# Options that version 2 of FSDP ignores.
ONLY_FSDP_1 = "fsdp_sharding_strategy fsdp_backward_prefetch fsdp_forward_prefetch fsdp_use_orig_params"

SETTINGS = (
    Setting("mixed_precision", "used, unless `--mixed_precision` of the training script says otherwise; not fp8"),
    Setting("cpu", "used (`use_cpu` in a launch file), also where there are GPUs"),
    Setting("num_processes num_machines", "used; an error if fewer processes were started"),
    Setting("multi_gpu gpu_ids mpirun_hostfile", "used by the launcher, which starts the processes"),
    Setting("machine_rank main_process_ip main_process_port same_network rdzv_backend rdzv_conf",
            "used by the launcher, which connects the machines"),
    Setting("max_restarts monitor_interval tee log_dir role", "used by the launcher"),
    Setting("config_file quiet module no_python debug training_script training_script_args", "used by the launcher"),
    Setting("num_cpu_threads_per_process enable_cpu_affinity", "used"),
    Setting("main_training_function", "only for TPUs, without effect here"),
    Setting("dynamo_backend", "used, but not with FSDP: compiles the whole model; `--compile_towers` compiles the "
            "towers only"),
    Setting("dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic", "used with `--dynamo_backend`",
            needs="dynamo_backend"),
    Setting("dynamo_use_regional_compilation", "error", "use --compile_towers of the training script"),
    Setting("use_fsdp", "used on GPUs; an error on CPUs, where Accelerate would use DistributedDataParallel"),
    Setting("fsdp_version", "2 is used; 1 (the launcher's default) is an error", needs="use_fsdp"),
    Setting("fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params fsdp_reshard_after_forward "
            "fsdp_state_dict_type fsdp_offload_params fsdp_cpu_ram_efficient_loading fsdp_sync_module_states",
            "used with `--use_fsdp`", needs="use_fsdp"),
    Setting(ONLY_FSDP_1, "error", "it belongs to version 1 of FSDP; use fsdp_reshard_after_forward"),
    Setting("fsdp_activation_checkpointing fsdp_activation_checkpointing_offload", "error",
            "use --chunk_size of the training script to compute a large batch in little memory"),
    Setting("use_deepspeed", "used; an error on CPUs without `DS_ACCELERATOR=cpu`"),
    Setting("zero_stage deepspeed_config_file", "used with `--use_deepspeed`; an error for settings in that file that "
            "flags of the training script decide", needs="use_deepspeed"),
    Setting("zero3_save_16bit_model", "without effect: always on, as the export needs it", needs="use_deepspeed"),
    Setting("zero3_init_flag", "error, unless false", "each process builds the whole model before it is spread"),
    Setting("offload_optimizer_device offload_param_device offload_optimizer_nvme_path offload_param_nvme_path",
            "error, unless none", "use --chunk_size of the training script to compute a large batch in little memory"),
    Setting("deepspeed_hostfile deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_multinode_launcher",
            "used by the launcher", needs="use_deepspeed"),
    Setting("deepspeed_moe_layer_cls_names", "error", "the towers have no experts"),
    Setting("gradient_accumulation_steps", "error, unless 1", NO_ACCUMULATION),
    Setting("gradient_clipping", "error", "use --max_grad_norm of the training script"),
    Setting("fp8_*", "error", NO_FP8),
    Setting("use_megatron_lm megatron_lm_*", "error", NO_MODEL_PARALLEL),
    Setting("use_parallelism_config parallelism_config_*", "error", NO_MODEL_PARALLEL),
    Setting("tpu tpu_* vm env downcast_bf16", "error", NO_TPU),
    Setting("aws_*", "error", "start the script on the machine that trains"),
)  # fmt: skip


def find_setting(option: str) -> Setting | None:
    """What happens to an option; None for one that this package does not know."""
    matching = (s for s in SETTINGS if any(fnmatch(option, name) for name in s.options.split()))
    return next(matching, None)


def settings_table() -> str:
    """All settings as a Markdown table."""
    lines = ["| option of `accelerate launch` | what happens |", "|---|---|"]
    for setting in SETTINGS:
        names = ", ".join(f"`{name}`" for name in setting.options.split())
        effect = f"error: {setting.instead}" if setting.instead else setting.effect
        if setting.instead and setting.effect != "error":
            effect = f"{setting.effect}: {setting.instead}"
        lines.append(f"| {names} | {effect} |")
    return "\n".join(lines) + "\n"


def write_settings_table(guide: Path) -> None:
    """Replace the text between `<!-- launch settings -->` and `<!-- end of launch settings -->` by the table."""
    replace_between_marks(guide, "launch settings", settings_table())


if __name__ == "__main__":
    write_settings_table(PACKAGE.parent / "docs" / "several-machines.md")
