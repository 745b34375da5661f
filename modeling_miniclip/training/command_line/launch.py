"""What the launcher was given: its command line, launch file and environment, read in one place.

`accelerate launch` passes on less than it was given: it starts one process where it was asked for two, drops the
options of an engine that is not in use, and sets "no" as precision if nobody asked for one. So this module reads the
launcher's own command line. Where that is impossible, the environment has to do.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError
from .launch_settings import NO_FP8, ONLY_FSDP_1, find_setting

# Values that ask for nothing.
NEUTRAL = frozenset(("", "none", "no", "false", "0", "[]", "{}", "default"))

# Variables that are named unlike the option whose value they have. All others are the option with a prefix.
VARIABLES = {
    "ACCELERATE_USE_CPU": "cpu",
    "ACCELERATE_CPU_AFFINITY": "enable_cpu_affinity",
    "ACCELERATE_DEBUG_MODE": "debug",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_USE_SAGEMAKER": "aws_profile",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
}
PREFIXES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_", "")

# Options that select an engine; each `distributed_type` of a launch file stands for one.
ENGINES = {"FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed", "MEGATRON_LM": "use_megatron_lm", "XLA": "tpu"}

# Variables with the number of processes: of torchrun and accelerate, and of MPI's launchers.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Asked(NamedTuple):
    """The value of a setting, and where it was given, as a message names it."""

    value: str
    place: str


class Launcher(NamedTuple):
    """The process of `accelerate launch` that started this one.

    Args:
        words: words after `launch` on its command line.
        environment: its environment variables; None if they cannot be read.
        folder: its working folder.
    """

    words: list[str]
    environment: Mapping[str, str] | None = None
    folder: Path = Path()


@dataclass(frozen=True)
class Launch:
    """The settings that the launcher of this process was given.

    Args:
        settings: each by its name in `accelerate launch`; the command line counts more than the launch file, and that
            more than the environment. Settings that ask for nothing are left out.
        processes: number of processes that the environment of this one names.
    """

    settings: dict[str, Asked] = field(default_factory=dict)
    processes: int = 1

    def value(self, name: str) -> str | None:
        """Value of a setting in lower case; None if it was not given."""
        return self.settings[name].value.lower() if name in self.settings else None

    @property
    def on_cpu(self) -> bool:
        """Whether the run was asked to use the CPU."""
        return "cpu" in self.settings

    @property
    def mixed_precision(self) -> str | None:
        """The precision that was asked for; None if nobody did."""
        return self.value("mixed_precision")

    def check_processes(self) -> None:
        """Check that as many processes were started as the launcher was asked for.

        Raises:
            UsageError: fewer were started; the message says how to start them.
        """
        for name in ("num_processes", "num_machines"):
            asked = self.settings.get(name)
            if asked is not None and asked.value.isdecimal() and int(asked.value) > self.processes:
                raise UsageError(
                    f"{asked.place}: accelerate launch started only {self.processes}. It starts several on CPUs with "
                    "--config_file configuration/accelerate/cpu2.yaml (distributed_type: MULTI_GPU and use_cpu: true, "
                    "without --cpu), and on GPUs with multi_gpu.yaml or --multi_gpu"
                )

    def check_joined(self, processes: int) -> None:
        """Check that Accelerate has joined as many processes as the environment names.

        Raises:
            UsageError: this process would work alone.
        """
        if processes != self.processes:
            raise UsageError(
                f"the environment names {self.processes} processes, but this one is not joined with others; start "
                "them with accelerate launch or torchrun"
            )

    def check(self, on_cpu: bool, precision: str | None) -> None:
        """Check that every setting can be used.

        Args:
            on_cpu: whether the run will use the CPU, asked for or not.
            precision: `--mixed_precision` of the training script, which counts more than the launcher's.

        Raises:
            UsageError: one cannot; the message says what to use instead.
        """
        for name, asked in self.settings.items():
            setting = find_setting(name)
            if setting is not None and setting.instead:
                raise UsageError(f"{asked.place} is not supported; {setting.instead}")
            if setting is not None and setting.needs and setting.needs not in self.settings:
                raise UsageError(f"{asked.place} has no effect without --{setting.needs}; add it, or leave this out")
        if on_cpu and "use_fsdp" in self.settings:
            raise UsageError(
                f"{self.settings['use_fsdp'].place}: FSDP needs GPUs, on CPUs Accelerate would use "
                "DistributedDataParallel; use configuration/accelerate/cpu2.yaml"
            )
        if "use_fsdp" in self.settings and self.value("fsdp_version") != "2":
            raise UsageError(f"{self.settings['use_fsdp'].place}: only version 2 is supported; add --fsdp_version 2")
        if "use_fsdp" in self.settings and "dynamo_backend" in self.settings:
            raise UsageError(f"{self.settings['dynamo_backend'].place} does not work with FSDP; leave it out")
        backend = self.value("dynamo_backend")
        if backend is not None and backend not in known_backends():
            raise UsageError(
                f"{self.settings['dynamo_backend'].place}: torch.compile has no such backend here; choose another"
            )
        if precision is None and self.mixed_precision == "fp8":
            raise UsageError(f"{self.settings['mixed_precision'].place} is not supported; {NO_FP8}")
        if on_cpu and (precision or self.mixed_precision) == "fp16":
            place = "--mixed_precision fp16" if precision else self.settings["mixed_precision"].place
            raise UsageError(f"{place} needs a GPU: on a CPU, Accelerate would use full precision; use bf16 or no")
        self.check_processes()


def known_backends() -> list[str]:
    """Backends of `torch.compile`."""
    import torch

    return torch.compiler.list_backends(exclude_tags=())


def read_launch(environment: Mapping[str, str] = os.environ, launcher: Launcher | None = None) -> Launch:
    """Read the settings of the launcher that started this process.

    Args:
        environment: environment variables of this process.
        launcher: process of `accelerate launch`; by default it is looked for among this one's parents.

    Raises:
        UsageError: the launch file cannot be read.
    """
    launcher = launcher or find_launcher()
    variables = environment
    if launcher is not None and launcher.environment is not None:
        variables = launcher.environment  # it overwrites some for this process, with defaults
    settings = dict(_read_environment(variables))
    if launcher is None or launcher.environment is None:
        started_by_launcher = "ACCELERATE_DYNAMO_MODE" in environment or "FORK_LAUNCHED" in environment
        if started_by_launcher and variables.get("ACCELERATE_MIXED_PRECISION") == "no":
            settings.pop("mixed_precision", None)  # a launcher's default
    if launcher is not None:
        given, options = _parse(launcher.words)
        file = _launch_file(options, launcher.folder)
        if file is not None:
            settings |= dict(_read_launch_file(file, given))
        settings |= {name: Asked(str(value), _flag(name, value)) for name, value in given.items()}
    processes = next((int(environment[name]) for name in WORLD_SIZES if environment.get(name, "").isdecimal()), 1)
    return Launch({name: asked for name, asked in settings.items() if _asks_for_something(name, asked)}, processes)


def _flag(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def _asks_for_something(name: str, asked: Asked) -> bool:
    if name == "mixed_precision" and asked.value.lower() == "no":
        return True
    setting = find_setting(name)
    neutral = asked.value.lower() in NEUTRAL or (setting is not None and setting.instead and asked.value == "1")
    return setting is not None and not neutral


def find_launcher() -> Launcher | None:
    """The process of `accelerate launch` among the parents of this one; None if there is none or it is hidden."""
    try:
        import psutil

        for parent in psutil.Process().parents():
            words = launch_words(parent.cmdline())
            if words is not None:
                return Launcher(words, _environment_of(parent), Path(parent.cwd()))
    except Exception:  # no such package on this platform, or no permission
        return None
    return None


def _environment_of(process: Any) -> Mapping[str, str] | None:
    try:
        return dict(process.environ())
    except Exception:  # not on this platform
        return None


def launch_words(command: Sequence[str]) -> list[str] | None:
    """The words after `accelerate launch` on a command line; None for another command."""
    for i, word in enumerate(command[:4]):
        name = Path(word).name.removesuffix(".exe")
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(command[i + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[i + 1 : i + 2] == ["launch"]:
            return list(command[i + 2 :])
    return None


def _parse(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that were given on the launcher's command line, and all options with their defaults."""
    from accelerate.commands.launch import launch_command_parser

    namespace = vars(launch_command_parser().parse_args(words))
    given = namespace.pop("nondefault", set()) - {"training_script", "training_script_args"}
    return {name: namespace[name] for name in sorted(given)}, namespace


def _launch_file(options: dict[str, Any], folder: Path) -> Path | None:
    """The launch file that `accelerate launch` read: the one that was named, else the default one unless `--cpu`."""
    from accelerate.commands.config.config_args import default_config_file

    if options["config_file"] is not None:
        return folder / options["config_file"]
    return Path(default_config_file) if os.path.isfile(default_config_file) and not options["cpu"] else None


def _read_launch_file(path: Path, given: Mapping[str, Any]) -> Iterator[tuple[str, Asked]]:
    """Settings in a launch file; `given` are those of the command line."""
    import yaml  # reads JSON too

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: the launch file of accelerate cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: the launch file of accelerate must be a mapping of settings to values")
    for key, value in content.items():
        entries = {key: value}
        if key.endswith("_config") and isinstance(value, dict):
            prefix = key.removesuffix("config") if key != "deepspeed_config" and key != "mpirun_config" else ""
            entries = {name if name.startswith(prefix) else prefix + name: v for name, v in value.items()}
        for name, entry in entries.items():
            yield name, Asked(str(entry), f"{name}: {entry} in {path}")
    kind = str(content.get("distributed_type", "NO"))
    place = f"distributed_type: {kind} in {path}"
    if str(content.get("use_cpu", False)).lower() == "true":
        yield "cpu", Asked("true", f"use_cpu: true in {path}")
    if kind in ENGINES and not {*ENGINES.values(), "multi_gpu"} & given.keys():
        yield ENGINES[kind], Asked("true", place)


def _read_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Asked]]:
    """Settings in environment variables, by their names in `accelerate launch`."""
    for variable, value in environment.items():
        if not variable.startswith(("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")):
            continue
        name = VARIABLES.get(variable)
        for prefix in PREFIXES:
            if name is None and variable.startswith(prefix) and find_setting(variable[len(prefix) :].lower()):
                name = variable[len(prefix) :].lower()
        if name is not None and name not in ONLY_FSDP_1.split():  # the launcher sets these whatever it was given
            yield name, Asked(value, f"{variable}={value}")
