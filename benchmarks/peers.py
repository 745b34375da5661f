"""Compare training and encoding with open_clip, sentence-transformers and a plain PyTorch loop, side by side.

    make bench-peers                                           # in an environment of its own, .venv-peers
    python benchmarks/peers.py --only trials train             # some of the parts
    python benchmarks/peers.py --only quality --minutes 20     # recall after equal times; not part of the others

All sides have the same two towers, images, captions, image size, batch size, augmentation and trained layers, frozen
batch norms and float32. They take turns, each in a fresh process that `peer_sides.py` defines. Each peer runs as its
documentation starts it, and at its best: with this package's settings of the allocator and the fastest settings of
`TRIALS`. Replaces the lines of the measured parts in `peers.jsonl` and writes `peers.md` from it. The data and towers
are those of `MINICLIP_SHARED`, else `../shared`, unless given as flags.
"""

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from bench import FLAGS, add_data_flags, check_data
from machine import made_with
from memory import peak_of
from peer_page import (
    BATCH,
    BEST,
    CAPTIONS,
    EQUAL_TEXTS,
    OWN,
    PEERS,
    SEVERAL,
    Line,
    fastest,
    page,
    rates,
    trial,
    values,
)
from peer_sides import CONFIG, DIM, PAIRS, SIZE, TOWER, read_pairs
from speed import Group, measure

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "peers.jsonl"
PARTS = ("trials", "train", "texts", "encode", "memory")
# Settings that are tried, under the names of their side: as many of each peer as of this package, or more.
TRIALS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "open_clip": ("", "workers=1", "workers=2", "workers=2 force-context-length=42", "torchcompile"),
        "sentence_transformers": (
            "", "dataloader_num_workers=1", "dataloader_num_workers=2",
            "dataloader_num_workers=2 dataloader_persistent_workers=true", "torch_compile=true",
        ),
        "plain": ("", "num_workers=1", "channels_last", "channels_last num_workers=1", "channels_last compile"),
        OWN: ("", "num_workers=1", "num_workers=3", "logging_steps=100", "compile_towers=true"),
    },
    "encode": {
        "open_clip": ("", "workers=1", "workers=2", "compile"),
        "sentence_transformers": ("", "processes=1", "processes=2", "compile"),
        "plain": ("", "channels_last"),
        OWN: ("",),
    },
}  # fmt: skip
# Settings of the runs that are compared by recall; the rates of the peers were not tuned.
QUALITY = {
    "open_clip": "lr=1e-4 wd=0.1 warmup=50",
    "sentence_transformers": "learning_rate=0.0001 warmup_steps=50",
    "plain": "",
    OWN: "recipe=full batch_size=128 captions_per_image=2",
}


def group_of(part: str, lines: list[Line]) -> Group:
    """The sides of a part; those at their best have the fastest settings among the recorded trials."""
    if part == "trials":
        tried = [(work, side, each) for work, sides in TRIALS.items() for side, all_ in sides.items() for each in all_]
        return Group({trial(*each): _turn(*each, at_best=True) for each in tried}, repetitions=1)
    work = "encode" if part == "encode" else "train"
    sides: dict[str, list[str]] = {}
    for side in (*PEERS, OWN):
        best = fastest(lines, work, side)
        size = {"texts": EQUAL_TEXTS if side == OWN else EQUAL_TEXTS * CAPTIONS}.get(part, BATCH)
        several = [f"--captions={CAPTIONS}"]
        ends = {"": ("", False)} | ({BEST: (best, True)} if side != OWN or best else {})
        for end, (settings, at_best) in ends.items():
            argv = [*_turn(work, side, settings, at_best), f"--batch_size={size}"]
            sides[side + end] = argv + several * (part == "texts")
            if side == OWN and part in ("train", "memory"):
                sides[side + SEVERAL + end] = argv + several
    return Group(sides, repetitions=1 if part == "memory" else 3)


def _turn(work: str, side: str, settings: str, at_best: bool) -> list[str]:
    allocator = ["--allocator"] * (at_best and side != OWN)
    return [str(HERE / "peer_sides.py"), work, side, *allocator, "--set", *settings.split()]


def prepare(scratch: Path, args: argparse.Namespace) -> list[str]:
    """Write what the peers read: a table of pairs, a configuration of open_clip, and a tower that crops nothing.

    Returns:
        Flags of `peer_sides.py`.
    """
    import datasets

    from modeling_miniclip.training.command_line.parsing import parse_arguments
    from modeling_miniclip.training.setup import load_splits

    flags = [f"--{name}={getattr(args, name)}" for name in FLAGS]
    train = load_splits(parse_arguments([*flags, f"--output_dir={scratch / 'none'}"]))["train"]
    rows = train.cast_column("image", datasets.Image(decode=False))
    pairs = [(row["image"]["path"], caption) for row in rows for caption in row["captions"]]
    write_pairs(scratch, pairs)
    vision, text = (Path(getattr(args, name)).resolve() for name in ("vision_model", "text_model"))
    config: dict[str, Any] = {"embed_dim": DIM}
    config["vision_cfg"] = {"timm_model_name": f"local-dir:{vision}", "timm_model_pretrained": True,
                            "timm_pool": "avg", "timm_proj": "linear", "image_size": SIZE}  # fmt: skip
    config["text_cfg"] = {"hf_model_name": str(text), "hf_tokenizer_name": str(text), "hf_proj_type": "linear",
                          "hf_pooler_type": "mean_pooler"}  # fmt: skip
    (scratch / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    tower = json.loads((vision / "config.json").read_text(encoding="utf-8"))
    tower["pretrained_cfg"]["crop_pct"] = 1.0  # of an augmented image, nothing is cut off
    (scratch / TOWER).mkdir()
    (scratch / TOWER / "config.json").write_text(json.dumps(tower), encoding="utf-8")
    (scratch / TOWER / "model.safetensors").symlink_to(vision / "model.safetensors")
    return [*flags, f"--scratch={scratch}"]


def write_pairs(scratch: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """The table that open_clip and sentence-transformers train on."""
    with (scratch / PAIRS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows(pairs)


def check_order(parts: Iterable[str], lines: list[Line]) -> None:
    """End with a message if a part needs the lines of another that was not measured."""
    measured = {line["group"] for line in lines}
    for part in parts:
        needed = {"trials": None, "quality": "train"}.get(part, "trials")  # rates, and the fastest settings
        if needed is not None and needed not in measured:
            sys.exit(f"part {part} needs the lines of part {needed}: pass --only {needed} {part}")
        measured.add(part)


class OtherProcesses:
    """What processes other than this one and its children take of the processors, from now on."""

    def __init__(self) -> None:
        self.start, self.busy = time.monotonic(), self._busy()

    @staticmethod
    def _busy() -> float:
        all_, own = psutil.cpu_times(), os.times()
        return all_.user + all_.nice + all_.system - sum(own[:4])

    def percent(self) -> float:
        """Percent of the time of all processors."""
        return 100 * (self._busy() - self.busy) / (time.monotonic() - self.start) / (psutil.cpu_count() or 1)


def run_part(part: str, lines: list[Line], flags: list[str], repetitions: int | None) -> Iterator[Line]:
    """All turns of a part. A trial that fails has an `error` instead of numbers."""
    group = group_of(part, lines)
    for turn in range(1 if part == "trials" else repetitions or group.repetitions):
        for side, argv in group.sides.items():
            settings = [each for each in argv[argv.index("--set") + 1 :] if not each.startswith("--")]
            line: Line = {"group": part, "side": side, "turn": turn, "settings": " ".join(settings)}
            if part == "memory":
                run = partial(memory_of, [sys.executable, *argv, *flags])
            else:
                run = partial(try_turn if part == "trials" else measure, group, side, flags)
            yield timed(line, run)


def timed(line: Line, run: Callable[[], dict[str, Any]]) -> Line:
    """A line with the numbers of a turn, and what other processes took meanwhile."""
    others = OtherProcesses()
    line = {**line, **rates(line["group"], line["side"], run()), "others_percent": others.percent()}
    print(line, file=sys.stderr, flush=True)
    return line


def memory_of(argv: list[str]) -> dict[str, float]:
    """Peak memory of a turn."""
    return {"gib": peak_of(argv)}


def try_turn(group: Group, side: str, flags: list[str]) -> dict[str, Any]:
    """Numbers of a turn, or the last line of its error."""
    try:
        return measure(group, side, flags)
    except SystemExit as error:
        return {"error": str(error).strip().splitlines()[-1][:200]}


def run_quality(lines: list[Line], flags: list[str], scratch: Path, minutes: float) -> Iterator[Line]:
    """Recall of each side after an equal time; the tables of the peers have as many pairs as fit into it."""
    pairs = list(zip(*read_pairs(scratch), strict=True))
    random.Random(0).shuffle(pairs)
    for side in (*PEERS, OWN):
        name = side + BEST
        rate = max(values(lines, "train", name, "pairs_per_second"))
        write_pairs(scratch, (pairs[i % len(pairs)] for i in range(round(1.1 * 60 * minutes * rate) + BATCH)))
        settings = f"{fastest(lines, 'train', side)} {QUALITY[side]}".strip()
        group = Group({name: _turn("train", side, settings, at_best=True)}, (f"--minutes={minutes}",))
        line = {"group": "quality", "side": name, "turn": 0, "settings": settings, "minutes": minutes}
        yield timed(line, partial(measure, group, name, flags))


def main(argv: list[str]) -> None:
    """Measure the chosen parts, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "quality"), default=list(PARTS))
    parser.add_argument("--repetitions", type=int, help="turns of each part but the trials (3; 1 for memory)")
    parser.add_argument("--minutes", type=float, default=20.0, help="time of each side in part quality (20)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="recorded lines; the page is next to them")
    args = parser.parse_args(argv)
    check_data(args)
    os.environ |= {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    recorded = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    lines: list[Line] = [json.loads(line) for line in recorded]
    check_order(args.only, lines)
    versions = {name: version(name) for name in ("open_clip_torch", "sentence_transformers")}
    facts = made_with() | versions
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        flags = prepare(scratch, args)
        for part in args.only:
            if part == "quality":
                measured = run_quality(lines, flags, scratch, args.minutes)
            else:
                measured = run_part(part, lines, flags, args.repetitions)
            others, done = [line for line in lines if line["group"] != part], []
            for line in measured:
                done.append({**line, "commit": facts["commit"]})
                save([*others, *done], args.results, facts)
            lines = [*others, *done]


def save(lines: list[Line], results: Path, facts: dict[str, Any]) -> None:
    """Write the lines, and the page next to them, which names all commits that were measured."""
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    commits = {"commit": ", ".join(sorted({line["commit"] for line in lines}))}
    results.with_suffix(".md").write_text(page(lines, facts | commits), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
