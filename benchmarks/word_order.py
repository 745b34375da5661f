"""Word order on the built-in scenes: their own swapped captions, which no training uses, and the built-in swaps.

    python benchmarks/word_order.py runs/demo/export runs/swaps/export --page word-order.html

Prints a table for each export. `--page` writes an HTML page of the last one.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Any

from modeling_miniclip.data.scenes import build_scenes, describe_pair, swap_attributes, validation_scenes
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.order_page import order_page
from modeling_miniclip.evaluation.order_pairs import OrderPairs, swapped_pairs
from modeling_miniclip.evaluation.order_test import order_report, order_table, score_pairs

OWN = "scenes' own swaps"


def own_pairs(images: Any) -> OrderPairs:
    """The first caption of each validation scene, and the same wording of the scene with an attribute swapped."""
    pairs = OrderPairs(OWN, images)
    for i, scene in enumerate(validation_scenes(len(images))):
        true, swapped = describe_pair(scene, swap_attributes(scene, Random(i)), Random(i))
        pairs.add(i, true[0], swapped[0], OWN)
    return pairs


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="+", metavar="EXPORT")
    parser.add_argument("--page", metavar="FILE", help="HTML page of the scenes' own swaps")
    arguments = parser.parse_args()
    split = build_scenes(num_train=1)["validation"]
    images = [row["image"] for row in split]
    pairs = [own_pairs(images), swapped_pairs(split["captions"], images, "built-in swaps")]
    for export in arguments.exports:
        encoder = open_encoder(export, "EXPORT")
        embeds = encoder.encode_images(images, 64, False)
        scores = [score_pairs(encoder, some, embeds) for some in pairs]
        reports = [order_report(some, found) for some, found in zip(pairs, scores, strict=True)]
        head, _ = order_table(reports[0])
        print(f"\n{export}\n\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
        for report in reports:
            for row in order_table(report)[1]:
                print(f"| {' | '.join(row)} |")
        if arguments.page:
            shown = {"order_test": reports[0], "model": export, "dataset": "scenes"}
            Path(arguments.page).write_text(order_page(shown, pairs[0], scores[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
