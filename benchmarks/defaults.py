"""Compare the default of a run with each recipe, by the number of training images: rsum, image encodings, CPU minutes.

    python benchmarks/defaults.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/defaults.py --images 3000 --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/defaults.py --images 500 1500 --only default_frozen default_trained ...    # is the rule right?
    python benchmarks/defaults.py --table       # trains nothing, only writes the table again

`default` passes the data and the towers, and nothing else (MINILM is a folder that does not say how its texts are
pooled, so its `--text_pooling mean` is passed, too). `default_frozen` and `default_trained` are the default with
`--freeze both` and `--freeze none`: the number of images decides which of the two `default` is, so its run is not
repeated. `tutorial` is what the default was before: plain.yaml.
`heads_then_full` and `lit` were recipes, too. They continue from an export of `heads` on the same images, and `finish`
from one of `full`; their costs include it. The best recipe is the best of `heads`, `full` and the first two, if
`full` is recorded.

Image encodings are images that the image tower encodes while it trains, weighted by their pixels (1 is an image of 224
by 224), with those of frozen towers, whose features are computed once. Validations are left out: they depend on the
number of epochs and of validation images, and are in the CPU minutes, which count all processes and threads.

The rows of 6,000 images are those of the runs in the folders next to this file; the default of 6,000 images is recipe
`full`, as a test shows. Adds one line per other run to `defaults.jsonl`, skipping runs that are recorded already, and
writes `defaults.md`. Each run is a process of its own, which computes all features again, as a first run does.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from missing_runs import record_missing, recorded

from modeling_miniclip.training.command_line.derived import FEW_IMAGES

HERE = Path(__file__).resolve().parent
SCRIPT, RESULTS = HERE.parent / "train_miniclip.py", HERE / "defaults.jsonl"
IMAGES, ALL_IMAGES = [500, 1500], 6000
UNIT = 224 * 224  # pixels of one encoding

# Flags of each variant, and the variant whose export it starts from.
VARIANTS: dict[str, tuple[list[str], str | None]] = {
    "default": ([], None),
    "default_frozen": (["--freeze=both"], None),
    "default_trained": (["--freeze=none"], None),
    "tutorial": ([f"--recipe={HERE / 'plain.yaml'}"], None),
    "heads": (["--recipe=heads"], None),
    "full": (["--recipe=full"], None),
    "heads_then_full": ([f"--recipe={HERE / 'heads_then_full' / 'arguments.yaml'}"], "heads"),
    "lit": ([f"--recipe={HERE / 'lit' / 'arguments.yaml'}"], "heads"),
    "finish": (["--recipe=finish"], "full"),
}
RECIPES = ("heads", "full", "heads_then_full", "lit")  # what the default is compared with


def of_all_images() -> list[dict[str, Any]]:
    """Lines of the runs in the folders next to this file."""
    lines = [summary(name, ALL_IMAGES, 0, HERE / name) for name in VARIANTS if (HERE / name).is_dir()]
    return [line | {"variant": "default"} for line in lines if line["variant"] == "full"] + lines


def with_default(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines with those of `default` where only the run that it is the same as was recorded."""
    measured = {(line["images"], line["seed"]) for line in lines if line["variant"] == "default"}
    names = {True: "default_frozen", False: "default_trained"}
    same = [line for line in lines if line["variant"] == names[line["images"] < FEW_IMAGES]]
    return [line | {"variant": "default"} for line in same if (line["images"], line["seed"]) not in measured] + lines


def summary(name: str, images: int, seed: int, folder: Path, size: int = 288) -> dict[str, Any]:
    """The line of a run, from its files; `size` is the pixels per side of its whole images."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max((line for line in lines if line["split"] == "validation" and line["step"] > 0), key=lambda x: x["rsum"])
    arguments = yaml.safe_load((folder / "arguments.yaml").read_text(encoding="utf-8"))
    cost = encodings(arguments, images, max(line["step"] for line in lines), arguments.get("image_size") or size)
    return {"variant": name, "images": images, "seed": seed, "rsum": best["rsum"], "epoch": best["epoch"],
            "encodings": round(cost)}  # fmt: skip


def encodings(arguments: dict[str, Any], images: int, steps: int, size: int) -> float:
    """Images that the image tower encodes in training, weighted by their pixels.

    Args:
        arguments: `arguments.yaml` of the run.
        images: number of training images.
        steps: number of steps that it took.
        size: pixels per side of whole images.
    """
    if arguments["freeze"] in ("vision", "both") and not arguments.get("augmentation"):
        return images * size**2 / UNIT
    steps_per_epoch = -(-images // arguments["batch_size"])
    encoded = steps / steps_per_epoch * images
    return encoded * (arguments.get("train_image_size") or size) ** 2 / UNIT


def measure(name: str, data: str, towers: list[str], images: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train a variant; its line for the record, without the costs of what it starts from.

    Args:
        name: key in `VARIANTS`.
        data: folder or file of the dataset.
        towers: flags of both towers.
        images: number of training images.
        seed: seed of the run.
        folder: folder for its results.
    """
    flags, start = VARIANTS[name]
    argv = [f"--dataset={data}", *flags, f"--max_train_images={images}", f"--seed={seed}", f"--output_dir={folder}"]
    if start is None:
        argv += towers
    else:
        argv.append(f"--model_name_or_path={folder.parent / start / 'export'}")
    with tempfile.TemporaryDirectory() as features:
        command = [sys.executable, str(SCRIPT), *argv, f"--feature_cache_dir={features}", "--overwrite_output_dir"]
        before = child_seconds()
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        minutes = (child_seconds() - before) / 60
    processor = json.loads((folder / "export" / "processor_config.json").read_text(encoding="utf-8"))
    size = processor["image_processor"]["crop_size"]["height"]
    return summary(name, images, seed, folder, size) | {"cpu_minutes": round(minutes, 1)}


def measure_with_start(data: str, towers: list[str], work: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Train a variant, and what it starts from if that is recorded but was not kept."""
    name, images, seed = run["variant"], run["images"], run["seed"]
    folder, start = work / f"{images}-{seed}", VARIANTS[name][1]
    if start is not None and not (folder / start / "export").exists():
        measure(start, data, towers, images, seed, folder / start)
    return measure(name, data, towers, images, seed, folder / name)


def child_seconds() -> float:
    """Seconds of all cores that ended child processes of this one, and theirs, took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def with_start(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A line with the costs of the run that its run started from."""
    start = VARIANTS[line["variant"]][1]
    same = [other for other in lines if other["variant"] == start
            and (other["images"], other["seed"]) == (line["images"], line["seed"])]  # fmt: skip
    costs = [name for name in ("encodings", "cpu_minutes") if name in line]
    return line | {name: line[name] + sum(other[name] for other in same) for name in costs}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table: a row for each number of images and variant, with means over seeds."""
    rows = [["images", "variant", "seeds", "rsum", "of the best recipe", "image encodings", "of its", "CPU minutes"]]
    rows.append(["---:", "---", *["---:"] * 6])
    for images in sorted({line["images"] for line in lines}):
        runs = {
            name: [with_start(line, lines) for line in lines if (line["variant"], line["images"]) == (name, images)]
            for name in VARIANTS
        }
        rsum = {name: mean([run["rsum"] for run in found]) for name, found in runs.items() if found}
        costs = {name: mean([run["encodings"] for run in runs[name]]) for name in rsum}
        best = max((name for name in RECIPES if name in rsum), key=lambda name: rsum[name]) if "full" in rsum else None
        for name, value in rsum.items():
            share = "" if best is None else f"{100 * value / rsum[best]:.1f} %"
            times = "" if not best or not costs[best] else f"{costs[name] / costs[best]:.2f}x"
            minutes = [run["cpu_minutes"] for run in runs[name] if "cpu_minutes" in run]
            figures = [f"{value:.1f}", share, f"{costs[name]:,.0f}", times, f"{mean(minutes):.1f}" if minutes else ""]
            rows.append([f"{images:,}", f"`{name}`", str(len(runs[name])), *figures])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_page() -> None:
    """Write `defaults.md` from the recorded lines."""
    about = (__doc__ or "").split("\n\n")
    notes = "\n\n".join(about[2:5])
    title = f"# Defaults\n\nWritten by `benchmarks/defaults.py`: {about[0].strip()}"
    text = f"{title}\n\n{notes}\n{table([*with_default(recorded(RESULTS)), *of_all_images()])}"
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


def main(argv: list[str]) -> None:
    """Run every variant that is not recorded yet, then write the table."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--seeds", type=int, default=1)
    usual = [name for name in VARIANTS if name not in ("default_frozen", "default_trained", "finish")]
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=usual)
    parser.add_argument("--work", type=Path, help="folder to keep the runs in, for recipes that continue from another")
    parser.add_argument("--table", action="store_true")
    for name in ("dataset", "vision_model", "text_model"):
        parser.add_argument(f"--{name}", required="--table" not in argv)
    own = parser.parse_args(argv)
    towers = [f"--vision_model={own.vision_model}", f"--text_model={own.text_model}", "--text_pooling=mean"]
    with tempfile.TemporaryDirectory() as temporary:
        work = own.work or Path(temporary)
        runs = [{"variant": name, "images": images, "seed": seed}
                for images in own.images for seed in range(own.seeds) for name in own.only]  # fmt: skip
        record_missing(RESULTS, [] if own.table else runs, partial(measure_with_start, own.dataset, towers, work))
    write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
