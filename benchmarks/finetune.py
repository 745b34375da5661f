"""Fine-tuning across domains: what is gained on the drawn scenes, what is lost on Flickr8k, and what it costs.

    python benchmarks/finetune.py --flickr8k FLICKR8K --start FULL/export
    python benchmarks/finetune.py --table                        # trains nothing, only writes the page again

`FULL` is the output folder of `--recipe full` on Flickr8k. Each variant of recipe `finetune` is trained on 1,000
scenes from this model with `--retention_dataset FLICKR8K --blend auto`, in a process of its own, whose peak memory is
measured. Adds one line per run to `finetune.jsonl`, skipping runs that are recorded already; writes and prints
`finetune.md`. Other flags are those of `train_miniclip.py`.
"""

import json
import resource
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

from ablation import spread
from missing_runs import record_missing, recorded

RECORD = Path(__file__).resolve().with_suffix(".jsonl")
RESULT = "RESULT "  # start of the line that a child process prints
# Flags of each variant that differ from the recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything, 1e-5": {},
    "everything but half of the image tower, 1e-5": {"frozen_vision_fraction": 0.5},
    "adapters of rank 8, 1e-3": {"lora_rank": 8, "learning_rate": 1e-3},
    "everything, 1e-4": {"learning_rate": 1e-4},
    "adapters of rank 8, 2e-4": {"lora_rank": 8, "learning_rate": 2e-4},
    "everything but half of the image tower, 1e-4": {"learning_rate": 1e-4, "frozen_vision_fraction": 0.5},
    "everything, 1e-4, batch norm in training": {"learning_rate": 1e-4, "freeze_batch_norm": "false"},
}
# Smaller than the recipe's run, as there are many of these.
SMALL = {
    "max_train_images": 1000, "batch_size": 64, "num_train_epochs": 5, "warmup_steps": 8, "max_validation_images": 300,
}  # fmt: skip
FINE_TUNED = 1.0  # share of the fine-tuned model
ABOUT = """# Fine-tuning across domains

Written by `benchmarks/finetune.py`: the model of recipe `full` on Flickr8k (EfficientNet-Lite0 and all-MiniLM-L6-v2),
tuned for five epochs on 1,000 drawn scenes with recipe `finetune`. Each cell has rsum on 300 validation images of the
scenes and, after the slash, on 300 of Flickr8k{deviations}, for {seeds}. A blend of 0.5 is the mean of the weights
before and after; `--blend auto` has chosen the share of those after by both datasets.

"""
COSTS = """
Trained parameters, seconds per step of 64 images, peak memory, and size of a checkpoint without the best model in it,
{device}:

"""


def train_variant(argv: list[str]) -> dict[str, Any]:
    """Train in this process and measure; `argv` are the flags of `train_miniclip.py`."""
    import torch

    from modeling_miniclip.training.command_line.parsing import parse_arguments
    from modeling_miniclip.training.finetune.blend import blend_with_start
    from train_miniclip import prepare, train

    run = prepare(parse_arguments(argv))
    trained = sum(parameter.numel() for parameter in run.unwrapped_model.parameters() if parameter.requires_grad)
    train(run)
    seconds, device = run.pace.step_seconds, run.accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    newest = max((run.output_dir / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file() and "export" not in path.parts)
    blend_with_start(run)
    lines = [json.loads(line) for line in run.log.path.read_text(encoding="utf-8").splitlines()]
    blends = [[line["share"], line["rsum"], line["retained_rsum"]] for line in lines if line["split"] == "blend"]
    chosen = next(line["share"] for line in lines if line["split"] == "chosen blend")
    return {
        "blends": blends, "chosen": chosen, "trained": trained, "step_seconds": seconds, "memory_mib": memory,
        "checkpoint_mib": size / 2**20, "device": device.type,
    }  # fmt: skip


def measure(flickr8k: str, start: str, argv: list[str], run: dict[str, Any]) -> dict[str, Any]:
    """Train a variant in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        flags = {
            "recipe": "finetune", "dataset": "scenes", "model_name_or_path": start, "retention_dataset": flickr8k,
            "blend": "auto", "seed": run["seed"], "output_dir": f"{folder}/run", "save_total_limit": 1,
            **SMALL, **VARIANTS[run["variant"]],
        }  # fmt: skip
        values = [f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, __file__, "--train", *values, *argv]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(result.removeprefix(RESULT))


def at_share(line: dict[str, Any], share: float) -> tuple[float, float]:
    """rsum on both datasets at a share of the fine-tuned model."""
    return next((here, there) for one, here, there in line["blends"] if one == share)


def cell(pairs: list[tuple[float, float]]) -> str:
    """Means over seeds on both datasets."""
    return " / ".join(spread([pair[i] for pair in pairs]) for i in (0, 1))


def page(lines: list[dict[str, Any]]) -> str:
    """Both tables."""
    seeds = len({line["seed"] for line in lines})
    deviations = " (mean ± standard deviation)" if seeds > 1 else ""
    text = ABOUT.format(deviations=deviations, seeds=f"{seeds} seeds" if seeds > 1 else "one seed")
    text += "| trained | before | after | blend of 0.5 | `--blend auto` | its share |\n"
    text += "|---|---:|---:|---:|---:|---:|\n"
    costs = "| trained | parameters | seconds per step | memory, MiB | checkpoint, MiB |\n|---|---:|---:|---:|---:|\n"
    for variant in VARIANTS:
        runs = [line for line in lines if line["variant"] == variant]
        if not runs:
            continue
        cells = [cell([at_share(run, share) for run in runs]) for share in (0.0, FINE_TUNED, 0.5)]
        cells.append(cell([at_share(run, run["chosen"]) for run in runs]))
        shares = ", ".join(f"{run['chosen']:g}" for run in runs)
        text += f"| {variant} | {' | '.join(cells)} | {shares} |\n"
        means = {name: sum(run[name] for run in runs) / len(runs)
                 for name in ("step_seconds", "memory_mib", "checkpoint_mib")}  # fmt: skip
        costs += (
            f"| {variant} | {runs[0]['trained']:,} | {means['step_seconds']:.2f} | {means['memory_mib']:,.0f} | "
            f"{means['checkpoint_mib']:,.0f} |\n"
        )
    devices = sorted({line["device"] for line in lines})
    return text + COSTS.format(device=f"on {' and '.join(devices)}") + costs


def main(argv: list[str]) -> None:
    """Run every variant that is not recorded yet, then write and print the page."""
    if argv[:1] == ["--train"]:
        print(RESULT + json.dumps(train_variant(argv[1:])), flush=True)
        return
    options = ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    options.add_argument("--flickr8k", help="folder of Flickr8k")
    options.add_argument("--start", help="export of recipe full on Flickr8k")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--table", action="store_true", help="train nothing")
    own, argv = options.parse_known_args(argv)
    if not own.table and (own.flickr8k is None or own.start is None):
        options.error("--flickr8k FLICKR8K and --start EXPORT are missing")
    seeds = range(0 if own.table else own.seeds)
    runs = [{"variant": variant, "seed": seed} for seed in seeds for variant in VARIANTS]
    record_missing(RECORD, runs, partial(measure, own.flickr8k, own.start, argv))
    text = page(recorded(RECORD))
    RECORD.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
