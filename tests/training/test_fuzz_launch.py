"""Any launch: the run has the precision, the gradients and the processes that were asked for, or an error says why."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from hypothesis import given, reject
from hypothesis import strategies as st

from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.launch import Launch, Launcher, read_launch
from modeling_miniclip.training.publish import full_state_dict
from modeling_miniclip.training.run import TrainingRun
from modeling_miniclip.training.setup import build_accelerator
from tests.helpers.fuzzing import cases, fuzz, result_or_error

PRECISIONS = ("no", "bf16", "fp8", "fp16")
FLAGS = {
    "mixed_precision": st.sampled_from(PRECISIONS[:3]),
    "num_processes": st.integers(1, 3),
    "num_machines": st.integers(1, 2),
    "gradient_accumulation_steps": st.integers(1, 4),
    "dynamo_backend": st.sampled_from(("no", "eager", "ofi")),
    "dynamo_mode": st.sampled_from(("default", "max-autotune")),
    "gradient_clipping": st.just(1.0),
    "fsdp_version": st.sampled_from(("1", "2")),
}
UNSUPPORTED = {"use_fsdp", "fsdp_version", "use_megatron_lm", "dynamo_use_regional_compilation", "gradient_clipping"}
SWITCHES = ("cpu", "multi_gpu", "use_fsdp", "use_megatron_lm", "dynamo_use_dynamic", "dynamo_use_regional_compilation")
LAUNCH_FILES = st.none() | st.fixed_dictionaries(
    {
        "distributed_type": st.sampled_from(("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")),
        "num_processes": st.integers(1, 3),
    },
    optional={
        "mixed_precision": st.sampled_from(PRECISIONS),
        "use_cpu": st.booleans(),
        "downcast_bf16": st.just("no"),
        "dynamo_config": st.fixed_dictionaries({"dynamo_backend": st.sampled_from(("NO", "EAGER"))}),
    },
)
VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": st.sampled_from(PRECISIONS),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": st.sampled_from("14"),
    "ACCELERATE_DYNAMO_BACKEND": st.sampled_from(("NO", "EAGER")),
    "ACCELERATE_USE_CPU": st.sampled_from(("true", "false")),
    "ACCELERATE_DOWNCAST_BF16": st.sampled_from(("no", "true")),
    "WORLD_SIZE": st.sampled_from("12"),
}


def at_most(number: int, options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of a few options: with many, one of them is nearly always an error."""
    names = st.lists(st.sampled_from(sorted(options)), unique=True, max_size=number)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: options[name] for name in chosen}))


def environment_of_process(words: list[str]) -> dict[str, str]:
    """What Accelerate's own launcher passes on, started in this environment; a launch that it refuses is not tried."""
    try:
        arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        if arguments.main_process_ip is None:
            arguments.main_process_ip, arguments.main_process_port = "127.0.0.1", 29500
        engines = (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed, arguments.use_megatron_lm)
        environment = dict(prepare_simple_launcher_cmd_env(arguments)[1])
    except (ValueError, RuntimeError, SystemExit):
        reject()
    if any(engines) and not arguments.cpu:
        machines = max(arguments.num_machines or 1, 1)
        if arguments.num_processes < machines:  # as on a machine without GPUs: it starts none
            reject()
        environment["WORLD_SIZE"] = str(arguments.num_processes // machines * machines)
    return environment


def trained_gradient(launch: Launch, own: str | None) -> tuple[str, list[str], torch.Tensor]:
    """Precision, names of the weights, and gradient of a step of a tiny model, as a run takes it."""
    launch.check(launch.on_cpu or not torch.accelerator.is_available(), own)
    accelerator = build_accelerator(TrainingArguments(mixed_precision=cast(Any, own)), launch)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    prepared = accelerator.prepare(model)
    accelerator.backward(prepared(torch.ones(3, 2)).sum())
    run = cast(TrainingRun, SimpleNamespace(accelerator=accelerator, model=prepared, unwrapped_model=model))
    return accelerator.mixed_precision, list(full_state_dict(run)), cast(torch.Tensor, model.weight.grad)


@cases(80, 3000)
def test_any_launch_is_as_asked_or_an_error(tmp_path: Path, record_property: Any, count: int) -> None:
    path = tmp_path / "launch.yaml"

    @fuzz(count, record_property)
    @given(
        flags=st.none() | at_most(3, FLAGS),
        switches=st.lists(st.sampled_from(SWITCHES), unique=True, max_size=2),
        file=LAUNCH_FILES,
        variables=at_most(2, VARIABLES),
        own=st.sampled_from((None, "no", "bf16")),
    )
    def check(flags: Any, switches: Any, file: Any, variables: Any, own: str | None) -> None:
        with patch.dict(os.environ, variables):
            launcher = None
            if flags is not None:  # otherwise without a launcher
                words = [f"--{name}={value}" for name, value in flags.items()] + [f"--{name}" for name in switches]
                if file is not None:
                    path.write_text(yaml.safe_dump(file), encoding="utf-8")
                    words.append(f"--config_file={path}")
                launcher = Launcher([*words, "train.py"], dict(os.environ))
                os.environ.update(environment_of_process(launcher.words))
            flags, file = flags or {}, (file or {}) if flags is not None else {}
            launch = read_launch(os.environ, launcher)
            asked = max(flags.get("num_processes", file.get("num_processes", 1)), flags.get("num_machines", 1))
            found, message = result_or_error(trained_gradient, launch, own)
        precisions = (own, flags.get("mixed_precision"), file.get("mixed_precision"))
        expected = next(filter(None, precisions), None) or variables.get("ACCELERATE_MIXED_PRECISION", "no")
        if found is None:
            assert any(words in message for words in ("not supported", "--", "use ", "not joined"))
            assert "not joined" not in message or launch.processes >= max(asked, 2)
            return
        precision, names, gradient = found
        assert asked == launch.processes == 1
        assert precision == expected
        assert names == ["weight", "bias"]
        assert gradient.tolist() == [[3.0, 3.0]]
        assert flags.get("gradient_accumulation_steps", 1) == 1
        if launcher is not None:
            assert not UNSUPPORTED & {*switches, *flags}
        assert variables.get("ACCELERATE_DOWNCAST_BF16") != "true" or "downcast_bf16" in file

    PartialState(cpu=True)  # one process, which is joined with no other whatever the environment says
    with torch.compiler.set_stance("force_eager"):
        check()
    AcceleratorState._reset_state()


@pytest.mark.parametrize("flags", [{"mixed_precision": "bf16"}])
def test_reference_passes_on_what_was_asked(flags: dict[str, str]) -> None:
    words = [f"--{name}={value}" for name, value in flags.items()]
    assert environment_of_process([*words, "--cpu", "train.py"])["ACCELERATE_MIXED_PRECISION"] == "bf16"
