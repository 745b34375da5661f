"""Train variants of a recipe and compare them. Variants with frozen towers share features that are computed once.

    python benchmarks/ablation.py heads --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/ablation.py reductions --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/ablation.py tuned --dataset FLICKR8K --model_name_or_path HEADS_OF_2000/export
    python benchmarks/ablation.py full --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

    python benchmarks/ablation.py full --seeds 3 ...    # at least three seeds of each variant
    python benchmarks/ablation.py heads --table         # trains nothing, only writes the table again

Adds one line per run to `<experiment>.jsonl`, skipping runs that are recorded already, and writes `<experiment>.md`.
Variants are compared by the largest rsum of their epochs, because the losses of different variants are not comparable.
The difference of each variant from the first one is paired: equal seeds have equal batches, captions and crops.
"""

import itertools
import json
import statistics
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missing_runs import record_missing, recorded

from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.evaluation.metrics import student_interval
from modeling_miniclip.training.command_line.parsing import parse_arguments
from train_miniclip import prepare, train

HERE = Path(__file__).resolve().parent
COLUMNS = ("rsum", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1", "image_to_text_R@10")
MEASURED = "Flickr8k, 1,000 validation images, EfficientNet-Lite0 and all-MiniLM-L6-v2"
STRONGER = json.dumps([
    {"name": "RandomResizedCrop", "scale": [0.35, 1.0], "ratio": [0.75, 1.333]},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "ColorJitter", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05, "p": 0.8},
])  # fmt: skip
FLIP = '[{"name": "HorizontalFlip"}]'


@dataclass
class Experiment:
    """Variants to compare.

    Args:
        title: heading of the page.
        text: introduction of the table.
        flags: flags that all variants share.
        variants: for each variant, the flags that differ and the number of seeds.
    """

    title: str
    text: str
    flags: dict[str, Any]
    variants: list[tuple[dict[str, Any], int]]


EXPERIMENTS = {
    "heads": Experiment(
        "Ablation of recipe `heads`",
        "The towers are frozen. Each line is recipe `heads` with the named changes, here with `projection_dropout` "
        "0.5. The recipe's value of 0.7 comes from this table.",
        {"recipe": "heads", "projection_dropout": 0.5},
        [
            ({}, 3),
            ({"image_size": 256}, 3),
            ({"image_size": 224}, 1),
            ({"image_size": 224, "crop_pct": 0.875}, 3),
            ({"projection_dim": 256}, 3),
            ({"projection_dim": 2048}, 1),
            ({"projection_depth": 1}, 3),
            ({"captions_per_image": 1}, 3),
            ({"batch_size": 128}, 1),
            ({"batch_size": 1024}, 1),
            ({"projection_dropout": 0.1}, 1),
            ({"projection_dropout": 0.6}, 3),
            ({"projection_dropout": 0.7}, 3),
            ({"projection_dropout": 0.8}, 3),
            ({"projection_dropout": 0.7, "num_train_epochs": 24}, 1),
            ({"head_learning_rate": 1e-3}, 1),
            ({"weight_decay": 0.01}, 1),
            ({"num_train_epochs": 24}, 1),
            ({"ema_decay": 0.95}, 1),
        ],
    ),
    "reductions": Experiment(
        "Losses with several captions per image",
        "The towers are frozen; the heads have 256 dimensions. With one caption per image, `softmax_sum` and "
        "`softmax_mean` are the same. All runs have the same learning rate and number of steps: too few for the "
        "temperature and the bias of `sigmoid` to move far from their initial values.",
        {
            "text_pooling": "mean", "freeze": "both", "augmentation": "[]", "batch_size": 256, "num_train_epochs": 15,
            "head_learning_rate": 1e-3, "weight_decay": 0.1, "dropout": 0.3, "lr_scheduler_type": "cosine",
            "warmup_steps": 20, "projection_dim": 256, "image_size": 224,
        },
        [
            ({"captions_per_image": captions, "loss_type": loss_type}, 3)
            for captions, loss_type in itertools.product((1, 2, 3, 5), LOSS_TYPES)
            if (captions, loss_type) != (1, "softmax_sum")
        ],
    ),
    "tuned": Experiment(
        "Ablation of `heads_then_full`",
        "Each line has the settings of the run `heads_then_full` with the named changes. To save time, all runs use "
        "2,000 of the 6,000 training images and 3 epochs, and start from heads that recipe `heads` trained on these "
        "2,000: compare the lines with each other, not with the recorded runs.",
        {
            "recipe": str(HERE / "heads_then_full" / "arguments.yaml"), "max_train_images": 2000,
            "num_train_epochs": 3, "warmup_steps": 10,
        },
        [
            ({}, 1),
            ({"freeze": "vision"}, 1),
            ({"freeze_batch_norm": "false"}, 1),
            ({"frozen_vision_fraction": 0.0}, 1),
            ({"layer_decay": 1.0}, 1),
            ({"head_learning_rate": 1e-3}, 1),
            ({"vision_learning_rate": 5e-5, "text_learning_rate": 1e-5}, 1),
            ({"augmentation": FLIP}, 1),
        ],
    ),
    "full": Experiment(
        "Ablation of recipe `full`",
        "Each line is recipe `full` with the named changes. To save time, all runs use 2,000 of the 6,000 training "
        "images and 4 epochs: compare the lines with each other, not with the recorded runs.",
        {"recipe": "full", "max_train_images": 2000, "num_train_epochs": 4, "warmup_steps": 10},
        [
            ({}, 1),
            ({"projection_dim": 256, "projection_dropout": 0.3}, 1),
            ({"captions_per_image": 5}, 1),
            ({"batch_size": 256, "chunk_size": 128}, 1),
            ({"text_learning_rate": 1e-4}, 1),
            ({"frozen_vision_fraction": 0.25}, 1),
            ({"augmentation": STRONGER}, 1),
        ],
    ),
}  # fmt: skip


def settings_of(line: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded run, without its seed."""
    return {name: value for name, value in line.items() if "R@" not in name and name not in ("epoch", "rsum", "seed")}


def measure_run(argv: list[str], flags: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Train; return the settings and the recalls of the epoch with the largest rsum."""
    with tempfile.TemporaryDirectory() as folder:
        values = {**flags, **settings, "best_metric": "rsum", "output_dir": folder}
        run = prepare(parse_arguments([*argv, *(f"--{name}={value}" for name, value in values.items())]))
        train(run)
        lines = [json.loads(line) for line in run.log.path.read_text(encoding="utf-8").splitlines()]
    validations = (line for line in lines if line["split"] == "validation" and line["step"] > 0)
    best = max(validations, key=lambda line: line["rsum"])
    return {**settings, **{name: best[name] for name in best if "R@" in name or name in ("epoch", "rsum")}}


def table(experiment: Experiment, lines: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each variant that has been run."""
    heads = ["variant", "seeds", "rsum", "difference", "is one?", *(name.replace("_", " ") for name in COLUMNS[1:])]
    first = rsum_by_seed(experiment.variants[0][0], lines)
    rows = [heads, ["---"] * len(heads)]
    for settings, _ in experiment.variants:
        runs = [line for line in lines if settings_of(line) == settings]
        if runs:
            rsum, *others = (spread([run[name] for run in runs]) for name in COLUMNS)
            compared = difference(rsum_by_seed(settings, lines), first) if len(rows) > 2 else ("", "")
            rows.append([label(settings), str(len(runs)), rsum, *compared, *others])
    about = (
        f"Written by `benchmarks/ablation.py`: {MEASURED}. {experiment.text} Figures are the mean and standard "
        "deviation over seeds, each at the epoch with the largest rsum, chosen on the split that is measured. "
        "The difference in rsum from the first row is the mean over the seeds that both have, with a paired 95 % "
        "interval (Student's t): it is one if the interval leaves out zero, and one seed does not show it. Of many "
        "rows without any difference, one in twenty seems to have one."
    )
    return f"# {experiment.title}\n\n{about}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rsum_by_seed(settings: dict[str, Any], lines: list[dict[str, Any]]) -> dict[int, float]:
    """The rsum of the runs of a variant, by seed."""
    return {line["seed"]: line["rsum"] for line in lines if settings_of(line) == settings}


def difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[str, str]:
    """The paired difference of two variants with its interval, and whether it is one.

    Args:
        ours, theirs: rsum by seed.
    """
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return (f"{pairs[0]:+.1f}" if pairs else ""), "unknown"
    low, high = student_interval(pairs)
    return f"{statistics.mean(pairs):+.1f} [{low:+.1f}, {high:+.1f}]", "yes" if low > 0 or high < 0 else "no"


def label(settings: dict[str, Any]) -> str:
    """Flags of a variant; an augmentation is shown by the names of its transforms."""
    texts = [
        f"`{name}` {', '.join(step['name'] for step in json.loads(value)) if name == 'augmentation' else value}"
        for name, value in settings.items()
    ]
    return ", ".join(texts) or "unchanged"


def spread(values: list[float]) -> str:
    """Mean, and standard deviation if there are several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main(name: str, argv: list[str]) -> None:
    """Run every variant that is not recorded yet, then write the table."""
    experiment, path = EXPERIMENTS[name], HERE / f"{name}.jsonl"
    options = ArgumentParser(allow_abbrev=False, add_help=False)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--table", action="store_true")
    own, argv = options.parse_known_args(argv)
    counts = [(settings, 0 if own.table else max(seeds, own.seeds)) for settings, seeds in experiment.variants]
    todo = [{**settings, "seed": seed} for settings, seeds in counts for seed in range(seeds)]
    record_missing(
        path, todo, lambda settings: measure_run(argv, experiment.flags, settings),
        lambda line, settings: {**settings_of(line), "seed": line["seed"]} == settings,
    )  # fmt: skip
    path.with_suffix(".md").write_text(table(experiment, recorded(path)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
