"""The loopback Hub from the folder of shared data, and client processes of it."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import warm_process
from tests.helpers.runs import shared_folder

Completed = subprocess.CompletedProcess[str]

# Put before a client's code: the process then cannot import the package, be it installed or not.
WITHOUT_PACKAGE = "import sys; sys.modules['modeling_miniclip'] = None\n"


# Alice may write and has a token that may only read; Bob may write too.
TOKENS = ("hf_alice=alice", "hf_reader=alice:read", "hf_bob=bob")


def local_hub(root: Path, tokens: tuple[str, ...] = TOKENS) -> Any:
    """A Hub on loopback, not started yet. Skips the test where `tools/local_hub.py` is not there."""
    path = shared_folder() / "tools" / "local_hub.py"
    if not path.is_file():
        pytest.skip(f"no Hub on loopback at {path}: set MINICLIP_SHARED")
    spec = importlib.util.spec_from_file_location("local_hub", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module.LocalHub(root, tokens=tokens)


def add_repository(hub: Any, repo_id: str, files: dict[str, Path] | None = None, private: bool = False) -> None:
    """A model repository with these files, of its namespace's user."""
    author = repo_id.split("/")[0]
    hub.store.create("model", repo_id, private, author, sdk=None)
    if files:
        entries = {}
        for name, path in files.items():
            with path.open("rb") as file:
                sha256 = hub.store.put(iter(lambda: file.read(1 << 20), b""))  # noqa: B023
            large = name.endswith(".safetensors")
            entries[name] = hub.store.lfs(sha256) if large else hub.store.regular(path.read_bytes())
        repo = hub.store.repo("model", repo_id)
        head = repo["refs"]["refs/heads/main"]
        hub.store.commit(repo, "refs/heads/main", head, entries, author, "add files")


def run(code_or_argv: str | list[str], cwd: Path, *arguments: str, **env: str) -> Completed:
    """Run Python in another process and folder, away from the checkout and from this process's offline mode.

    Code runs in a fork of a process that has imported torch, timm and transformers, to save their import. Arguments
    start a new Python.

    Args:
        code_or_argv: code to run as `python -c` does, or all arguments of Python.
        cwd: working folder, whose subfolder `home` becomes HF_HOME.
        *arguments: further arguments, for `sys.argv` of the code.
        **env: further environment variables; `PYTHONPATH` is unset unless given.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH", "HF_TOKEN")}
    env = inherited | {"HF_HOME": str(cwd / "home")} | env
    if isinstance(code_or_argv, str) and hasattr(os, "fork"):
        return _run_warm(code_or_argv, arguments, cwd, env)
    argv = [sys.executable, *(["-c", code_or_argv] if isinstance(code_or_argv, str) else code_or_argv), *arguments]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def _run_warm(code: str, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> Completed:
    """Run code in a fork of the warm process; arguments as in [`run`], but `env` is the whole environment."""
    process = _warm_process()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdout", "stderr")}
        request = {"code": code, "arguments": arguments, "cwd": str(cwd), "env": env}
        request |= {name: str(path) for name, path in files.items()}
        process.requests.write(json.dumps(request) + "\n")
        process.requests.flush()
        ready, _, _ = select.select([process.answers], [], [], 300)
        if not ready:
            os.kill(process.pid, signal.SIGKILL)
            warm_process.forked = None
            _warm_process.cache_clear()
            raise subprocess.TimeoutExpired(code, 300)
        returncode = int(process.answers.readline())
        texts = (path.read_text(encoding="utf-8") for path in files.values())
        return subprocess.CompletedProcess(["python", "-c", code], returncode, *texts)


@cache
def _warm_process() -> warm_process.Pipes:
    """The warm process of this worker, else a new one; it ends together with this process, when its pipe is closed."""
    if warm_process.forked is not None:
        return warm_process.forked
    script = Path(__file__).with_name("warm_process.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd="/", env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    return warm_process.Pipes(process.pid, process.stdin, process.stdout)
