"""What hard negatives teach about word order on photographs, and what they cost in recall.

    python benchmarks/hard_negatives.py --dataset FLICKR8K --start FULL/export
    python benchmarks/hard_negatives.py --table    # trains nothing, only writes the table again

FULL is the output folder of a run of recipe `full`. Its text tower and heads are trained further, once on the captions
alone and once with swapped adjectives and nouns as hard negatives; swapped relations are kept out. Adds one line per
run to `hard_negatives.jsonl`, skipping runs that are recorded already, and writes `hard_negatives.md`. Other flags are
those of `train_miniclip.py`.
"""

import tempfile
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

from ablation import difference, spread
from missing_runs import record_missing, recorded

from modeling_miniclip.data.word_swaps.swaps import SWAP_KINDS
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import embed_set, score_model
from modeling_miniclip.evaluation.order_pairs import swapped_pairs
from modeling_miniclip.evaluation.order_test import order_report, score_pairs
from modeling_miniclip.training.command_line.parsing import parse_arguments
from train_miniclip import prepare, train

RECORD = Path(__file__).resolve().with_suffix(".jsonl")
IMAGES = ("right_image", "wrong_image")
BEFORE, ALONE, TRAINED = "before", "captions alone", ("adjectives", "nouns")
# For each variant its flags; None is the model that all others start from.
VARIANTS: dict[str, dict[str, Any] | None] = {
    BEFORE: None,
    ALONE: {"hard_negatives": "none"},
    "with hard negatives": {"hard_negatives": " ".join(TRAINED)},
}
# The image tower stays as it is: its features are computed once, and what is to be learned is in the texts.
FLAGS = {"freeze": "vision", "num_train_epochs": 5, "best_metric": "rsum"}
ABOUT = """# Hard negatives

Written by `benchmarks/hard_negatives.py`: the model of recipe `full` on Flickr8k (EfficientNet-Lite0 and
all-MiniLM-L6-v2), and after five more epochs of its text tower and heads, while its image tower stays as it is. Hard
negatives are the captions with {trained} swapped; relations are kept out. Word order is tested with the captions
of the 1,000 validation images: percentage of pairs in which the true caption scores above the swapped one with its
image and, after the slash, with another image drawn at random. What counts is the difference of the two. The last row
has what hard negatives add to it over captions alone, in points{interval}. {seeds}

"""


def measure(dataset: str, start: str, argv: list[str], run: dict[str, Any]) -> dict[str, Any]:
    """Train a variant and measure recall and word order of its best model."""
    own = VARIANTS[run["variant"]]
    if own is None:
        return evaluate(dataset, start)
    with tempfile.TemporaryDirectory() as folder:
        flags = {**FLAGS, **own, "dataset": dataset, "model_name_or_path": start, "seed": run["seed"],
                 "output_dir": folder}  # fmt: skip
        # A list is several words on the command line.
        values = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
        train(done := prepare(parse_arguments([*values, *argv])))
        return evaluate(dataset, str(done.export_dir))


def evaluate(dataset: str, export: str) -> dict[str, Any]:
    """rsum of the validation split, and for each kind of swap the percentages with the right and the wrong image."""
    encoder, data = open_encoder(export, "EXPORT"), load_eval_set(dataset, "validation")
    texts, images, _ = embed_set(encoder, data, "ensemble", 32, False)
    pairs = swapped_pairs(data.captions_by_image(), data.images, data.name)
    kinds = order_report(pairs, score_pairs(encoder, pairs, images))["kinds"]
    order = {kind: {name: kinds[kind][name] for name in ("pairs", *IMAGES)} for kind in SWAP_KINDS}
    return {"rsum": score_model(texts, images, data).metrics["rsum"], "order": order}


def gains(lines: list[dict[str, Any]], kind: str) -> dict[int, float]:
    """How far a kind's percentage with the right image lies above that with the wrong one, by seed."""
    return {line["seed"]: line["order"][kind]["right_image"] - line["order"][kind]["wrong_image"] for line in lines}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each variant that was run, and one for the differences."""
    of = {variant: [line for line in lines if line["variant"] == variant] for variant in VARIANTS}
    rows = [["trained with", "seeds", "rsum", *(f"{kind}, %" for kind in SWAP_KINDS)], ["---", *["---:"] * 5]]
    for variant, runs in of.items():
        if runs:
            cells = [
                " / ".join(spread([run["order"][kind][name] for run in runs]) for name in IMAGES)
                for kind in SWAP_KINDS
            ]
            rows.append([variant, str(len(runs)), spread([run["rsum"] for run in runs]), *cells])
    *_, best = of.values()
    rsum = [{line["seed"]: line["rsum"] for line in some} for some in (best, of[ALONE])]
    compared = [difference(gains(best, kind), gains(of[ALONE], kind))[0] for kind in SWAP_KINDS]
    rows.append(["gain", "", difference(*rsum)[0], *compared])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(lines: list[dict[str, Any]]) -> str:
    """The page with all recorded runs."""
    seeds = len({line["seed"] for line in lines})
    interval, figures = "", "Figures are those of one seed."
    if seeds > 1:
        interval = ", with a paired 95 % interval (Student's t)"
        figures = f"Figures are means and standard deviations over {seeds} seeds."
    return ABOUT.format(trained=" and ".join(TRAINED), interval=interval, seeds=figures) + table(lines)


def main() -> None:
    """Train what is not recorded yet, and write the table."""
    parser = ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", help="folder of Flickr8k")
    parser.add_argument("--start", metavar="EXPORT", help="export of recipe full")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="train nothing")
    own, argv = parser.parse_known_args()
    if not own.table and (own.dataset is None or own.start is None):
        parser.error("--dataset FLICKR8K and --start EXPORT are missing")
    runs = [{"variant": variant, "seed": seed} for seed in range(0 if own.table else own.seeds)
            for variant, flags in VARIANTS.items() if flags is not None or seed == 0]  # fmt: skip
    record_missing(RECORD, runs, partial(measure, own.dataset, own.start, argv))
    RECORD.with_suffix(".md").write_text(page(recorded(RECORD)), encoding="utf-8")
    print(table(recorded(RECORD)), end="")


if __name__ == "__main__":
    main()
