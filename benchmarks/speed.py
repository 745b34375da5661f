"""Measure speed as ratios of sides that take turns, each in a process of its own.

    python benchmarks/speed.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM [--only encode loader]

FLICKR8K is a folder with Images/ and captions; LITE0 and MINILM are folders of EfficientNet-Lite0 and
all-MiniLM-L6-v2, or their names on the Hub. Adds a line a measurement to `speed.jsonl` in place of the earlier ones of
the same group, and writes `speed.md` from it. What the sides do is in `workloads.py` and `plain_loop.py`.
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
    """Sides that are measured in turns: workloads, or command lines whose seconds count."""

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
    "encode": Group(_workloads("encode_timm", "encode_timm_alike", "encode_package", "encode_no_reading")),
    "loader": Group(_workloads("load_bare", "load_package", "load_bare_large", "load_package_large")),
    "start": Group(COMMANDS, repetitions=15),
    "race": Group(_workloads("race_plain", "race_package"), repetitions=1),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: a number of two sides, what is made of both, and what it should be."""

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
        Row(f"train_{captions}", f"training, {name}, {captions} captions an image".replace("1 captions", "1 caption"),
            f"{name}_per_second", ("train_plain", "train_package"), target)
        for captions, name, target in ((1, "pairs", "1.5"), (1, "images", ""), (5, "pairs", "4"), (5, "images", ""))
    ),
    Row("encode", "`encode_images`, images, against the bare tower by default", "images_per_second",
        ("encode_timm", "encode_package"), "1.5"),
    Row("encode", "the same, against the tower called alike", "images_per_second",
        ("encode_timm_alike", "encode_package"), "0.97"),
    Row("encode", "the same, against the tower alone, nothing to read", "images_per_second",
        ("encode_no_reading", "encode_package"), ""),
    Row("loader", "training loader, images, against decode, augment and tokenize run bare", "images_per_second",
        ("load_bare", "load_package"), "0.9"),
    Row("loader", "the same, enlarged to 500 x 375 pixels", "images_per_second",
        ("load_bare_large", "load_package_large"), "0.9"),
    Row("train_1", "share of a step that waits for data, %", "waiting_percent", ("train_plain", "train_package"),
        "below 5", _percent, "%"),
    Row("start", "`import modeling_miniclip`, s beyond Python's start", "seconds", ("nothing", "import"),
        "below 0.3", _beyond, "s"),
    Row("start", "`miniclip --help`, s", "seconds", ("nothing", "help"), "below 0.5", _percent, "s"),
    Row("race", "seconds to text-to-image R@10 of 50 %, at any step", "seconds", ("race_plain", "race_package"), "",
        lambda other, own: other / own),
    Row("race", "seconds to the first epoch's end with more than that", "epoch_seconds",
        ("race_plain", "race_package"), "8", lambda other, own: other / own),
]  # fmt: skip
HEAD = """# Speed

Written by `benchmarks/speed.py`: medians of repetitions, the sides taking turns, each in a process of its own; what is
compared is compared within each turn. EfficientNet-Lite0 and all-MiniLM-L6-v2, Flickr8k, {threads} threads, torch
{torch}.

| what, a second unless told otherwise | other side | MiniCLIP | ratio or difference | target | turns |
|---|---|---|---|---|---|
"""
TAIL = """
- Training: both towers trained, batches of 32 images, 2 loader processes, the default augmentation, batch norm frozen.
  The other side is the [plain loop](plain_loop.py), which encodes an image once for each of its captions; it has the
  same towers, heads and parameter groups. The package adds `keep_freed_memory`, channels_last, texts padded to the
  longest of a group of like lengths, and the image encoded once.
- Encoding: JPEG files, batches of 32, nothing trained. By default the tower gets timm's transform of the opened file,
  contiguous; alike means with `keep_freed_memory` and channels_last. Nothing to read: the same pixels over and over.
- Loader: the other side opens and augments files and tokenizes captions in as many processes and hands nothing over.
  With files as small as 224 x 224 pixels, which decode in no time, what is left shows: the row's own seeds, and the
  first touch of each batch's shared memory.
- The race: both towers frozen, heads trained, 224 pixels on both sides; here recipe `heads`, there the default heads
  of 256 dimensions, their learning rate and batches of 32. Until the 5,000 captions of 1,000 validation images find
  their image among the first ten in half of the cases. From the start of the process; for MiniCLIP with the features
  of the towers and all validations, for the plain loop without the time of its validations, one every 100 steps of 32
  pairs. With the recipe's dropout the end of its first epoch, of 12 steps, is not enough, that of the second is.
  Either side spends its time in the towers' forward passes, which are bounded by the row of encoding above. As the
  tutorial does, the plain loop would validate at the end of the epoch, whose seconds are told from its seconds a step.
"""


def measure(group: Group, side: str, flags: list[str]) -> dict[str, Any]:
    """Run one side once."""
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
    """Markdown: the rows whose group was measured."""
    rows = []
    for row in ROWS:
        other, own = ([x[row.number] for x in lines if (x["group"], x["side"]) == (row.group, s)] for s in row.sides)
        if own:
            compared = statistics.median(row.compare(*pair) for pair in zip(other, own, strict=True))
            cells = (row.what, *(f"{statistics.median(n):.3g}" for n in (other, own)), f"{compared:.2f} {row.unit}")
            rows.append(f"| {' | '.join(cells)} | {row.target} | {len(own)} |\n")
    return "".join(rows)


def main(argv: list[str]) -> None:
    """Measure the chosen groups and write the table of all."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "vision_model", "text_model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--recipe", default="heads", help="of the race")
    parser.add_argument("--repetitions", type=int, help="of each group but the race")
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
