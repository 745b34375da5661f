"""What has to be seen on a GPU, in one command of at most eight minutes: prints a table and what failed.

    python benchmarks/gpu.py > benchmarks/gpu.md    # Flickr8k and two towers are in ../shared, or see --shared
    python benchmarks/gpu.py --small                # all of it on the CPU with tiny towers: two minutes

Nothing is downloaded: EfficientNet-Lite0 and MiniLM come from the shared folder, ResNet-50 and DistilBERT have random
weights, which does not change their speed. Each part runs in a process of `gpu_parts.py`, so that an error costs only
that part; parts for which no time is left are named. The exit code is 1 if anything failed. With --small, nothing is
compiled and nothing runs in fp16, which the CPU does not need or cannot do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_setup import SMALL, Setup, full_setup, write_files

HERE = Path(__file__).resolve().parent
SECONDS = 480.0
OK = {True: "yes", False: "**no**", None: ""}


def parts_of(setup: Setup) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of all parts, the most important first: time may run out."""
    training = [
        ("train", {"pair": pair, "batch_size": batch_size, "chunk_size": chunk_size, "compiled": compiled})
        for compiled in (False, True)
        for batch_size, chunk_size in setup.batches
        for pair in setup.pairs
    ]
    plain = [("plain", {"pair": pair, "batch_size": setup.batches[0][0]}) for pair in setup.pairs]
    first: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ("agreement", "resume", "memory", "loss")]
    eager = len(training) // 2
    return [*first, *training[:eager], *plain, ("search", {}), *training[eager:]]


def run_part(name: str, arguments: dict[str, Any], setup: Setup, seconds: float) -> list[dict[str, Any]]:
    """Rows of a part's table; one row with the error if it fails or takes too long."""
    argv = [sys.executable, str(HERE / "gpu_parts.py"), name, json.dumps(arguments), json.dumps(asdict(setup))]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
    if setup.on_cpu:
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    title = " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return [{"what": title, "found": f"not done within {seconds:.0f} s", "ok": False}]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(f"{title}:", *lines[-30:], sep="\n", file=sys.stderr)
        return [{"what": title, "found": f"failed: {lines[-1]}", "ok": False}]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def describe_machine(setup: Setup) -> str:
    """One line about the machine."""
    import torch

    device = "CPU"
    if not setup.on_cpu and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        device = torch.cuda.get_device_name() if kind is not None and kind.type == "cuda" else str(kind)
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"


def main(argv: list[str] | None = None) -> int:
    """Run all parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("MINICLIP_SHARED", HERE.parents[1] / "shared"))
    parser.add_argument("--small", action="store_true", help="tiny towers and few steps, on the CPU")
    parser.add_argument("--shared", type=Path, default=shared, help=f"folder of Flickr8k and the towers ({shared})")
    parser.add_argument("--only", nargs="+", metavar="PART", help="such as agreement, resume or train")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time for all parts ({SECONDS:.0f})")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        setup = write_files(SMALL if args.small else full_setup(args.shared), Path(folder))
        print(f"# On one device\n\nWritten by `benchmarks/gpu.py`: {describe_machine(setup)}.\n", flush=True)
        print("| what | found | as it should be |\n|---|---|---|", flush=True)
        for name, arguments in parts_of(setup):
            if args.only and name not in args.only:
                continue
            left = end - time.monotonic()
            rows: list[dict[str, Any]] = [{"what": f"{name} {arguments}", "found": "no time was left", "ok": False}]
            if left > 5:
                rows = run_part(name, arguments, setup, left)
            for row in rows:
                print(f"| {row['what']} | {row['found']} | {OK[row['ok']]} |", flush=True)
            failed += [row["what"] for row in rows if row["ok"] is False]
    print(f"\nFailed: {'; '.join(failed)}." if failed else "\nNothing failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
