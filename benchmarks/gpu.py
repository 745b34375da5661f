"""What has to be seen on a GPU, in one command of at most eight minutes: prints a table and what failed.

    python benchmarks/gpu.py > benchmarks/gpu.md    # Flickr8k and two towers are in ../shared, or see --shared
    python benchmarks/gpu.py --small                # all of it on the CPU with tiny towers: two minutes

Nothing is downloaded: EfficientNet-Lite0 and MiniLM come from the shared folder, ResNet-50 and DistilBERT have random
weights, which does not change their speed. Each part runs in a process of `gpu_parts.py`, so that an error costs only
that part, and has a time limit of its own. The exit code is 1 if anything failed or there was no time for it; only
compiled towers, which come last, may be left out. With --small, nothing is compiled and nothing runs in fp16, which
the CPU does not need or cannot do.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_setup import SMALL, Setup, full_setup, write_files

HERE = Path(__file__).resolve().parent
SECONDS = 480.0
PART_SECONDS = 120.0  # at most, so that one that hangs leaves time for the others
TOWERS = ("vision_model", "text_model")
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
    title = title_of(name, arguments)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # A session of its own: the processes that a part has started end with it.
        process = subprocess.Popen(argv, stdout=output, stderr=errors, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return [{"what": title, "found": f"not done within {seconds:.0f} s", "ok": False}]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed, complaints = ((file.seek(0), file.read())[1].strip().splitlines() for file in (output, errors))
    if code:
        print(f"{title}:", *complaints[-30:], sep="\n", file=sys.stderr)
        return [{"what": title, "found": f"failed: {error_in(complaints) or f'exit code {code}'}", "ok": False}]
    rows: list[dict[str, Any]] = json.loads(printed[-1])
    return rows


def title_of(name: str, arguments: dict[str, Any]) -> str:
    """A part and its arguments in words."""
    return " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def error_in(lines: list[str]) -> str:
    """The last line that names an error, or else the last one: warnings may follow it."""
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1]


def check_machine(setup: Setup, shared: Path) -> None:
    """End with a message if there is no GPU, or the data or a tower is missing."""
    import torch

    if not torch.accelerator.is_available():
        sys.exit("no GPU that this torch can use: install a torch for it, or pass --small to try all parts on the CPU")
    folders = [setup.data["dataset"], *(flags[name] for flags in setup.pairs.values() for name in TOWERS
                                        if name in flags)]  # fmt: skip
    missing = [folder for folder in folders if not Path(folder).exists()]
    if missing:
        sys.exit(f"{missing[0]} does not exist, --shared is {shared}; set MINICLIP_SHARED or pass --shared")


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
    chosen = SMALL if args.small else full_setup(args.shared)
    if not args.small:
        check_machine(chosen, args.shared)
    with tempfile.TemporaryDirectory() as folder:
        setup = write_files(chosen, Path(folder))
        print(f"# On one device\n\nWritten by `benchmarks/gpu.py`: {describe_machine(setup)}.\n", flush=True)
        print("| what | found | as it should be |\n|---|---|---|", flush=True)
        for name, arguments in parts_of(setup):
            if args.only and name not in args.only:
                continue
            left, ok = end - time.monotonic(), None if arguments.get("compiled") else False
            rows: list[dict[str, Any]] = [{"what": title_of(name, arguments), "found": "no time was left", "ok": ok}]
            if left > 5:
                rows = run_part(name, arguments, setup, min(left, PART_SECONDS))
            for row in rows:
                print(f"| {row['what']} | {row['found']} | {OK[row['ok']]} |", flush=True)
            failed += [row["what"] for row in rows if row["ok"] is False]
    print(f"\nFailed: {'; '.join(failed)}." if failed else "\nNothing failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
