"""Compare the losses on several captions an image: heads on the features of frozen towers, recipe `flickr8k_lite`.

python benchmarks/reductions.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

Adds a line a run to `losses.jsonl` beside this file, leaving out what is there already; `report.py` makes the table.
The epoch with the largest rsum counts, for the losses themselves cannot be compared.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from modeling_miniclip import features
from modeling_miniclip.arguments import parse_arguments
from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from train_miniclip import prepare, train

RESULTS = Path(__file__).resolve().parent / "losses.jsonl"
CAPTIONS, SEEDS = (1, 2, 3, 5), (0, 1, 2)


def computed_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the model and the rows of a split, remembered by their number: the towers never change here."""
    known: dict[int, Any] = {}

    def remembered(model: Any, rows: Any, *args: Any) -> Any:
        if len(rows) not in known:
            known[len(rows)] = function(model, rows, *args)
        return known[len(rows)]

    return remembered


def measure_run(argv: list[str], **settings: Any) -> dict[str, Any]:
    """Train, and give the settings with the recalls of the epoch with the largest rsum."""
    with tempfile.TemporaryDirectory() as folder:
        values = {**settings, "recipe": "flickr8k_lite", "best_metric": "rsum", "output_dir": folder}
        run = prepare(parse_arguments([*argv, *(f"--{name}={value}" for name, value in values.items())]))
        train(run)
        lines = [json.loads(line) for line in run.log.path.read_text(encoding="utf-8").splitlines()]
    best = max((line for line in lines if line["split"] == "validation"), key=lambda line: line["rsum"])
    return {**settings, **{name: best[name] for name in best if "R@" in name or name in ("epoch", "rsum")}}


def main(argv: list[str]) -> None:
    """Run what is not recorded yet."""
    features.frozen_image_features = computed_once(features.frozen_image_features)
    features.frozen_text_features = computed_once(features.frozen_text_features)
    names = ("captions_per_image", "loss_type", "seed")
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for values in itertools.product(CAPTIONS, LOSS_TYPES, SEEDS):
        settings = dict(zip(names, values, strict=True))
        same_loss = settings["captions_per_image"] == 1 and settings["loss_type"] == "softmax_sum"
        if not same_loss and not any(settings.items() <= line.items() for line in done):
            result = measure_run(argv, **settings)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
