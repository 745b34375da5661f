"""The page of `peers.py`: rates from steps, the best peer, ratios within each turn, and tables."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench import ratios
from speed import Row

Line = dict[str, Any]
PEERS, OWN = ("open_clip", "sentence_transformers", "plain"), "package"
NAMES = {
    "open_clip": "open_clip",
    "sentence_transformers": "sentence-transformers",
    "plain": "plain loop",
    OWN: "MiniCLIP",
}
BEST, SEVERAL = ", best", ", 5 captions"  # ends of the names of sides
IMAGES, CAPTIONS = 6000, 5  # of the training split, and of each image
BATCH = 32  # images per step of the package, and pairs per step of a peer
EQUAL_TEXTS = 8  # images of the package whose texts are as many as a peer's pairs in part `texts`


def distinct(pairs: int) -> float:
    """Expected number of different images among pairs drawn at random from all pairs of the split."""
    without = 1.0  # probability that none of an image's captions is drawn
    for drawn in range(pairs):
        without *= max(0.0, 1 - CAPTIONS / (IMAGES * CAPTIONS - drawn))
    return IMAGES * (1 - without)


def rates(part: str, side: str, numbers: dict[str, float]) -> dict[str, float]:
    """Numbers of a turn with pairs and distinct images per second, if it counted steps."""
    if "steps_per_second" not in numbers:
        return numbers
    if OWN in side:
        images = float(EQUAL_TEXTS if part == "texts" else BATCH)
        pairs = images * (CAPTIONS if part == "texts" or SEVERAL in side else 1)
    else:
        pairs = EQUAL_TEXTS * CAPTIONS if part == "texts" else BATCH
        images = distinct(pairs)
    steps = numbers["steps_per_second"]
    return {**numbers, "pairs_per_second": steps * pairs, "images_per_second": steps * images}


def trial(work: str, side: str, settings: str) -> str:
    """Name of a trial."""
    return f"{work}, {side}: {settings or 'none'}"


def fastest(lines: list[Line], work: str, side: str) -> str:
    """The settings of the fastest trial of a side that did not fail; none if there was no trial."""
    tried = [x for x in lines if x["side"] == trial(work, side, x["settings"]) and "images_per_second" in x]
    return str(max(tried, key=lambda x: x["images_per_second"])["settings"]) if tried else ""


@dataclass(frozen=True)
class Comparison:
    """A ratio of the package and the best peer.

    Args:
        end: end of the names of the peers' sides: started as documented, or at their best.
        own: side of the package.
        least: whether the best is the least.
    """

    what: str
    part: str
    number: str
    own: str
    end: str
    target: str
    least: bool = False


def _both(what: str, part: str, number: str, own: str, targets: tuple[str, str]) -> list[Comparison]:
    ends = (("as documented", ""), ("at their best", BEST))
    return [
        Comparison(f"{what}, peers {how}", part, number, own + end, end, target)
        for (how, end), target in zip(ends, targets, strict=True)
    ]


COMPARISONS = [
    *_both("training, 1 caption per image, images per second", "train", "images_per_second", OWN, ("3", "1.8")),
    *_both("training, 5 captions, equal images per step, pairs per second", "train", "pairs_per_second",
           OWN + SEVERAL, ("9", "5")),
    *_both("training, 5 captions, equal texts per step, pairs per second", "texts", "pairs_per_second", OWN, ("", "")),
    *_both("encoding, images per second", "encode", "images_per_second", OWN, ("2", "2")),
    Comparison("peak memory, 1 caption per image", "memory", "gib", OWN, "", "at most 1.1", least=True),
    Comparison("peak memory, 5 captions, equal images per step", "memory", "gib", OWN + SEVERAL, "", "at most 1.1",
               least=True),
]  # fmt: skip


def values(lines: list[Line], part: str, side: str, number: str) -> list[float]:
    """A number of a side in each turn of a part."""
    return [x[number] for x in lines if (x["group"], x["side"]) == (part, side) and number in x]


def best_peer(lines: list[Line], comparison: Comparison) -> str | None:
    """The side of a peer with the best median, or None if no peer was measured."""
    medians = {
        side: statistics.median(found)
        for side in (peer + comparison.end for peer in PEERS)
        if (found := values(lines, comparison.part, side, comparison.number))
    }
    choose: Callable[..., str] = min if comparison.least else max
    return choose(medians, key=lambda side: medians[side]) if medians else None


def compared(lines: list[Line]) -> str:
    """Rows of the ratios to the best peer: median and range over the turns."""
    rows = []
    for each in COMPARISONS:
        peer = best_peer(lines, each)
        own = each.own if values(lines, each.part, each.own, each.number) else each.own.removesuffix(BEST)
        row = Row(each.part, each.what, each.number, (peer or "", own), each.target)
        if peer and (found := ratios(row, lines)):
            spread = f"{min(found):.2f} to {max(found):.2f}"
            rows.append(
                f"| {each.what} | {label(peer)} | {statistics.median(found):.2f} | {spread} | {each.target} |\n"
            )
    return "".join(rows)


def label(side: str) -> str:
    """Name of a side in a table."""
    name, _, rest = side.partition(", ")
    return NAMES[name] + (f", {rest.replace('best', 'at its best')}" if rest else "")


def cell(found: list[float], digits: int = 1) -> str:
    """Median and range; empty without a value."""
    if not found:
        return ""
    middle, low, high = (f"{f(found):.{digits}f}" for f in (statistics.median, min, max))
    return middle if len(found) == 1 else f"{middle} ({low} to {high})"


def table(lines: list[Line], columns: list[tuple[str, str, str, int]], sides: Iterable[str]) -> str:
    """A Markdown table with a row for each measured side; a column is its title, part, number and digits."""
    rows = []
    for side in sides:
        cells = [cell(values(lines, part, side, number), digits) for _, part, number, digits in columns]
        if any(cells):
            rows.append(f"| {label(side)} | {' | '.join(cells)} |\n")
    titles = " | ".join(title for title, *_ in columns)
    return f"| side | {titles} |\n|---|{'---:|' * len(columns)}\n" + "".join(rows)


def trials_table(lines: list[Line]) -> str:
    """What was tried to find each side's fastest settings."""
    rows = []
    for line in (x for x in lines if x["group"] == "trials"):
        work, _, rest = line["side"].partition(", ")
        name, _, settings = rest.partition(": ")
        found = f"{line['images_per_second']:.1f}" if "error" not in line else "failed"
        chosen = "chosen" if found != "failed" and fastest(lines, work, name) == line["settings"] else ""
        rows.append(f"| {work} | {NAMES[name]} | `{settings}` | {found} | {chosen} |\n")
    return "| work | side | settings | images per second | |\n|---|---|---|---:|---|\n" + "".join(rows)


QUALITY = """## Recall after {minutes:g} minutes

All layers of the peers are trained at one rate, which was not tuned, as is usual with them; the plain loop has the
tutorial's rate. MiniCLIP has its recipe `full`, which was chosen on these validation images, and fits its schedule to
the time. So the difference is that of what each gives without a search. All figures are those at the end.

"""
HEAD = """# Other libraries

Written by `make bench-peers`: medians and ranges of {turns} turns on {processor}, {cores} cores, torch {torch}, commit
{commit}; open_clip {open_clip_torch}, sentence-transformers {sentence_transformers}. EfficientNet-Lite0 and
all-MiniLM-L6-v2, Flickr8k at 224 x 224 pixels, batches of 32, all layers trained, the augmentation of
[plain.yaml](plain.yaml), frozen batch norms, float32. Each turn is a fresh process, and the sides take turns. Other
processes took {others:.0f} % of the processors' time.

"At its best" is with this package's settings of the allocator and the fastest of the settings at the end of this page;
MiniCLIP always has those of the allocator. Ratios are those to the best peer, within each turn:

| what | best peer | ratio | range | target |
|---|---|---:|---:|---:|
"""
SIDES = [side + end for side in (*PEERS, OWN) for end in ("", BEST)]
SEVERAL_SIDES = [OWN + SEVERAL, OWN + SEVERAL + BEST]
TRAIN = [
    ("pairs per second", "train", "pairs_per_second", 1),
    ("distinct images per second", "train", "images_per_second", 1),
    ("s to the end of the first step", "train", "first_step_seconds", 1),
    ("s of imports", "train", "import_seconds", 1),
    ("peak memory, GiB", "memory", "gib", 2),
]
TEXTS = [
    ("pairs per second", "texts", "pairs_per_second", 1),
    ("distinct images per second", "texts", "images_per_second", 1),
]
NOTES = """
- To a peer, five captions are five rows, so its step of 32 pairs is the same with one and with five captions: that is
  the column of equal images per step. With equal texts per step, a peer has 40 pairs and MiniCLIP 8 images with five
  captions each; five times 32 pairs are more than a peer's step can hold in the memory of a small machine.
- Distinct images are those that are in a step at least once; for pairs in random order, their expected number.
- Times count from the start of the process. Memory is the proportional set size of the process and its loader's
  processes, measured in turns of their own, every 0.1 s.
- open_clip trains with `open_clip_train.main` and a table of pairs, sentence-transformers with
  `SentenceTransformerTrainer`, a `Router` and `MultipleNegativesRankingLoss` in both directions, MiniCLIP with
  `train_miniclip.py`, and the [plain loop](plain_loop.py) is the tutorial's. Their transforms of training images are
  replaced by the common augmentation. open_clip pads texts to 77 tokens unless told otherwise.
- Encoding: JPEG files in batches of 32, open_clip in a `DataLoader`, sentence-transformers with `encode`, the plain
  loop as timm documents it, MiniCLIP with `encode_images`. open_clip's images are not enlarged by 1/0.875 and cropped.
"""


def page(lines: list[Line], facts: dict[str, Any]) -> str:
    """The whole page."""
    turns = len({x["turn"] for x in lines if x["group"] == "train"})
    others = statistics.median(x["others_percent"] for x in lines if "others_percent" in x)
    parts = [
        HEAD.format(**facts, turns=turns, others=others) + compared(lines),
        "## Training, one caption per image\n\n" + table(lines, TRAIN, SIDES),
        "## Training, five captions per image\n\nEqual images per step, 32:\n\n"
        + table(lines, TRAIN[:2] + TRAIN[4:], [*SIDES[: 2 * len(PEERS)], *SEVERAL_SIDES]),
        "Equal texts per step, 40:\n\n" + table(lines, TEXTS, SIDES),
        "## Encoding\n\n" + table(lines, [("images per second", "encode", "images_per_second", 1)], SIDES),
        "## Settings that were tried\n\n" + trials_table(lines),
    ]
    if any(x["group"] == "quality" for x in lines):
        minutes = next(x["minutes"] for x in lines if x["group"] == "quality")
        columns = [("rsum", "quality", "rsum", 1), ("steps", "quality", "steps", 0)]
        parts.append(QUALITY.format(minutes=minutes) + table(lines, columns, SIDES))
    return "\n".join(parts) + NOTES
