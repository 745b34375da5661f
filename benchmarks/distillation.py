"""What a small model gains from a teacher: the demo's towers from random weights, trained on Flickr8k.

    python benchmarks/distillation.py --dataset FLICKR8K --teacher FULL/export
    python benchmarks/distillation.py --table    # trains nothing, only writes the table again

FULL is the output folder of a run of recipe `full`. The student is trained on captions alone and with each weight of
the teacher, with equal seeds and numbers of steps. Adds one line per run to `distillation.jsonl`, skipping runs that
are recorded already, and writes `distillation.md`. Other flags are those of `train_miniclip.py`.
"""

import json
import time
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

from ablation import COLUMNS, difference, measure_run, spread
from missing_runs import record_missing, recorded

RECORD = Path(__file__).resolve().with_suffix(".jsonl")
FLAGS = {"preset": "scenes_tiny", "num_train_epochs": 12}
WEIGHTS = (0, 1, 3)  # of the teacher; 0 is none
ABOUT = """# Distillation

Written by `benchmarks/distillation.py`: Flickr8k, 1,000 validation images. The student has the towers of the demo
(preset `scenes_tiny`, images of 64 pixels) from random weights and is trained for 12 epochs; the teacher is a model of
recipe `full`. Figures are the mean and standard deviation over seeds, each at the epoch with the largest rsum, chosen
on the split that is measured. The difference in rsum is paired by seeds, with a 95 % interval (Student's t). Seconds
are those of a whole run; the first one with a teacher also computes the teacher's features.

"""


def measure(argv: list[str], teacher: str, run: dict[str, Any]) -> dict[str, Any]:
    """Train a student; the recalls of its best epoch."""
    taught = {"teacher": teacher, "teacher_kwargs": json.dumps({"weight": run["weight"]})} if run["weight"] else {}
    start = time.perf_counter()
    found = measure_run(argv, {**FLAGS, **taught, "seed": run["seed"]}, {})
    return {"seconds": round(time.perf_counter() - start), **found}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each weight that was run."""
    of_weight = {weight: [line for line in lines if line["weight"] == weight] for weight in WEIGHTS}
    by_seed = {weight: {line["seed"]: line["rsum"] for line in runs} for weight, runs in of_weight.items()}
    heads = ["trained with", "seeds", "rsum", "difference", "is one?", "seconds"]
    rows = [[*heads, *(name.replace("_", " ") for name in COLUMNS[1:])]]
    rows.append(["---"] * len(rows[0]))
    for weight, runs in of_weight.items():
        if runs:
            rsum, *others = (spread([run[name] for run in runs]) for name in COLUMNS)
            words = f"captions and the teacher, weight {weight:g}" if weight else "captions alone"
            compared = difference(by_seed[weight], by_seed[0]) if weight else ("", "")
            seconds = spread([run["seconds"] for run in runs])
            rows.append([words, str(len(runs)), rsum, *compared, seconds, *others])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Train what is not recorded yet, and write the table."""
    parser = ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", metavar="EXPORT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="train nothing")
    own, argv = parser.parse_known_args()
    if own.teacher is None and not own.table:
        parser.error("--teacher EXPORT is missing")
    runs = [{"weight": weight, "seed": seed} for seed in range(0 if own.table else own.seeds) for weight in WEIGHTS]
    record_missing(RECORD, runs, partial(measure, argv, own.teacher))
    RECORD.with_suffix(".md").write_text(ABOUT + table(recorded(RECORD)), encoding="utf-8")
    print(table(recorded(RECORD)), end="")


if __name__ == "__main__":
    main()
