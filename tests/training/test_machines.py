"""Two machines, simulated by two launchers: training, an index, restarts after a loss, the Slurm script."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_miniclip import ImageIndex, update_index
from modeling_miniclip.training.parsing import parse_arguments
from tests.helpers.forks import fork, free_port, train_in_processes, write_to
from tests.helpers.indexes import write_pictures
from tests.helpers.runs import ROOT, assert_same_log, environment, flags

GUIDE = (ROOT / "docs" / "several-machines.md").read_text(encoding="utf-8")

# A process of both machines: builds an index, then trains. With DIE set, process 1 kills itself after step 2, once.
WORKER = """
import json, os, signal, sys
from modeling_miniclip.cli import cli
from modeling_miniclip.training.run import TrainingRun
from tests.helpers.runs import leave_out_figures
from train_miniclip import main
import pytest

save = TrainingRun.save_checkpoint

def save_and_die(run):
    save(run)
    if run.progress.step == 2 and os.environ["RANK"] == os.environ.get("DIE"):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

TrainingRun.save_checkpoint = save_and_die
leave_out_figures(pytest.MonkeyPatch())
training, index = map(json.loads, sys.argv[1:])
assert cli(index) == 0
main(training)
print("machine", *(os.environ[name] for name in ("GROUP_RANK", "GROUP_WORLD_SIZE", "RANK", "WORLD_SIZE")), flush=True)
"""


def start_launcher(module: str, words: list[str], env: dict[str, str], log: Path) -> None:
    from importlib import import_module

    write_to(log)
    os.environ |= env
    sys.argv = [module, *words]
    import_module(module).main()


def words_of_guide(machine: int, port: int) -> list[str]:
    """Flags of `accelerate launch` for a machine, as in the guide."""
    lines = [shlex.split(line) for line in GUIDE.splitlines() if "--num_machines 2" in line and "cpu2.yaml" in line]
    words = lines[machine][2 : lines[machine].index("train_miniclip.py")]
    words[words.index("--main_process_port") + 1] = str(port)
    words[words.index("--config_file") + 1] = str(ROOT / words[words.index("--config_file") + 1])
    return words


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines_equal_two_processes_on_one(tmp_path: Path, tiny_export: Path, launcher: str) -> None:
    values: dict[str, Any] = {"max_steps": 4, "checkpointing_steps": 1}
    train_in_processes(flags(tmp_path, "one", **values), 2, tmp_path / "one.log")
    write_pictures(tmp_path / "photos", "a.png b.png c.png d.png e.png")
    update_index(tmp_path / "one.index", [tmp_path / "photos"], tiny_export, progress=False)

    (tmp_path / "worker.py").write_text(WORKER)
    training = flags(tmp_path, "two", **values, resume_from_checkpoint="latest")
    index = ["index", str(tiny_export), str(tmp_path / "photos"), "-o", str(tmp_path / "two.index")]
    port, env = free_port(), environment() | {"ACCELERATE_USE_CPU": "true"}
    machines = []
    for number in (0, 1):
        if launcher == "accelerate":
            module, words = "accelerate.commands.launch", words_of_guide(number, port)
        else:  # process 1 is lost once, and the run goes on by itself
            module, env["DIE"] = "torch.distributed.run", "1"
            words = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=test",
                     f"--rdzv-endpoint=127.0.0.1:{port}"]  # fmt: skip
        words = [*words, str(tmp_path / "worker.py"), json.dumps(training), json.dumps(index)]
        machines.append(fork(start_launcher, module, words, env, tmp_path / f"machine-{number}.log"))
    for machine in machines:
        machine.join(200)
    printed = [(tmp_path / f"machine-{number}.log").read_text(errors="replace") for number in (0, 1)]
    assert [machine.exitcode for machine in machines] == [0, 0], printed

    places = sorted(re.findall(r"^machine (.*)", "\n".join(printed), re.MULTILINE))
    assert places == ["0 2 0 2", "1 2 1 2"]
    lost = re.findall(r"error: lost (process 1 of machine 1 .*)", printed[0])
    assert len(lost) == (launcher == "torchrun")
    if lost:
        assert f"{tmp_path / 'two' / 'checkpoints' / 'step-00000002'}; resume" in lost[0]
        assert "resumed from" in printed[0] and "Traceback" not in printed[0]
    assert_same_log(tmp_path / "one", tmp_path / "two")
    one, two = (tmp_path / name / "export" / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    expected, found = (ImageIndex.open(tmp_path / f"{name}.index") for name in ("one", "two"))
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
