"""Measure what comes before the work: seconds to the first step, of a search, and of loading an export.

    python benchmarks/startup.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

- First step: recipe `heads` with cached features, until its first step has ended.
- Search: `miniclip search` by text in an exact index of 100,000 random embeddings, which knows what unrelated captions
  score.
- Loading: `MiniClipModel.from_pretrained`, and `AutoModel.from_pretrained` for each of its two towers.

Each turn is a process of its own; medians count. Imports are those of the libraries that the work needs, before it
starts, and are subtracted, as is loading the text tower for a search. The whole time starts with the process. Seconds
of the processor hardly depend on what else the machine does. Writes `startup.md` after each turn.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROWS, BLOCK = 100_000, 10_000
TURNS = 5


def first_step(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from the end of all imports, and of the whole process, to the end of the first step."""
    import train_miniclip  # noqa: F401  (imported before the clock starts)
    from modeling_miniclip import train
    from modeling_miniclip.training.towers import create_model  # noqa: F401

    before_start = time.time() - psutil.Process().create_time()
    started, computed = time.perf_counter(), time.process_time()
    ended: list[float] = []

    def stop(step: int, metrics: dict[str, float]) -> bool:
        ended.extend([time.perf_counter(), time.process_time()])
        return False

    folder = args.scratch / "again"
    towers = {"vision_model": args.vision_model, "text_model": args.text_model}
    train(args.dataset, folder, recipe="heads", feature_cache_dir=args.scratch / "features", on_step=stop, **towers)
    shutil.rmtree(folder)
    return {
        "first step, beyond imports": ended[0] - started,
        "first step, processor": ended[1] - computed,
        "first step, whole": ended[0] - started + before_start,
    }


def search(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a command, and then, with all files in memory, of a search without those of loading its tower."""
    from modeling_miniclip.cli import cli
    from modeling_miniclip.inference import encode  # noqa: F401
    from modeling_miniclip.inference.loading import load_tower
    from modeling_miniclip.search import query  # noqa: F401

    command = ["search", str(args.scratch / "large.index"), "two dogs on a beach"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "modeling_miniclip", *command], check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - started
    load_tower(args.scratch / "run" / "export", "text")
    moments = [(time.perf_counter(), time.process_time())]
    load_tower(args.scratch / "run" / "export", "text")
    moments.append((time.perf_counter(), time.process_time()))
    with redirect_stdout(StringIO()):
        assert cli(command) == 0
    moments.append((time.perf_counter(), time.process_time()))
    wall, processor = (end - loaded - (loaded - start) for start, loaded, end in zip(*moments, strict=True))
    return {"search, beyond imports and loading": wall, "search, processor": processor, "search, whole": whole}


def load_model(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of loading the export."""
    from modeling_miniclip import MiniClipModel

    return timed("export", lambda: MiniClipModel.from_pretrained(args.scratch / "run" / "export"))


def load_towers(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of loading both towers by transformers."""
    import timm  # noqa: F401  (transformers imports it when it loads the first model of timm)
    from transformers import AutoModel

    return timed("towers", lambda: [AutoModel.from_pretrained(name) for name in (args.vision_model, args.text_model)])


def timed(name: str, load: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a second call: the first one imports the code of the model."""
    load()
    started = time.perf_counter()
    load()
    return {name: time.perf_counter() - started}


PARTS = {part.__name__: part for part in (first_step, search, load_model, load_towers)}


def prepare(args: argparse.Namespace) -> None:
    """Cache the features, train an export, and write an index of random embeddings that fits it."""
    import numpy as np
    import pyarrow as pa

    from modeling_miniclip import ImageIndex, train
    from modeling_miniclip.cli import cli
    from modeling_miniclip.search.index import SCHEMA, write_index

    towers = {"vision_model": args.vision_model, "text_model": args.text_model}
    train(
        args.dataset,
        args.scratch / "run",
        recipe="heads",
        max_steps=1,
        feature_cache_dir=args.scratch / "features",
        **towers,
    )
    picture = next(path for path in Path(args.dataset).rglob("*.jpg"))
    small = args.scratch / "small.index"
    cli(["index", str(args.scratch / "run" / "export"), str(picture), "-o", str(small)])
    columns: dict[str, list[Any]] = {name: [None] * ROWS for name in SCHEMA.names}
    names = [f"/home/somebody/Pictures/2024/{number:09d}.jpg" for number in range(ROWS)]
    columns |= {"id": names, "path": names, "hash": [f"{n:032x}" for n in range(ROWS)], "captions": [["a dog"]] * ROWS}
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    rng, manifest = np.random.default_rng(0), ImageIndex.open(small).manifest
    blocks = (unit(rng.standard_normal((BLOCK, manifest.dim), np.float32)) for _ in range(ROWS // BLOCK))
    captions = unit(rng.standard_normal((256, manifest.dim), np.float32))
    write_index(
        args.scratch / "large.index", replace(manifest, neighbours="exact"), [entries], blocks, captions=captions
    )


def unit(vectors: Any) -> Any:
    """Rows of norm 1."""
    return vectors / (vectors**2).sum(axis=1, keepdims=True) ** 0.5


def measure(argv: list[str], part: str, scratch: Path) -> dict[str, float]:
    """Run one part in a fresh process."""
    command = [sys.executable, str(HERE / "startup.py"), *argv, "--part", part, "--scratch", str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{part}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if part != "prepare" else {}


def page(seconds: dict[str, list[float]]) -> str:
    """The Markdown page."""
    about = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[3:4]][0]
    points = (__doc__ or "").split("\n\n")[2]
    own, others = median(seconds["export"]), median(seconds["towers"])
    rows = {
        "first step with cached features, s beyond imports": ("first step, beyond imports", "8"),
        "the same in seconds of the processor, of all threads": ("first step, processor", ""),
        "the same with imports, s": ("first step, whole", ""),
        f"search over {ROWS:,} images, s beyond imports and loading": ("search, beyond imports and loading", "0.3"),
        "the same in seconds of the processor": ("search, processor", ""),
        "the whole command, s": ("search, whole", ""),
    }
    lines = [
        f"| {what} | {median(seconds[name]):.2f} | {min(seconds[name]):.2f} to {max(seconds[name]):.2f} | {goal} |"
        for what, (name, goal) in rows.items()
    ]
    ratios = [a / b for a, b in zip(seconds["export"], seconds["towers"], strict=True)]
    lines.append(
        f"| loading an export ({own:.2f} s) against its two towers ({others:.2f} s) | {median(ratios):.2f}x | "
        f"{min(ratios):.2f}x to {max(ratios):.2f}x | 1.1x |"
    )
    head = "| what | median | range | at most |\n|---|---:|---:|---:|\n"
    return (
        f"# Startup\n\nWritten by `benchmarks/startup.py`: {len(seconds['export'])} turns, {os.cpu_count()} cores, "
        f"{os.getloadavg()[2]:.0f} programs computing at once in the last quarter of an hour.\n\n{head}"
        + "\n".join(lines)
        + f"\n\n{points}\n\n{about}\n"
    )


def main(argv: list[str]) -> None:
    """Measure all parts in turns, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "vision_model", "text_model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--part", choices=["prepare", *PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help="folder to keep what is measured")
    args = parser.parse_args(argv)
    if args.part == "prepare":
        prepare(args)
        return
    if args.part is not None:
        with redirect_stdout(sys.stderr):
            seconds = PARTS[args.part](args)
        print(json.dumps(seconds))
        return
    own = [f"--{name}={getattr(args, name)}" for name in ("dataset", "vision_model", "text_model")]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        if not (scratch / "large.index").exists():
            measure(own, "prepare", scratch)
        for _ in range(TURNS):
            for part in PARTS:
                for name, value in measure(own, part, scratch).items():
                    found.setdefault(name, []).append(value)
                    print(name, f"{value:.2f} s", flush=True)
            (HERE / "startup.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
