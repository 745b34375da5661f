"""Measure reading: the training loader, the start of a run by the size of its data, and shards from a server.

    python benchmarks/data.py loader FLICKR8K LITE0 MINILM
    python benchmarks/data.py startup [--captions 5000 10000 100000 1000000 10000000]
    python benchmarks/data.py http FLICKR8K LITE0 MINILM

FLICKR8K is a folder with Images/ and captions; LITE0 and MINILM are folders of EfficientNet-Lite0 and
all-MiniLM-L6-v2, or their names on the Hub. `loader` needs the package `webdataset`, and `startup` needs `pandas`.
Each prints a table and writes it into `data.md`. All sides run in processes of their own, those of `loader` in turns.
`--work` keeps the data that is written first. Linux only: memory is read from /proc.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from data_files import CAPTIONS, write_photos, write_tiny
from faulty_server import Fault, served
from private_memory import PeakMemory

from modeling_miniclip.utils.files import replace_between_marks

HERE = Path(__file__).resolve().parent
PAGE = HERE / "data.md"
POLL = 0.05  # seconds between two looks at a running process
MILLION = 1_000_000
MOST_IN_TARS = MILLION  # captions; beyond that, only the caption file is read

# Sides of `loader`: what is compared with the first one, the side in `data_sides.py`, its source, and `--shuffle`.
TARS, PARQUET, FILES = "{train,validation}-*.tar", "{train,validation}-*.parquet", "captions.csv"
SIDES = {
    "MiniCLIP, tars": ("load_package", TARS, "full"),
    "MiniCLIP, tars, `--shuffle window`": ("load_package", TARS, "window"),
    "MiniCLIP, Parquet, `--shuffle window`": ("load_package", PARQUET, "window"),
    "MiniCLIP, loose files": ("load_package", FILES, "full"),
    "`webdataset`, tars": ("load_webdataset", TARS, "full"),
    "only decoding, augmenting and tokenizing": ("load_bare", FILES, "full"),
}
# Comparisons: what, own side, other side, target.
RATIOS = (
    ("tars against `webdataset`", 0, 4, "1.0"),
    ("tars against only decoding, augmenting and tokenizing", 0, 5, "0.9"),
    ("loose files against the same", 3, 5, "0.9"),
    ("Parquet against tars, both in windows", 2, 1, ""),
    ("`--shuffle window` against `full`, tars", 1, 0, ""),
)
FAULTS = (
    Fault("none"),
    Fault("each connection is limited to 5 MB/s", rate=5e6),
    Fault("a shard fails once (503)", "error", times=1),
    Fault("a shard fails each time (503)", "error"),
    Fault("a shard is missing (404)", "missing"),
    Fault("a connection is cut once, after half of a shard", "cut", times=1),
    Fault("a connection is cut each time, after half of a shard", "cut"),
    Fault("nothing more comes after half of a shard", "stall"),
)


def environment(home: Path) -> dict[str, str]:
    """Variables of a side: its own empty caches in `home`, and no network beyond this machine."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": path, "HF_HOME": str(home)}


def start_side(name: str, argv: list[str], home: Path) -> psutil.Popen:
    """Start a side of `data_sides.py`."""
    command = [sys.executable, str(HERE / "data_sides.py"), name, *argv]
    pipe = subprocess.PIPE
    return psutil.Popen(command, env=environment(home), stdout=pipe, stderr=pipe, text=True)


def run_side(name: str, argv: list[str], home: Path) -> tuple[dict[str, Any], PeakMemory]:
    """Run a side to its end. Returns its numbers and the memory that it took."""
    process = start_side(name, argv, home)
    with PeakMemory(process.pid) as memory:
        out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{name} {' '.join(argv)}: {err[-3000:]}")
    return json.loads(out.splitlines()[-1]), memory


def markdown(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def record(name: str, text: str) -> None:
    """Print a table with what it was measured on, and write it into the page."""
    machine = f"{os.cpu_count()} cores, torch {torch.__version__.split('+')[0]}"
    text = f"{text}\nMeasured with {machine}.\n"
    print(text)
    replace_between_marks(PAGE, name, text)


# --- loader ---------------------------------------------------------------------------------------------------------


def training_flags(args: argparse.Namespace, source: str, shuffle: str) -> list[str]:
    """Flags of a training run whose data is `source`."""
    flags = {"dataset": source, "vision_model": args.vision_model, "text_model": args.text_model}
    flags |= {"text_pooling": "mean", "shuffle": shuffle, "num_workers": args.num_workers, "batch_size": 32}
    return [f"--{name}={value}" for name, value in flags.items()] + ["--captions_per_image=1"]


def measure_loader(args: argparse.Namespace, work: Path) -> None:
    """Images per second of each side of [`SIDES`], in turns."""
    write_photos(args.flickr8k, args.images, args.shards, work / "photos")
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(args.turns):
        for name, (side, source, shuffle) in SIDES.items():
            flags = training_flags(args, str(work / "photos" / source), shuffle)
            numbers, _ = run_side(side, flags, work / "home")
            if numbers["images"] != args.images:
                sys.exit(f"{name}: {numbers['images']:g} images instead of {args.images}")
            rates[name].append(numbers["images_per_second"])
            print(f"turn {turn}: {name}: {rates[name][-1]:.1f} images per second", flush=True)
    each = [(name, f"{statistics.median(values):.0f}") for name, values in rates.items()]
    values = list(rates.values())
    compared = [
        (what, f"{statistics.median(a / b for a, b in zip(values[own], values[other], strict=True)):.2f}", target)
        for what, own, other, target in RATIOS
    ]
    record(
        "loader",
        f"{markdown(('side', 'images per second'), each)}\n{markdown(('what', 'ratio', 'target'), compared)}\n"
        f"{args.images:,} images in {args.shards} shards, {args.num_workers} worker processes, {args.turns} turns.\n",
    )


# --- startup --------------------------------------------------------------------------------------------------------


def measure_startup(args: argparse.Namespace, work: Path) -> None:
    """Seconds and memory of reading, and of a run until its first step and validation, by number of captions."""
    reading, runs = [], []
    for captions in args.captions:
        folder = work / f"tiny-{captions}"
        write_tiny(captions // CAPTIONS, folder)
        sources = {"CSV": [str(folder / "captions.csv"), str(folder / "images")]}
        if captions <= MOST_IN_TARS:
            sources["tars"] = [f"{folder}/*.tar"]
        pandas = measure_reading("read_pandas", sources["CSV"], folder / "home")
        for kind, source in sources.items():
            home = folder / f"home-{kind}"
            shutil.rmtree(home, ignore_errors=True)
            own = [measure_reading("read_rows", source, home) for _ in range(2)]
            other = pandas if kind == "CSV" else (math.nan, math.nan)
            reading.append((kind, captions, *own[0], *own[1], *other, folder_mib(home)))
            print(reading[-1], flush=True)
            shutil.rmtree(home)
            starts = [measure_run(source, home, args.num_workers) for _ in range(2)]
            runs.append((kind, captions, *starts[0], *starts[1]))
            print(runs[-1], flush=True)
            shutil.rmtree(home)
        if args.work is None:
            shutil.rmtree(folder)
    record("startup", startup_tables(reading, runs))


def measure_reading(side: str, argv: list[str], home: Path) -> tuple[float, float]:
    """Seconds and MiB that a side takes after its imports."""
    numbers, memory = run_side(side, argv, home)
    return numbers["seconds"], max(0.0, memory.largest - numbers["before"])


def measure_run(source: list[str], home: Path, num_workers: int) -> tuple[float, float, float]:
    """Start a run with tiny towers.

    Args:
        source: dataset and, for a caption file, the folder of its images.
        home: folder of the caches.
        num_workers: number of loader processes.

    Returns:
        Seconds until its first step; peak of the private memory of all its processes, and of the largest one, until
        the end of its first validation, MiB.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        log = Path(folder) / "run" / "metrics.jsonl"
        flags = {"preset": "scenes_tiny", "max_steps": 1, "logging_steps": 1}
        flags |= {"batch_size": 64, "captions_per_image": 1, "num_workers": num_workers, "output_dir": log.parent}
        flags |= dict(zip(("dataset", "image_dir"), source, strict=False))
        command = [sys.executable, str(HERE.parent / "train_miniclip.py"), *(f"--{n}={v}" for n, v in flags.items())]
        start, first_step = time.perf_counter(), math.nan
        process = psutil.Popen(command, env=environment(home), stdout=subprocess.DEVNULL, stderr=errors)
        with PeakMemory(process.pid) as memory:
            while process.poll() is None:
                text = log.read_text(encoding="utf-8") if log.exists() else ""
                if math.isnan(first_step) and '"train"' in text:
                    first_step = time.perf_counter() - start
                if '"validation"' in text:
                    break
                time.sleep(POLL)
        if process.poll():
            errors.seek(0)
            sys.exit(errors.read()[-3000:])
        process.send_signal(signal.SIGTERM)
        process.wait()
    return first_step, memory.total, memory.largest


def folder_mib(folder: Path) -> float:
    """Size of all files in a folder, MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def growth(points: list[tuple[int, float]]) -> str:
    """The exponent k of `seconds ~ captions ** k` between the last two sizes, beyond the seconds of the smallest."""
    if len(points) < 3 or not points[-2][1] > points[0][1] < points[-1][1]:
        return ""
    (_, base), *_, (fewer, less), (more, longer) = points
    return f"{math.log((longer - base) / (less - base)) / math.log(more / fewer):.2f}"


def startup_tables(reading: list[tuple[Any, ...]], runs: list[tuple[Any, ...]]) -> str:
    """Markdown tables of what [`measure_startup`] measured."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int):
            return f"{value:,}"
        return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:,.0f}"

    first = markdown(
        ("source", "captions", "first start, s", "MiB", "second start, s", "MiB", "pandas, s", "MiB", "cache, MiB"),
        [tuple(map(cell, row)) for row in reading],
    )
    second = markdown(
        ("source", "captions", "first start: to the first step, s", "all processes, MiB", "largest process, MiB",
         "second start: to the first step, s", "all processes, MiB", "largest process, MiB"),
        [tuple(map(cell, row)) for row in runs],
    )  # fmt: skip
    exponents = []
    for kind in dict.fromkeys(row[0] for row in reading):
        for what, rows, column in (
            ("reading, first start", reading, 2),
            ("reading, second start", reading, 4),
            ("pandas", reading, 6),
            ("a run, first start", runs, 2),
            ("a run, second start", runs, 5),
        ):
            exponent = growth([(row[1], row[column]) for row in rows if row[0] == kind])
            exponents += [(kind, what, exponent)] if exponent else []
    third = f"\nGrowth:\n\n{markdown(('source', 'what', 'growth exponent'), exponents)}" if exponents else ""
    return f"Reading:\n\n{first}\nA run:\n\n{second}{third}"


# --- http -----------------------------------------------------------------------------------------------------------


def measure_http(args: argparse.Namespace, work: Path) -> None:
    """How two processes that read shards from a server fare with each of its faults."""
    write_photos(args.flickr8k, args.images, args.shards, work / "photos")
    shards = f"{{train-{{00000..{args.shards - 1:05d}}},validation-00000}}.tar"
    with tempfile.TemporaryDirectory() as home:
        rows = [("local tars", *read_by_two(args, str(work / "photos" / TARS), Path(home)))]
    for fault in FAULTS:
        with served(work / "photos", fault) as url, tempfile.TemporaryDirectory() as home:
            rows.append((fault.what, *read_by_two(args, f"{url}/{shards}", Path(home))))
        print(rows[-1], flush=True)
    head = ("fault", "first epoch, images per second", "second epoch", "how it ends")
    record("http", markdown(head, rows) + f"\n{args.images:,} images in {args.shards} shards.\n")


def read_by_two(args: argparse.Namespace, source: str, home: Path) -> tuple[str, ...]:
    """Start two processes that share the caches, each with its share of the batches.

    Returns:
        Images per second of both together in the first epoch, which includes the start, and in the second; how it
        ends: the error of each, or the number of images that they read.
    """
    flags = training_flags(args, source, "window")
    start = time.perf_counter()
    processes = [start_side("read_share", [str(rank), "2", *flags], home) for rank in range(2)]
    ends = []
    for process in processes:
        try:
            ends.append(process.communicate(timeout=max(0.1, args.patience - (time.perf_counter() - start))))
        except subprocess.TimeoutExpired:
            end_tree(process)
            ends.append(("", f"no end within {args.patience} s"))
    if any(process.returncode for process in processes):
        seconds = time.perf_counter() - start
        lines = [re.sub(r"http://[\d.:]+/", "", err.rpartition("error: ")[2].strip()) for _, err in ends]
        return "", "", f"after {seconds:.0f} s: {' / '.join(dict.fromkeys(filter(None, lines)))}".replace("|", "\\|")
    numbers = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    images = sum(each["images"] for each in numbers)
    rates = [f"{images / max(each['seconds'][epoch] for each in numbers):.0f}" for epoch in range(2)]
    return *rates, f"all {images:,} images are read"


def end_tree(process: psutil.Popen) -> None:
    """Kill a process and its children, and wait for them."""
    tree = [*process.children(recursive=True), process]
    for each in tree:
        each.kill()
    process.communicate()


# --- command line ---------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, measure in (("loader", measure_loader), ("startup", measure_startup), ("http", measure_http)):
        command = commands.add_parser(name, help=measure.__doc__)
        command.set_defaults(measure=measure)
        command.add_argument("--work", type=Path, help="folder to keep the data in, for the next time")
        command.add_argument("--num_workers", type=int, default=2)
        if name == "startup":
            sizes = [5_000, 10_000, 100_000, MILLION, 10 * MILLION]  # the first is a run on 1,000 images
            command.add_argument("--captions", type=int, nargs="+", default=sizes)
            continue
        command.add_argument("flickr8k")
        command.add_argument("vision_model")
        command.add_argument("text_model")
        command.add_argument("--images", type=int, default=4_096 if name == "loader" else 1_024)
        command.add_argument("--shards", type=int, default=16 if name == "loader" else 8)
        if name == "loader":
            command.add_argument("--turns", type=int, default=4)
        else:
            command.add_argument("--patience", type=float, default=600, help="seconds until a side is ended")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure one of the three."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        args.measure(args, args.work or Path(folder))


if __name__ == "__main__":
    main()
