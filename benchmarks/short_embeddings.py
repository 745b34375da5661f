"""Recall against bytes per vector: a Matryoshka model, ordinary models of each length, an ordinary model cut short.

    python benchmarks/short_embeddings.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/short_embeddings.py --seeds 3 ...    # at least three seeds of each model
    python benchmarks/short_embeddings.py --table          # trains nothing, only writes the table again

All models are trained with recipe `heads`, whose features are computed once. Adds one line per run to
`short_embeddings.jsonl`, skipping runs that are recorded already; writes and prints `short_embeddings.md`.
"""

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation import spread
from missing_runs import record_missing, recorded
from torch import Tensor

from modeling_miniclip import MiniClipModel, retrieval_metrics
from modeling_miniclip.inference.encode import truncate_embeddings
from modeling_miniclip.search.embeddings_file import CodedEmbeddings
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.features import embed_split
from train_miniclip import prepare, train

RESULTS = Path(__file__).resolve().with_suffix(".jsonl")
FULL, LENGTHS = 1024, (32, 64, 128, 256, 512)
BYTES: dict[str, Callable[[int], int]] = {  # of a vector, by its dimensions
    "float32": lambda dim: 4 * dim,
    "float16": lambda dim: 2 * dim,
    "int8": lambda dim: dim + 4,
}
# For each model the flags that differ from the recipe. An ordinary model is named by its dimensions.
MATRYOSHKA = "matryoshka"
MODELS: dict[str, dict[str, Any]] = {
    MATRYOSHKA: {"matryoshka_dims": ",".join(map(str, LENGTHS))},
    **{str(dim): {"projection_dim": dim} for dim in (*LENGTHS, FULL)},
}
HEAD = """# Short embeddings

Written by `benchmarks/short_embeddings.py`: recipe `heads` on Flickr8k, 1,000 validation images, EfficientNet-Lite0
and all-MiniLM-L6-v2. Two models have {full:,} dimensions, of which the first ones are kept, normalised again: one was
trained with `--matryoshka_dims {lengths}`, and one without ("cut short"). "Trained at this length" is another model in
each row, whose projection heads are narrower, too.

Images or texts that are searched are stored as float32 or, where it says so, as int8; queries are float32. Each cell
has rsum and, after the slash, recall at 10 from text to image{deviations} over {seeds}.

| dimensions | bytes, float32 | bytes, int8 | Matryoshka | Matryoshka, int8 | cut short | cut short, int8 | \
trained at this length |
|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def stored(embeddings: Tensor, dtype: str) -> Tensor:
    """What a search sees of `[n, dim]` embeddings that are stored in a format, in float32."""
    if dtype == "int8":
        return torch.from_numpy(CodedEmbeddings.from_rows(embeddings.numpy())[:])
    return embeddings.to(getattr(torch, dtype)).float()


def figures_of(images: Tensor, texts: Tensor, image_row: Tensor, dtype: str) -> dict[str, float]:
    """The metrics if what is searched, images or texts, is stored in a format.

    Args:
        images: `[B, dim]`, unit norm.
        texts: `[N, dim]`, unit norm.
        image_row: `[N]`, row of each text's image.
        dtype: the format.
    """
    by_text = retrieval_metrics(stored(images, dtype), texts, image_row)
    by_image = retrieval_metrics(images, stored(texts, dtype), image_row)
    recalls = {name: value for name, value in by_text.items() if name.startswith("text_to_image_R@")}
    recalls |= {name: value for name, value in by_image.items() if name.startswith("image_to_text_R@")}
    return recalls | {"rsum": sum(recalls.values())}


def measure(argv: list[str], own: dict[str, Any]) -> dict[str, Any]:
    """Train a model; return its figures at all lengths that it is shown at, by `dim dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"recipe": "heads", **MODELS[own["model"]], "seed": own["seed"], "output_dir": folder}
        values |= {"checkpointing_steps": 10**6}  # none: a run takes minutes
        run = prepare(parse_arguments([*argv, *(f"--{name}={value}" for name, value in values.items())]))
        train(run)
        best = MiniClipModel.from_pretrained(run.export_dir).eval().to(run.accelerator.device)
        record = partial(run.bad_images.record_undecodable, "validation")
        images, texts, image_row = embed_split(
            best, run.validation_loader, run.processor, run.accelerator.device, "measure", record
        )
    dims = (*LENGTHS, FULL) if own["model"] in (MATRYOSHKA, str(FULL)) else (int(own["model"]),)
    figures = {}
    for dim in dims:
        short = truncate_embeddings(images, dim), truncate_embeddings(texts, dim)
        for dtype in BYTES:
            figures[f"{dim} {dtype}"] = figures_of(*short, image_row, dtype)
    return {"figures": figures}


def table(lines: list[dict[str, Any]]) -> str:
    """The page with all recorded runs."""
    seeds = len({line["seed"] for line in lines})
    count, deviations = (f"{seeds} seeds", " (mean ± standard deviation)") if seeds > 1 else ("one seed", "")
    page = HEAD.format(full=FULL, lengths=",".join(map(str, LENGTHS)), seeds=count, deviations=deviations)
    for dim in (*LENGTHS, FULL):
        ordinary = [cell(lines, str(FULL), dim, dtype) for dtype in ("float32", "int8")]
        cells = [f"{dim:,}", *(f"{BYTES[dtype](dim):,}" for dtype in ("float32", "int8"))]
        cells += [cell(lines, MATRYOSHKA, dim, dtype) for dtype in ("float32", "int8")]
        cells += [*ordinary, cell(lines, str(dim), dim, "float32")]
        page += f"| {' | '.join(cells)} |\n"
    half = largest_change(lines, "float16")
    return f"{page}\nfloat16, with half the bytes of float32, changes rsum by at most {half:.1f} in any run.\n"


def cell(lines: list[dict[str, Any]], model: str, dim: int, dtype: str) -> str:
    """The figures of a model at a length and in a format; empty if it has not been run."""
    kind = f"{dim} {dtype}"
    runs = [line["figures"][kind] for line in lines if line["model"] == model and kind in line["figures"]]
    return " / ".join(spread([run[name] for run in runs]) for name in ("rsum", "text_to_image_R@10")) if runs else ""


def largest_change(lines: list[dict[str, Any]], dtype: str) -> float:
    """The largest difference between the rsum of a format and that of float32."""
    changes = [
        abs(figures["rsum"] - line["figures"][f"{kind.split()[0]} float32"]["rsum"])
        for line in lines
        for kind, figures in line["figures"].items()
        if kind.split()[1] == dtype
    ]
    return max(changes, default=0.0)


def main(argv: list[str]) -> None:
    """Run every model that is not recorded yet, then write and print the table."""
    options = ArgumentParser(allow_abbrev=False, add_help=False)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--table", action="store_true")
    own, argv = options.parse_known_args(argv)
    runs = [{"model": model, "seed": seed} for seed in range(0 if own.table else own.seeds) for model in MODELS]
    record_missing(RESULTS, runs, partial(measure, argv))
    page = table(recorded(RESULTS))
    RESULTS.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
