"""What a launcher was given: each setting is used, or it is an error that says what to use instead."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import write_basic_config

from modeling_miniclip import MiniClipError, update_index
from modeling_miniclip.errors import UsageError
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.launch import Launch, Launcher, find_launcher, launch_words, read_launch
from modeling_miniclip.training.command_line.launch_settings import SETTINGS, find_setting, settings_table
from modeling_miniclip.training.setup import build_accelerator
from tests.helpers.runs import ROOT

OPTIONS = {action.dest for action in launch_command_parser()._actions if action.dest != "help"}
ACCELERATE_FILES = ROOT / "configuration" / "accelerate"


def launched(words: str = "", environment: dict[str, str] | None = None, processes: int = 1) -> Launch:
    """Settings of a process that `accelerate launch WORDS train.py` has started."""
    own = {"WORLD_SIZE": str(processes)} if processes > 1 else {}
    return read_launch(own, Launcher([*words.split(), "train.py", "--seed", "1"], environment or {}))


def checked(launch: Launch, on_cpu: bool = True, precision: str | None = None) -> str:
    """The error of a launch, or "" if there is none."""
    try:
        launch.check(on_cpu, precision)
    except UsageError as error:
        return str(error)
    return ""


def launch_file(folder: Path, **values: Any) -> Path:
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_lists_every_option_of_accelerate_launch() -> None:
    pytest.importorskip("accelerate", minversion="1.15", reason="older releases have other options")
    assert {option for option in OPTIONS if find_setting(option) is None} == set(), "new: add them to SETTINGS"
    patterns = [name for setting in SETTINGS for name in setting.options.split()]
    unknown = [
        p for p in patterns if not any(find_setting(o) and re.fullmatch(p.replace("*", ".*"), o) for o in OPTIONS)
    ]
    assert unknown == [], "no longer options of accelerate launch"
    assert len(patterns) == len(set(patterns))


def test_options_that_others_need_exist() -> None:
    assert {setting.needs for setting in SETTINGS} - {""} <= OPTIONS


def test_training_guide_has_the_table() -> None:
    assert settings_table() in (ROOT / "docs" / "several-machines.md").read_text(encoding="utf-8")


# --- finding the launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "/venv/bin/python /venv/bin/accelerate launch --cpu train.py",
        "/venv/bin/python3 -m accelerate.commands.launch --cpu train.py",
        "python -m accelerate.commands.accelerate_cli launch --cpu train.py",
        "python accelerate.exe launch --cpu train.py",
        "python -u /bin/accelerate-launch --cpu train.py",
    ],
)
def test_launcher_is_recognised_by_its_command_line(command: str) -> None:
    assert launch_words(command.split()) == ["--cpu", "train.py"]


@pytest.mark.parametrize("command", ["", "python train.py", "accelerate test", "torchrun --nproc_per_node 2 launch"])
def test_other_commands_are_no_launcher(command: str) -> None:
    assert launch_words(command.split()) is None


def test_without_launcher_nothing_was_asked_for() -> None:
    assert find_launcher() is None
    assert read_launch({}) == Launch({}, 1)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ("--mixed_precision bf16", {}, "bf16"),
        ("--mixed-precision=no", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "no"),
        ("", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),  # the launcher overwrites it with its default
        ("--cpu", {}, None),
    ],
)
def test_precision_of_the_launcher_is_read(words: str, environment: dict[str, str], expected: str | None) -> None:
    assert launched(words, environment).mixed_precision == expected


@pytest.mark.parametrize("precision", ["bf16", "no", None])
def test_precision_of_the_launch_file_is_read(tmp_path: Path, precision: str | None) -> None:
    path = launch_file(tmp_path, distributed_type="NO", num_processes=1, mixed_precision=precision)
    assert launched(f"--config_file {path}").mixed_precision == precision
    assert launched(f"--config_file {path} --mixed_precision fp16").mixed_precision == "fp16"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "no"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_MODE": "default"}, None),  # a launcher's default
    ],
)
def test_precision_in_the_environment_is_read(environment: dict[str, str], expected: str | None) -> None:
    assert read_launch(environment).mixed_precision == expected


def test_precision_of_the_training_script_comes_first() -> None:
    fp8 = launched("--mixed_precision fp8")
    assert "--mixed_precision fp8 is not supported; use --mixed_precision bf16" in checked(fp8)
    assert checked(fp8, precision="bf16") == ""


def test_half_precision_on_a_cpu_is_an_error() -> None:
    assert "--mixed_precision fp16 needs a GPU" in checked(launched("--mixed_precision fp16"))
    assert "--mixed_precision fp16 needs a GPU" in checked(launched(), precision="fp16")
    assert checked(launched("--mixed_precision fp16"), on_cpu=False) == ""


# --- all other settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gradient_accumulation_steps 4", "--gradient_accumulation_steps 4 is not supported; a step has all images"),
        ("--use_megatron_lm", "--use_megatron_lm is not supported; use FSDP"),
        ("--tpu", "--tpu is not supported; start it on GPUs or CPUs"),
        ("--downcast_bf16", "--downcast_bf16 is not supported"),
        ("--fp8_backend te", "--fp8_backend te is not supported; use --mixed_precision bf16"),
        ("--dynamo_mode max-autotune", "--dynamo_mode max-autotune has no effect without --dynamo_backend"),
        ("--dynamo_backend ofi", "--dynamo_backend ofi: torch.compile has no such backend here"),
        ("--dynamo_backend eager --dynamo_use_regional_compilation", "use --compile_towers"),
        ("--zero_stage 3", "--zero_stage 3 has no effect without --use_deepspeed"),
        ("--use_fsdp", "--use_fsdp: only version 2 is supported; add --fsdp_version 2"),
        ("--use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true", "use --chunk_size"),
        ("--use_fsdp --fsdp_version 2 --fsdp_forward_prefetch true", "--fsdp_forward_prefetch true is not supported"),
        ("--use_fsdp --fsdp_version 2 --dynamo_backend eager", "--dynamo_backend eager does not work with FSDP"),
        ("--fsdp_offload_params true", "--fsdp_offload_params true has no effect without --use_fsdp"),
        ("--dynamo_backend eager --dynamo_use_dynamic --multi_gpu --num_cpu_threads_per_process 1", ""),
        ("--use_fsdp --fsdp_version 2 --fsdp_offload_params true", ""),
        ("--gradient_accumulation_steps 1 --mixed_precision no --dynamo_backend no --cpu", ""),
    ],
)
def test_settings_that_cannot_be_used_are_errors(words: str, expected: str) -> None:
    message = checked(launched(words), on_cpu=False)
    assert message.startswith(expected) or (expected.startswith("use --") and expected in message)


@pytest.mark.parametrize(
    "variable",
    ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "ACCELERATE_USE_MEGATRON_LM=true", "ACCELERATE_FP8_BACKEND=TE",
     "ACCELERATE_USE_PARALLELISM_CONFIG=true", "ACCELERATE_DOWNCAST_BF16=true", "MEGATRON_LM_TP_DEGREE=2"],
)  # fmt: skip
def test_variables_that_cannot_be_used_are_errors(variable: str) -> None:
    name, value = variable.split("=")
    assert checked(read_launch({name: value})).startswith(f"{variable} is not supported")
    assert checked(launched(environment={name: value})).startswith(f"{variable} is not supported")


def test_fully_sharded_training_on_cpus_is_an_error() -> None:
    fsdp = launched(f"--config_file {ACCELERATE_FILES / 'fsdp.yaml'}", processes=2)
    assert checked(fsdp, on_cpu=False) == ""
    assert "FSDP needs GPUs" in checked(fsdp, on_cpu=True)


def test_defaults_in_the_environment_of_fully_sharded_training_are_no_errors() -> None:
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
    assert checked(read_launch(variables), on_cpu=False) == ""


def test_launch_files_of_accelerate_config_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    assert write_basic_config("no", str(path))
    unasked = {"downcast_bf16": "no", "main_training_function": "main", "rdzv_backend": "static", "tpu_env": []}
    content = yaml.safe_load(path.read_text()) | unasked | {"tpu_use_cluster": False, "same_network": True}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    launch = launched(f"--config_file {path}")
    assert checked(launch) == ""
    assert (launch.mixed_precision, launch.on_cpu) == ("no", True)


@pytest.mark.parametrize("path", sorted(ACCELERATE_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_launch_files_can_be_used(path: Path) -> None:
    processes = yaml.safe_load(path.read_text())["num_processes"]
    launch = launched(f"--config_file {path}", processes=processes)
    assert checked(launch, on_cpu=False) == ""
    assert launch.on_cpu == path.stem.startswith("cpu")


def test_wrong_launch_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(MiniClipError, match=re.escape(str(path))):
        launched(f"--config_file {path}")


# --- number of processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["--cpu --num_processes 2", "--num_machines 2", "--num_processes=2"])
def test_fewer_processes_than_asked_for_is_an_error(words: str) -> None:
    message = checked(launched(words))
    assert re.match(r"--num_(processes|machines) 2: accelerate launch started only 1\..*cpu2.yaml", message)
    assert checked(launched(words, processes=2)) == ""


def test_launch_file_that_starts_one_process_is_an_error(tmp_path: Path) -> None:
    path = launch_file(tmp_path, distributed_type="MULTI_CPU", use_cpu=True, num_processes=2)
    assert f"num_processes: 2 in {path}: accelerate launch started only 1" in checked(
        launched(f"--config_file {path}")
    )


def test_index_asks_for_the_processes_of_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = Launcher(["--cpu", "--num_processes", "2", "train.py"])
    monkeypatch.setattr("modeling_miniclip.training.command_line.launch.find_launcher", lambda: launcher)
    with pytest.raises(UsageError, match="--num_processes 2: accelerate launch started only 1"):
        update_index(tmp_path / "photos.index", [tmp_path], "model")


def test_processes_that_are_not_joined_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match="names 2 processes, but this one is not joined"):
        build_accelerator(TrainingArguments(), Launch({}, processes=2))


# --- what Accelerate gets -------------------------------------------------------------------------------------------


def test_accelerator_gets_what_the_launcher_was_given() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    launch = launched("--mixed_precision bf16 --dynamo_backend eager --dynamo_use_fullgraph")
    accelerator = build_accelerator(TrainingArguments(), launch)
    assert accelerator.mixed_precision == "bf16"
    plugin = accelerator.state.dynamo_plugin
    assert (plugin.backend, plugin.fullgraph, plugin.dynamic) == ("EAGER", True, None)
    linear = torch.nn.Linear(2, 2)
    compiled = accelerator.prepare(linear)
    assert compiled is not linear
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is linear
    AcceleratorState._reset_state(reset_partial_state=True)


def test_flag_against_accumulation_counts_more_than_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # the launcher leaves it as it is
    launch = launched("--gradient_accumulation_steps 1", dict(os.environ))
    assert checked(launch) == ""
    accelerator = build_accelerator(TrainingArguments(), launch)
    assert accelerator.gradient_accumulation_steps == 1
    AcceleratorState._reset_state(reset_partial_state=True)
