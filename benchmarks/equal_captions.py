"""What it gains that images with equal captions are no negatives: Flickr8k with many equal captions.

    python benchmarks/equal_captions.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM
    python benchmarks/equal_captions.py --table    # trains nothing, only writes the table again

A third of the captions, drawn at random, are replaced by one of ten phrases that say nothing about an image. Recipe
`heads` is trained on this version twice with each of three seeds: as it is, and with the captions of other images as
negatives even if they are equal to an image's own. Adds one line per run to `equal_captions.jsonl`, skipping runs that
are recorded already, and writes `equal_captions.md`. Other flags are those of `train_miniclip.py`.
"""

import csv
import tempfile
from argparse import ArgumentParser
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from ablation import difference, spread
from datasets import DatasetDict
from missing_runs import record_missing, recorded

from modeling_miniclip import load_captions
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import embed_set, score_model
from modeling_miniclip.training import setup
from modeling_miniclip.training.command_line.parsing import parse_arguments
from train_miniclip import prepare, train

HERE = Path(__file__).resolve().parent
RECORD = HERE / "equal_captions.jsonl"
PHRASES = (
    "a photo", "an image", "untitled", "my favourite picture", "summer holiday", "from the archive", "see more",
    "click to enlarge", "a great shot", "no caption",
)  # fmt: skip
REPLACED = 1 / 3
COLUMNS = {
    "original": "rsum, original captions",
    "usual": "rsum, with the phrases",
    "shared": "the same, equal captions right",
}
VARIANTS = {"negatives": "equal captions are negatives", "pairs": "equal captions are pairs"}
ABOUT = f"""# Equal captions

Written by `benchmarks/equal_captions.py`: Flickr8k with {100 * REPLACED:.0f} % of all captions replaced by one of
{len(PHRASES)} phrases, such as "{PHRASES[0]}"; recipe `heads`, EfficientNet-Lite0 and all-MiniLM-L6-v2. Figures are
the mean and standard deviation over seeds, on 1,000 validation images, of the epoch with the largest usual rsum on
this version. The first column has the original captions of the same images. The last row has the mean difference with
a paired 95 % interval (Student's t).

"""


def replace_captions(captions: list[list[str]], random: Random) -> list[list[str]]:
    """The captions of each image, with a third of them all replaced by phrases."""
    places = [(row, i) for row, several in enumerate(captions) for i in range(len(several))]
    changed = [list(several) for several in captions]
    for row, i in random.sample(places, round(REPLACED * len(places))):
        changed[row][i] = random.choice(PHRASES)
    return changed


def write_version(splits: DatasetDict, path: Path) -> None:
    """Write the version with equal captions as CSV, the same each time."""
    random = Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for name, rows in splits.items():
            changed = replace_captions(list(rows["captions"]), random)
            for image, several in zip(rows["image_id"], changed, strict=True):
                writer.writerows([image, caption, name] for caption in several)


def equal_captions_as(variant: str) -> AbstractContextManager[Any]:
    """Within the block, runs find no texts that belong to several images, if these are to be negatives."""
    return nullcontext() if variant == "pairs" else patch.object(setup, "find_shared", return_value=None)


def measure(dataset: str, argv: list[str], run: dict[str, Any]) -> dict[str, Any]:
    """Train and measure the best model."""
    with tempfile.TemporaryDirectory() as folder:
        version, images = Path(folder) / "captions.csv", str(Path(dataset) / "Images")
        write_version(load_captions(dataset), version)
        (Path(folder) / "run").mkdir()
        flags = {"recipe": "heads", "dataset": version, "image_dir": images, "seed": run["seed"],
                 "best_metric": "rsum", "output_dir": Path(folder) / "run"}  # fmt: skip
        with equal_captions_as(run["variant"]):
            done = prepare(parse_arguments([*argv, *(f"--{name}={value}" for name, value in flags.items())]))
            train(done)
        encoder = open_encoder(str(done.export_dir), "EXPORT")
        original = load_eval_set(dataset, "validation")
        changed = load_eval_set(str(version), "validation", image_dir=images)
        assert changed.image_ids == original.image_ids
        of_texts, embeds, readable = embed_set(encoder, original, "ensemble", 32, False)
        assert not readable.unreadable
        changed = changed.with_shared(readable.marks)
        of_all = torch.cat([of_texts, encoder.encode_texts(list(PHRASES), 32, False)])
        row_of = {text: row for row, text in enumerate([*original.texts, *PHRASES])}
        scores = score_model(of_all[[row_of[text] for text in changed.texts]], embeds, changed)
        assert scores.shared is not None
        return {
            "original": score_model(of_texts, embeds, original).metrics["rsum"],
            "usual": scores.metrics["rsum"],
            "shared": scores.shared.metrics["rsum"],
        }


def table(lines: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    of = {
        variant: {name: {line["seed"]: line[name] for line in lines if line["variant"] == variant} for name in COLUMNS}
        for variant in VARIANTS
    }
    rows = [["training", "seeds", *COLUMNS.values()], ["---", "---:", *["---:"] * len(COLUMNS)]]
    for variant, words in VARIANTS.items():
        if seeds := of[variant]["original"]:
            rows.append([words, str(len(seeds)), *(spread(list(of[variant][name].values())) for name in COLUMNS)])
    both = [seed for seed in of["pairs"]["original"] if seed in of["negatives"]["original"]]
    gains = (difference(of["pairs"][name], of["negatives"][name])[0] for name in COLUMNS)
    rows.append(["difference", str(len(both)), *gains])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Train what is not recorded yet, and write the table."""
    parser = ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", help="folder of Flickr8k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="train nothing")
    own, argv = parser.parse_known_args()
    if own.dataset is None and not own.table:
        parser.error("--dataset FLICKR8K is missing")
    seeds = range(0 if own.table else own.seeds)
    runs = [{"variant": variant, "seed": seed} for seed in seeds for variant in VARIANTS]
    record_missing(RECORD, runs, partial(measure, own.dataset, argv))
    RECORD.with_suffix(".md").write_text(ABOUT + table(recorded(RECORD)), encoding="utf-8")
    print(table(recorded(RECORD)), end="")


if __name__ == "__main__":
    main()
