"""Two machines, simulated by two launchers: training, an index, restarts after a loss, the Slurm script."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_miniclip import ImageIndex, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.run import TrainingRun
from tests.helpers.forks import fork, free_port, train_in_processes, write_to
from tests.helpers.indexes import write_pictures
from tests.helpers.runs import ROOT, assert_same_log, environment, flags, leave_out_figures
from tests.helpers.session import shared_once
from train_miniclip import main

VALUES: dict[str, Any] = {"max_steps": 4, "checkpointing_steps": 1}
GUIDE = (ROOT / "docs" / "several-machines.md").read_text(encoding="utf-8")

SCRIPT = """
import json, sys
from tests.training.test_machines import work
work(*map(json.loads, sys.argv[1:]))
"""


def work(training: list[str], index: list[str]) -> None:
    """What a process of both machines does: build an index, then train. Process `DIE` kills itself once at step 2."""
    save = TrainingRun.save_checkpoint

    def save_and_die(run: TrainingRun) -> None:
        save(run)
        if run.progress.step == 2 and os.environ["RANK"] == os.environ.get("DIE"):
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)

    patch = pytest.MonkeyPatch()
    patch.setattr(TrainingRun, "save_checkpoint", save_and_die)
    leave_out_figures(patch)
    assert cli(index) == 0
    main(training)
    place = [os.environ[name] for name in ("GROUP_RANK", "GROUP_WORLD_SIZE", "RANK", "WORLD_SIZE")]
    print("machine", *place, flush=True)


def launch_with_accelerate(number: int, port: int, log: Path, script: Path, arguments: list[str]) -> None:
    from accelerate.commands import launch

    write_to(log)
    os.environ |= environment() | {"ACCELERATE_USE_CPU": "true"}
    sys.argv = ["accelerate", *words_of_guide(number, port), str(script), *arguments]
    launch.main()


def launch_with_torch(port: int, log: Path, training: list[str], index: list[str]) -> None:
    """As torchrun does, with a fork for a new Python. Process 1 is lost once, and the run goes on by itself."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    write_to(log)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DIE": "1"}
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="test", rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}", max_restarts=1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, work)(training, index)


def words_of_guide(machine: int, port: int) -> list[str]:
    """Flags of `accelerate launch` for a machine, as in the guide."""
    lines = [shlex.split(line) for line in GUIDE.splitlines() if "--num_machines 2" in line and "cpu2.yaml" in line]
    words = lines[machine][2 : lines[machine].index("train_miniclip.py")]
    words[words.index("--main_process_port") + 1] = str(port)
    words[words.index("--config_file") + 1] = str(ROOT / words[words.index("--config_file") + 1])
    return words


@pytest.fixture(scope="session")
def one_machine(request: pytest.FixtureRequest, tiny_export: Path) -> Iterator[Path]:
    """Folder of a run `run` of two processes, an index `index` and the data of both. Read-only."""

    def build(folder: Path) -> None:
        train_in_processes(flags(folder, **VALUES), 2, folder / "log")
        write_pictures(folder / "photos", "a.png b.png c.png d.png e.png")
        update_index(folder / "index", [folder / "photos"], tiny_export, progress=False)

    yield from shared_once(request, "one machine", build)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torch"])
def test_two_machines_equal_two_processes_on_one(
    tmp_path: Path, one_machine: Path, tiny_export: Path, launcher: str
) -> None:
    training = flags(one_machine, str(tmp_path / "run"), **VALUES, resume_from_checkpoint="latest")
    index = ["index", str(tiny_export), str(one_machine / "photos"), "-o", str(tmp_path / "index")]
    port, machines = free_port(), []
    (tmp_path / "script.py").write_text(SCRIPT)
    for number in (0, 1):
        log = tmp_path / f"machine-{number}.log"
        if launcher == "accelerate":
            words = [json.dumps(training), json.dumps(index)]
            machines.append(fork(launch_with_accelerate, number, port, log, tmp_path / "script.py", words))
        else:
            machines.append(fork(launch_with_torch, port, log, training, index))
    for machine in machines:
        machine.join(200)
    printed = [(tmp_path / f"machine-{number}.log").read_text(errors="replace") for number in (0, 1)]
    assert [machine.exitcode for machine in machines] == [0, 0], printed

    places = sorted(re.findall(r"^machine (.*)", "\n".join(printed), re.MULTILINE))
    assert places == ["0 2 0 2", "1 2 1 2"]
    lost = re.findall(r"error: lost (process 1 of machine 1 .*)", printed[0])
    assert len(lost) == (launcher == "torch")
    if lost:
        assert f"{tmp_path / 'run' / 'checkpoints' / 'step-00000002'}; resume" in lost[0]
        own = [line for line in printed[0].splitlines() if "torch/distributed/" not in line]
        assert "resumed from" in printed[0] and not any("Traceback" in line for line in own)
    assert_same_log(one_machine / "run", tmp_path / "run")
    one, two = (folder / "run" / "export" / "model.safetensors" for folder in (one_machine, tmp_path))
    assert one.read_bytes() == two.read_bytes()
    expected, found = (ImageIndex.open(folder / "index") for folder in (one_machine, tmp_path))
    assert found.entries["id"] == expected.entries["id"]
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)


def test_slurm_script_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    (script,) = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for name, code in {"scontrol": "echo node-a; echo node-b", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    printed = subprocess.run(["bash", "-e", "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    option, program, *words = printed.splitlines()
    assert (option, program) == ("--kill-on-bad-exit=1", "torchrun")
    launch = get_args_parser().parse_args(words)
    assert (launch.nnodes, launch.rdzv_endpoint, launch.rdzv_id) == ("2", "node-a:29500", "7")
    assert launch.training_script == "train_miniclip.py"
    assert parse_arguments(launch.training_script_args).resume_from_checkpoint == "latest"
