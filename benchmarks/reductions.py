"""Compare the losses on several captions an image: heads on the features of frozen towers, recipe `flickr8k_lite`.

    python benchmarks/reductions.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

Adds a line a run to `reductions.jsonl`, leaving out what is there already, and writes `reductions.md` from it. Not the
loss decides, which means something else for each, but the largest rsum of a run's epochs.
"""

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from modeling_miniclip.arguments import parse_arguments
from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from train_miniclip import prepare, train

RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
CAPTIONS, SEEDS = (1, 2, 3, 5), (0, 1, 2)
COLUMNS = ("rsum", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1", "image_to_text_R@10")
HEAD = f"""# The losses on several captions an image

Written by `benchmarks/reductions.py`: recipe `flickr8k_lite` on Flickr8k, 1,000 validation images, EfficientNet-Lite0
and all-MiniLM-L6-v2 frozen. Mean and standard deviation over {len(SEEDS)} seeds of the epoch with the largest rsum,
chosen on the split that is measured. With one caption an image `softmax_sum` and `softmax_mean` are the same. All have
the recipe's learning rate and number of steps: in so few the temperature and the bias of `sigmoid` stay near their
start.

| captions an image | loss | {" | ".join(name.replace("_", " ") for name in COLUMNS)} |
|---|---|{"---|" * len(COLUMNS)}
"""


def cases() -> list[dict[str, Any]]:
    """The settings of all runs."""
    names = ("captions_per_image", "loss_type", "seed")
    runs = [dict(zip(names, values, strict=True)) for values in itertools.product(CAPTIONS, LOSS_TYPES, SEEDS)]
    return [run for run in runs if (run["captions_per_image"], run["loss_type"]) != (1, "softmax_sum")]


def recorded() -> list[dict[str, Any]]:
    """The lines of the runs so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def measure_run(argv: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and give the settings with the recalls of the epoch with the largest rsum."""
    with tempfile.TemporaryDirectory() as folder:
        values = {**settings, "recipe": "flickr8k_lite", "best_metric": "rsum", "output_dir": folder}
        run = prepare(parse_arguments([*argv, *(f"--{name}={value}" for name, value in values.items())]))
        train(run)
        lines = [json.loads(line) for line in run.log.path.read_text(encoding="utf-8").splitlines()]
    best = max((line for line in lines if line["split"] == "validation"), key=lambda line: line["rsum"])
    return {**settings, **{name: best[name] for name in best if "R@" in name or name in ("epoch", "rsum")}}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each number of captions and each loss."""
    rows = []
    for captions, loss_type in itertools.product(CAPTIONS, LOSS_TYPES):
        runs = [x for x in lines if (x["captions_per_image"], x["loss_type"]) == (captions, loss_type)]
        if runs:
            numbers = ([run[name] for run in runs] for name in COLUMNS)
            cells = [f"{statistics.mean(n):.1f} ± {statistics.stdev(n):.1f}" for n in numbers]
            rows.append(f"| {captions} | `{loss_type}` | {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


def main(argv: list[str]) -> None:
    """Run what is not recorded yet, then write the table."""
    done = recorded()
    for settings in cases():
        if not any(settings.items() <= line.items() for line in done):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(measure_run(argv, settings)) + "\n")
    RESULTS.with_suffix(".md").write_text(table(recorded()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
