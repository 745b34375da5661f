"""Measure speed as ratios between two sides that take turns, each in a separate process.

    python benchmarks/speed.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM [--only encode loader]

FLICKR8K is a folder with Images/ and captions; LITE0 and MINILM are folders of EfficientNet-Lite0 and
all-MiniLM-L6-v2, or their names on the Hub. Replaces the lines of the measured groups in `speed.jsonl` and writes
`speed.md` from it. `workloads.py` and `plain_loop.py` define what each side does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "speed.jsonl"


@dataclass(frozen=True)
class Group:
    """Sides that are measured in turns: workloads, or command lines that are timed."""

    sides: dict[str, list[str]]
    flags: tuple[str, ...] = ()
    repetitions: int = 5


def _workloads(*names: str) -> dict[str, list[str]]:
    return {name: [str(HERE / "workloads.py"), name] for name in names}


COMMANDS = {
    "nothing": ["-c", "pass"],
    "import": ["-c", "import modeling_miniclip"],
    "help": ["-m", "modeling_miniclip", "--help"],
}
TRAINING = _workloads("train_plain", "train_package")
GROUPS = {
    "train_1": Group(TRAINING, ("--captions_per_image=1",)),
    "train_5": Group(TRAINING, ("--captions_per_image=5",)),
    "encode": Group(_workloads("encode_timm", "encode_timm_tuned", "encode_package", "encode_no_reading")),
    "loader": Group(_workloads("load_bare", "load_package", "load_bare_large", "load_package_large")),
    "start": Group(COMMANDS, repetitions=15),
    "race": Group(_workloads("race_plain", "race_package"), repetitions=1),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: a number from two sides, how to compare them, and the target."""

    group: str
    what: str
    number: str
    sides: tuple[str, str]
    target: str
    compare: Callable[[float, float], float] = field(default=lambda other, own: own / other)
    unit: str = "x"


def _percent(_: float, own: float) -> float:
    return own


def _beyond(other: float, own: float) -> float:
    return own - other


ROWS = [
    *(
        Row(f"train_{captions}", f"training, {name}, {captions} captions per image".replace("1 captions", "1 caption"),
            f"{name}_per_second", ("train_plain", "train_package"), target)
        for captions, name, target in ((1, "pairs", "1.5"), (1, "images", ""), (5, "pairs", "4"), (5, "images", ""))
    ),
    Row("encode", "`encode_images`, images, against the bare tower with default settings", "images_per_second",
        ("encode_timm", "encode_package"), "1.5"),
    Row("encode", "`encode_images`, against the tower with the same settings", "images_per_second",
        ("encode_timm_tuned", "encode_package"), "0.97"),
    Row("encode", "`encode_images`, against the tower without reading", "images_per_second",
        ("encode_no_reading", "encode_package"), ""),
    Row("loader", "training loader, images, against bare decoding, augmentation and tokenization", "images_per_second",
        ("load_bare", "load_package"), "0.9"),
    Row("loader", "training loader, with images of 500 x 375 pixels", "images_per_second",
        ("load_bare_large", "load_package_large"), "0.9"),
    Row("train_1", "time of a step spent waiting for data, %", "waiting_percent", ("train_plain", "train_package"),
        "below 5", _percent, "%"),
    Row("start", "`import modeling_miniclip`, s more than starting Python", "seconds", ("nothing", "import"),
        "below 0.3", _beyond, "s"),
    Row("start", "`miniclip --help`, s", "seconds", ("nothing", "help"), "below 0.5", _percent, "s"),
    Row("race", "seconds until text-to-image R@10 exceeds 50 %, at any step", "seconds",
        ("race_plain", "race_package"), "", lambda other, own: other / own),
    Row("race", "seconds until the end of the first epoch that exceeds it", "epoch_seconds",
        ("race_plain", "race_package"), "8", lambda other, own: other / own),
]  # fmt: skip
HEAD = """# Speed

Written by `benchmarks/speed.py`: medians of repetitions. The two sides take turns, each in its own process, and are
compared within each turn. EfficientNet-Lite0 and all-MiniLM-L6-v2, Flickr8k, {threads} threads, torch
{torch}.

| what, per second unless stated otherwise | other side | MiniCLIP | ratio or difference | target | turns |
|---|---|---|---|---|---|
"""
TAIL = """
- Training: both towers are trained, with batches of 32 images, 2 loader processes, the default augmentation and frozen
  batch norm. The other side is the [plain loop](plain_loop.py) with the same towers, heads and parameter groups, which
  encodes an image once for each of its captions. MiniCLIP encodes it once. It also uses `keep_freed_memory` and
  channels_last, and pads each text to the longest of a group of texts of similar length.
- Encoding: JPEG files in batches of 32. "Default settings" gives the tower timm's transform of the opened file in
  contiguous memory; "the same settings" adds `keep_freed_memory` and channels_last; "without reading" encodes the same
  pixels over and over.
- Loader: the other side opens and augments files and tokenizes captions in the same number of processes, and passes
  nothing on. Files as small as 224 x 224 pixels decode so fast that the remaining costs show: a seed for each row, and
  the transfer of each batch.
- Race to a given recall (the last two rows): both towers are frozen and the heads are trained, with 224 pixels on both
  sides. MiniCLIP uses recipe `heads`, the plain loop the default heads of 256 dimensions, their learning rate and
  batches of 32. The goal is that half of the 5,000 captions find their image among the first ten of the 1,000
  validation images. Time counts from the start of the process. For MiniCLIP it includes the features of the towers and
  all validations; for the plain loop it excludes its validations, one every 100 steps of 32 pairs. With the recipe's
  dropout, MiniCLIP reaches the goal at the end of its second epoch of 12 steps. Both sides spend their time in the
  forward passes of the towers, which the encoding row above limits. For the last row, the plain loop would validate at
  the end of an epoch, like the tutorial; the time of that epoch is calculated from its seconds per step.
"""


def measure(group: Group, side: str, flags: list[str]) -> dict[str, Any]:
    """Run one side once. Returns its numbers."""
    is_workload = group.sides is not COMMANDS
    argv = [sys.executable, *group.sides[side], *([*flags, *group.flags] if is_workload else [])]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    result = subprocess.run(argv, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{side}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1]) if is_workload else {"seconds": seconds}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown rows of the groups that were measured."""
    rows = []
    for row in ROWS:
        other, own = ([x[row.number] for x in lines if (x["group"], x["side"]) == (row.group, s)] for s in row.sides)
        if own:
            compared = statistics.median(row.compare(*pair) for pair in zip(other, own, strict=True))
            cells = (row.what, *(f"{statistics.median(n):.3g}" for n in (other, own)), f"{compared:.2f} {row.unit}")
            rows.append(f"| {' | '.join(cells)} | {row.target} | {len(own)} |\n")
    return "".join(rows)


def main(argv: list[str]) -> None:
    """Measure the chosen groups and write the whole table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "vision_model", "text_model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--recipe", default="heads", help="recipe of the race")
    parser.add_argument("--repetitions", type=int, help="repetitions of each group except the race")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    args = parser.parse_args(argv)
    flags = [f"--{name}={getattr(args, name)}" for name in ("dataset", "vision_model", "text_model")]
    recorded = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    lines = [line for line in recorded if line["group"] not in args.only]
    for name in args.only:
        group = GROUPS[name]
        extra = [f"--recipe={args.recipe}"] if name == "race" else ["--text_pooling=mean"]
        turns = group.repetitions if name == "race" else args.repetitions or group.repetitions
        for turn in range(turns):
            for side in group.sides:
                lines.append({"group": name, "side": side, "turn": turn, **measure(group, side, [*flags, *extra])})
                print(lines[-1], flush=True)
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        head = HEAD.format(threads=torch.get_num_threads(), torch=torch.__version__.split("+")[0])
        RESULTS.with_suffix(".md").write_text(head + table(lines) + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
