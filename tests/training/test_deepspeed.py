"""Training with DeepSpeed: two processes on CPUs take the steps of DistributedDataParallel, and resume them."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_miniclip import MiniClipModel, UsageError
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.launch import Launch, Launcher, read_launch
from modeling_miniclip.training.processes import deepspeed
from modeling_miniclip.training.processes.deepspeed import check_config, check_deepspeed, check_engine_state
from tests.helpers.forks import start_in_processes, train_in_processes
from tests.helpers.runs import ROOT, environment, flags, metrics_of, write_preset

LAUNCH_FILE = "configuration/accelerate/deepspeed.yaml"
ZERO = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ZERO_2 = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}

# The temperature reaches its bound, gradients are clipped, the last step of an epoch has an odd number of images.
SETTINGS: dict[str, Any] = {
    "dropout": 0, "freeze_batch_norm": True, "captions_per_image": 2, "num_train_epochs": 7, "max_steps": 20,
    "loss_type": "sigmoid", "lr_scheduler_type": "cosine", "warmup_steps": 3, "layer_decay": 0.8,
    "frozen_vision_fraction": 0.3, "max_grad_norm": 0.5, "best_metric": "loss", "checkpointing_steps": 7,
}  # fmt: skip
BOUND = 10.0


@pytest.fixture(autouse=True)
def _as_a_launcher_starts_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords and "long" not in request.keywords:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setattr(deepspeed, "version", lambda name: "0.19.0")


def launched_with(words: str) -> Launch:
    """What a run reads that was started by `accelerate launch` with these words."""
    return read_launch({"WORLD_SIZE": "2"}, Launcher([*words.split(), "train_miniclip.py"], {}, ROOT))


# --- before any work -------------------------------------------------------------------------------------------------


def test_launch_file_for_deepspeed_is_accepted() -> None:
    for words in (f"--config_file {LAUNCH_FILE}", f"--config_file {LAUNCH_FILE} --zero_stage 3"):
        launch = launched_with(words)
        launch.check(False, None)
        check_deepspeed(launch, TrainingArguments())
        assert "use_deepspeed" in launch.settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gradient_clipping 1.0", "--gradient_clipping 1.0 is not supported; use --max_grad_norm"),
        ("--offload_optimizer_device cpu", "use --chunk_size"),
        ("--zero3_init_flag true", "each process builds the whole model"),
        ("--deepspeed_moe_layer_cls_names Block", "the towers have no experts"),
    ],
)
def test_unused_settings_of_deepspeed_are_an_error(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launched_with(f"--config_file {LAUNCH_FILE} {words}").check(False, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": "--zero_stage 4"}, "--zero_stage 4: expected a stage of ZeRO: 1, 2 or 3"),
        ({"words": "--deepspeed_config_file a.json --zero_stage 3"}, "--zero_stage 3: write it into a.json instead"),
        ({"words": "--dynamo_backend inductor"}, "--dynamo_backend inductor does not work with DeepSpeed"),
        ({"words": "--mixed_precision fp16"}, "--mixed_precision fp16 does not work with DeepSpeed"),
        ({"ema_decay": 0.99}, "--ema_decay does not work with DeepSpeed"),
        ({"lora_rank": 4}, "--lora_rank does not work with DeepSpeed"),
        ({"compile_towers": True}, "--compile_towers does not work with DeepSpeed"),
        ({"words": "--cpu"}, "use_cpu.*|--cpu: Accelerate would train without DeepSpeed"),
        ({"without": "LOCAL_RANK"}, "DeepSpeed needs a launcher"),
        ({"without": "DS_ACCELERATOR"}, "there is no GPU; set DS_ACCELERATOR=cpu"),
        ({"gpu": True}, "DS_ACCELERATOR=cpu, but there is a GPU"),
        ({"release": None}, "not installed; pip install deepspeed"),
        ({"release": "0.18.9+cu128"}, "DeepSpeed 0.18.9.cu128 is too old; pip install 'deepspeed>=0.19'"),
    ],
)
def test_a_run_that_deepspeed_cannot_do_is_an_error(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    launch = launched_with(f"--config_file {LAUNCH_FILE} {change.pop('words', '')}")
    if name := change.pop("without", None):
        monkeypatch.delenv(name)
    gpu = change.pop("gpu", False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    if "release" in change:
        release = change.pop("release")
        monkeypatch.setattr(deepspeed, "version", lambda name: release or version("no-such-package"))
    with pytest.raises(UsageError, match=message):
        check_deepspeed(launch, TrainingArguments(**change))


def test_file_of_settings_must_be_a_json_object(tmp_path: Path) -> None:
    for text, message in (("{", "cannot be read"), ("[]", "must be a JSON object"), (None, "cannot be read")):
        path = tmp_path / "ds.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(UsageError, match=f"{path}: .*{message}"):
            check_deepspeed(launched_with(f"--use_deepspeed --deepspeed_config_file {path}"), TrainingArguments())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, 'needs a "stage"'),
        ({"zero_optimization": {"stage": 0}}, 'needs a "stage"'),
        ({"train_batch_size": 64}, "remove train_batch_size: use --batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "use --batch_size"),
        ({"gradient_accumulation_steps": 4}, "use --batch_size with --chunk_size"),
        ({"gradient_clipping": 1.0}, "use --max_grad_norm"),
        ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, "use --learning_rate and --weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, "use --lr_scheduler_type"),
        ({"bf16": {"enabled": True}}, "use --mixed_precision"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use --mixed_precision"),
        ({"wandb": {"enabled": True}}, "use --report_to"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "it is not supported"),
        ({"curriculum_learning": {"enabled": True}}, "remove curriculum_learning: it is not supported"),
    ],
)
def test_deepspeed_may_not_decide_what_flags_decide(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        check_config({"zero_optimization": {"stage": 2}} | config if config else config, "ds.json")
    assert str(error.value).startswith("ds.json: ")


def test_settings_for_speed_and_memory_are_accepted() -> None:
    zero = {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}}
    neutral = {"gradient_clipping": "auto", "gradient_accumulation_steps": 1, "fp16": {"enabled": "auto"}}
    check_config({"zero_optimization": zero, **neutral, "wall_clock_breakdown": True}, "ds.json")


@pytest.mark.parametrize(
    ("saved", "engine", "message"),
    [
        ((), "DEEPSPEED", "was not saved with DeepSpeed; start the run without it"),
        (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "MULTI_CPU", "was saved with DeepSpeed; start the run with"),
        (("zero_pp_rank_0_mp_rank_00_optim_states.pt",), "DEEPSPEED", "was saved by 1 processes; .*--num_processes 1"),
        (
            ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
            "DEEPSPEED",
            "was saved with ZeRO-1 or 2",
        ),
    ],
)
def test_another_engine_does_not_resume_a_checkpoint(
    tmp_path: Path, saved: tuple[str, ...], engine: str, message: str
) -> None:
    (tmp_path / "pytorch_model").mkdir()
    for name in saved:
        (tmp_path / "pytorch_model" / name).touch()
    plugin = SimpleNamespace(zero_stage=3)
    accelerator: Any = SimpleNamespace(distributed_type=engine, num_processes=2, deepspeed_plugin=plugin)
    with pytest.raises(UsageError, match=message):
        check_engine_state(tmp_path, accelerator)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a preset, and the run `ddp` in two processes without DeepSpeed."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    argv = arguments(folder, "ddp")
    write_preset(folder, logit_scale_max=BOUND)
    assert "on 2 x cpu, precision no\n" in train_in_processes(argv, 2, folder / "ddp.log")
    at_bound = [line["step"] for line in metrics_of(folder / "ddp") if line.get("logit_scale") == BOUND]
    assert len(at_bound) > 1, "the bound of the temperature is not tested"
    return folder


def arguments(folder: Path, output_dir: str, **values: Any) -> list[str]:
    return flags(folder, output_dir, **(SETTINGS | values))


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs logged the same, and exported the same weights."""
    for expected, found in zip(metrics_of(one), metrics_of(other), strict=True):
        for name in found.keys() & {
            "loss",
            "gradient_norm",
            "logit_scale",
            "head_learning_rate",
        }:  # no ranks, for ties
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (name, expected["step"])
    expected, found = (load_file(run / "export" / "model.safetensors") for run in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    MiniClipModel.from_pretrained(other / "export")


@pytest.mark.slow
def test_launch_file_trains_as_without_deepspeed(folder: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={LAUNCH_FILE}"]
    line = [*launcher, "--num_processes=2", str(ROOT / "train_miniclip.py"), *arguments(folder, "launched")]
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    result = subprocess.run(line, env=env, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 x cpu, precision no, DeepSpeed ZeRO-2\n" in result.stdout
    assert_same_run(folder / "ddp", folder / "launched")


def kill_and_resume(folder: Path, name: str, zero: dict[str, str], argv: list[str]) -> str:
    """Kill both processes of a run after nine steps or more, and resume it; returns the output of the second start."""
    processes = start_in_processes(argv, 2, folder / f"{name}.log", zero)
    deadline = time.monotonic() + 120
    log = folder / name / "metrics.jsonl"
    while not log.exists() or log.read_text().count('"split": "train"') < 9:
        assert time.monotonic() < deadline, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [-9, -9], "it ended before"
    return train_in_processes([*argv, "--resume_from_checkpoint=latest"], 2, folder / f"{name}-again.log", zero)


def zero_3(folder: Path) -> dict[str, str]:
    """Environment of a process of ZeRO-3, which would not spread parameters as small as these by default."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 500, "reduce_bucket_size": "auto"}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
    return ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json")}


@pytest.mark.slow
def test_killed_zero_3_run_resumes_as_without_deepspeed(folder: Path) -> None:
    output = kill_and_resume(folder, "killed", zero_3(folder), arguments(folder, "killed", chunk_size=2))
    assert "steps 8 to 20 of 8 images on 2 x cpu, precision no, DeepSpeed ZeRO-3\n" in output
    assert_same_run(folder / "ddp", folder / "killed")


@pytest.mark.long
def test_zero_3_blends_as_without_deepspeed(folder: Path) -> None:
    values = {"preset": None, "model_name_or_path": folder / "ddp" / "export", "blend": 0.3, "max_steps": 4}
    train_in_processes(arguments(folder, "blended-ddp", **values), 2, folder / "blended-ddp.log")
    train_in_processes(arguments(folder, "blended", **values), 2, folder / "blended.log", zero_3(folder))
    assert len([line for line in metrics_of(folder / "blended") if line["split"] == "blend"]) == 3
    assert_same_run(folder / "blended-ddp", folder / "blended")


@pytest.mark.long
@pytest.mark.parametrize("stage", ["1", "2"])
def test_killed_run_of_lower_stage_resumes_too(folder: Path, stage: str) -> None:
    zero = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    output = kill_and_resume(folder, f"zero{stage}", zero, arguments(folder, f"zero{stage}", chunk_size=2))
    assert f"steps 8 to 20 of 8 images on 2 x cpu, precision no, DeepSpeed ZeRO-{stage}\n" in output
    assert_same_run(folder / "ddp", folder / f"zero{stage}")


@pytest.mark.long
def test_bf16_with_deepspeed_computes_as_without_it(folder: Path) -> None:
    values = {"max_steps": 1, "mixed_precision": "bf16", "freeze": "vision"}  # later steps differ in their rounding
    train_in_processes(arguments(folder, "bf16-ddp", **values), 2, folder / "bf16-ddp.log")
    output = train_in_processes(arguments(folder, "bf16", **values), 2, folder / "bf16.log", ZERO_2)
    assert "precision bf16, DeepSpeed ZeRO-2\n" in output
    expected, found = (metrics_of(folder / name)[0] for name in ("bf16-ddp", "bf16"))
    for name in ("loss", "gradient_norm", "logit_scale"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
