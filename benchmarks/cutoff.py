"""How many right first results a cutoff keeps, and how many wrong ones it cuts.

    python benchmarks/cutoff.py FLICKR8K EXPORT...
    python benchmarks/cutoff.py FLICKR8K EXPORT... --sizes 100 500 --repeats 10

A number of validation images is drawn for the index, the others are removed, and all captions are searched: those of
the images present, whose first result is right or wrong, and those of the images removed, whose first result is always
wrong (though it may fit: many captions fit several images). Queries about something else are half of the package's
unrelated captions, with the other half to compare with. Six ways to judge a first result are compared, each with the
strictest cutoff that keeps 95 % of the right first results of all models, sizes and draws together. Writes
`cutoff.jsonl` and `cutoff.md`; the cutoff of the last way is `AUTO` in `modeling_miniclip/search/unrelated.py`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.search.unrelated import AUTO, UnrelatedCaptions
from modeling_miniclip.search.unrelated_texts import TEXTS
from modeling_miniclip.utils.names import public_name

FIGURES = Path(__file__).resolve().with_suffix(".jsonl")
RULES = {
    "flat": "(1 - cosine)",
    "cosine": "cosine, compared with that of each unrelated caption's best image",
    "image": "compared with unrelated captions of the same image",
    "query": "compared with all images for the same query",
    "both": "mean of these two",
    "three": "these two, and compared with all captions and images: mean (as `--cutoff` does)",
}
KINDS = ("right", "wrong", "absent", "unrelated")  # of first results: those of `HEAD`, in its order
KEPT = 0.95  # share of the right first results that a cutoff keeps
HEAD = """# Search that says when there is nothing

Written by `benchmarks/cutoff.py`: {captions} unrelated captions, validation images of Flickr8k. An index holds the
given number of images, drawn several times; the others are removed. All captions of the split are searched, and the
first result is judged by its chance: the share of unrelated captions that find an image which fits them as well.
"Fits" is defined in five ways; the first line of each block has one cosine for all queries, models and indexes
instead. The cutoff of each is the strictest one that keeps {kept:.0f} % of the right first results of all rows.

The captions of a removed image often fit another image of the index, too, so not all that is kept there is wrong.
Unrelated queries are half of the unrelated captions, compared with the other half.

| model | images | fits | cutoff | right kept, % | wrong, image present: cut, % \
| image removed: cut, % \
| unrelated query: cut, % |
|---|---:|---|---:|---:|---:|---:|---:|
"""


def deviations(scores: np.ndarray, others: np.ndarray, axis: int | None) -> np.ndarray:
    """Scores as standard deviations above the mean of other scores along an axis, or of all of them."""
    return (scores - others.mean(axis, keepdims=True)) / others.std(axis, keepdims=True)


def fits_of(rule: str, images: np.ndarray, queries: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """`[images, queries]`, how well they fit by one of the rules."""
    scores = images @ queries.T
    if rule == "cosine":
        return scores
    others = images @ captions.T
    by_image, by_query = deviations(scores, others, 1), deviations(scores, scores, 0)
    three = (deviations(scores, others, None) + by_image + by_query) / 3
    return {"image": by_image, "query": by_query, "both": (by_image + by_query) / 2, "three": three}[rule]


def chances_of(rule: str, images: np.ndarray, queries: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """`[queries]`, the chance of each first result: the share of captions that find an image which fits as well.

    With the rule `flat` it is 1 - cosine.
    """
    if rule == "flat":
        return 1 - (images @ queries.T).max(axis=0)
    best = np.sort(fits_of(rule, images, captions, captions).max(axis=0))
    first = (images @ queries.T).argmax(axis=0)
    fits = fits_of(rule, images, queries, captions)[first, np.arange(len(queries))]
    return UnrelatedCaptions(captions, best, images).chance_of(fits)


def judge(
    images: np.ndarray, texts: np.ndarray, image_of: np.ndarray, captions: np.ndarray, present: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield rule, kind of first result, and the chances of all of that kind.

    Args:
        images: `[images, dim]` of the split.
        texts: `[texts, dim]` of the split.
        image_of: `[texts]`, row of each text's image.
        captions: `[captions, dim]`, unrelated ones.
        present: `[n]` ascending rows of the images in the index.
    """
    indexed = images[present]
    first = present[(indexed @ texts.T).argmax(axis=0)]
    there = np.isin(image_of, present)
    kinds = {"right": first == image_of, "wrong": there & (first != image_of), "absent": ~there}
    for rule in RULES:
        chances = chances_of(rule, indexed, texts, captions)
        for kind, rows in kinds.items():
            yield rule, kind, chances[rows]
        yield rule, "unrelated", chances_of(rule, indexed, captions[1::2], captions[::2])


def strictest(right: np.ndarray) -> float:
    """The smallest cutoff that keeps `KEPT` of some chances."""
    return float(np.sort(right)[int(np.ceil(KEPT * len(right))) - 1])


def measure(dataset: str, exports: list[str], sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """One line per model, size and rule."""
    data = load_eval_set(dataset, "validation")
    image_of = data.text_group.numpy()
    found: dict[tuple[str, int, str, str], list[np.ndarray]] = {}
    for export in exports:
        encoder = open_encoder(export, "EXPORT")
        images = encoder.encode_images(map(data.open, range(len(data.image_ids))), 64, True).numpy()
        texts, captions = (encoder.encode_texts(some, 256, True).numpy() for some in (data.texts, TEXTS))
        for size in sizes:
            for repeat in range(repeats):
                drawn = np.random.default_rng([size, repeat]).permutation(len(images))[:size]
                for rule, kind, chances in judge(images, texts, image_of, captions, np.sort(drawn)):
                    found.setdefault((export, size, rule, kind), []).append(chances)
    all_chances = {key: np.concatenate(parts) for key, parts in found.items()}
    cutoffs = {rule: strictest(np.concatenate([c for k, c in all_chances.items() if k[2:] == (rule, "right")]))
               for rule in RULES}  # fmt: skip
    lines = []
    for export in exports:
        for size in sizes:
            for number, (rule, cutoff) in enumerate([*cutoffs.items(), ("three", AUTO)]):
                of_kind = {kind: all_chances[export, size, rule, kind] for kind in KINDS}
                kept = {kind: float((some <= cutoff).mean()) for kind, some in of_kind.items()}
                lines.append({"model": public_name(str(Path(export).resolve())), "size": size, "rule": rule,
                              "cutoff": cutoff, "auto": number == len(cutoffs), "kept": kept,
                              "first": {kind: len(some) for kind, some in of_kind.items()}})  # fmt: skip
    return lines


def document(lines: list[dict[str, Any]]) -> str:
    """Contents of `cutoff.md`."""
    text = HEAD.format(captions=len(TEXTS), kept=100 * KEPT)
    for line in lines:
        kept = [f"{100 * line['kept']['right']:.1f}"]
        kept += [f"{100 * (1 - line['kept'][kind]):.1f}" for kind in KINDS[1:]]
        rule = "`--cutoff auto`" if line["auto"] else RULES[line["rule"]]
        text += f"| {line['model']} | {line['size']:,} | {rule} | {line['cutoff']:.4g} | {' | '.join(kept)} |\n"
    return text


def main() -> None:
    """Measure, write the figures and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="captioned images with a validation split")
    parser.add_argument("exports", nargs="+", metavar="EXPORT", help="models, as for `miniclip eval`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500], help="images in the index")
    parser.add_argument("--repeats", type=int, default=10, help="draws of these images")
    args = parser.parse_args()
    lines = measure(args.dataset, args.exports, args.sizes, args.repeats)
    FIGURES.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    FIGURES.with_suffix(".md").write_text(document(lines), encoding="utf-8")
    print(document(lines))


if __name__ == "__main__":
    main()
