"""Print what a record was made with: commit, processor, cores, memory and torch, as JSON."""

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil
import torch

from modeling_miniclip.utils.processes import usable_cpus

ROOT = Path(__file__).resolve().parent.parent


def made_with() -> dict[str, str | int]:
    """Commit of the code ("+" if files have been changed since), and the machine."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "processor": _processor(),
        "cores": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__.split("+")[0],
    }


def _git(*argv: str) -> str:
    done = subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(made_with()))
