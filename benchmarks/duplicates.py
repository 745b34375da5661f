"""Which altered copies `miniclip duplicates` finds, and how many distinct photographs it takes for copies.

    python benchmarks/duplicates.py FLICKR8K HEADS/export DEMO/export

For each model, 240 photographs and 60 altered copies of some of them (15 of each kind) are indexed, and 1,000 other
photographs without copies. `miniclip check`, which compares pixels instead of embeddings, sees the same files. Groups
among the distinct photographs are printed with their files, to be looked at: a few are of the same scene.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from modeling_miniclip import update_index
from modeling_miniclip.data.checking.near_duplicates import find_image_copies, inspect_image
from modeling_miniclip.search.duplicates import default_threshold, find_duplicates
from modeling_miniclip.search.index import ImageIndex

PHOTOGRAPHS, COPIES, OTHERS = 240, 60, 1_000
FIXED = 0.95  # a threshold that does not depend on the model, for comparison


def cropped(image: Image.Image) -> Image.Image:
    """The image without 5 % of its width and height on each side."""
    margin_x, margin_y = image.width // 20, image.height // 20
    return image.crop((margin_x, margin_y, image.width - margin_x, image.height - margin_y))


KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {  # change, quality of the JPEG
    "encoded again, quality 50": (lambda image: image, 50),
    "resized to half": (lambda image: image.resize((image.width // 2, image.height // 2)), 90),
    "cropped by 5 % on each side": (cropped, 90),
    "mirrored": (ImageOps.mirror, 90),
}


def write_images(files: list[Path], folder: Path) -> dict[str, tuple[str, str]]:
    """Copy photographs and add altered copies.

    Returns:
        By the name of each altered copy, its kind and the name of its original.
    """
    folder.mkdir()
    made = {}
    for file in files:
        shutil.copyfile(file, folder / file.name)
    for i, file in enumerate(files[:COPIES]):
        kind = list(KINDS)[i % len(KINDS)]
        change, quality = KINDS[kind]
        name = f"copy_{i:02d}.jpg"
        with Image.open(file) as image:
            change(image.convert("RGB")).save(folder / name, quality=quality)
        made[name] = (kind, file.name)
    return made


def linked_pairs(index: ImageIndex, threshold: float) -> set[frozenset[str]]:
    """Pairs of images, by name, that are in the same group."""
    names = [Path(name).name for name in index.entries["id"].to_pylist()]
    groups = [[names[row] for row in group.rows] for group in find_duplicates(index, threshold)]
    return {frozenset((a, b)) for group in groups for a in group for b in group if a < b}


def found_by_kind(pairs: set[frozenset[str]], made: dict[str, tuple[str, str]]) -> Counter[str]:
    """Number of altered copies of each kind that are paired with their original."""
    return Counter(kind for name, (kind, original) in made.items() if frozenset((name, original)) in pairs)


def table_row(title: str, threshold: str, found: Counter[str], wrong: int, among_others: int) -> str:
    """A row of the table."""
    each = COPIES // len(KINDS)
    cells = [title, threshold, *(f"{found[kind]} of {each}" for kind in KINDS), str(wrong), str(among_others)]
    return "| " + " | ".join(cells) + " |"


def measure_model(export: Path, photos: Path, others: Path, made: dict[str, tuple[str, str]], work: Path) -> None:
    """Print the rows of a model: with its default threshold, and with the fixed one."""
    indexes = []
    for folder in (photos, others):
        update_index(work / f"{folder.name}.index", [folder], export, progress=False)
        indexes.append(ImageIndex.open(work / f"{folder.name}.index"))
    copies = {frozenset((name, original)) for name, (_, original) in made.items()}
    own = [default_threshold(index) for index in indexes]
    for title, thresholds in (("default", own), ("fixed", [FIXED, FIXED])):
        pairs, other_pairs = (
            linked_pairs(index, threshold) for index, threshold in zip(indexes, thresholds, strict=True)
        )
        values = " / ".join(f"{threshold:.4f}" for threshold in dict.fromkeys(thresholds))
        name = f"{export.parent.name}, {title}"
        print(table_row(name, values, found_by_kind(pairs, made), len(pairs - copies), len(other_pairs)))
        if title == "default":
            for pair in sorted(map(sorted, (pairs - copies) | other_pairs)):
                print("<!--", *pair, "-->")
    for folder in (photos, others):
        shutil.rmtree(work / f"{folder.name}.index")


def measure_check(photos: Path, others: Path, made: dict[str, tuple[str, str]]) -> None:
    """Print the row of `miniclip check`."""
    pairs, other_pairs = (
        {
            frozenset(copy[:2])
            for copy in find_image_copies({file.name: inspect_image(str(file)) for file in sorted(folder.iterdir())})
        }
        for folder in (photos, others)
    )
    copies = {frozenset((name, original)) for name, (_, original) in made.items()}
    found = found_by_kind(pairs, made)
    print(table_row("`miniclip check` (pixels)", "", found, len(pairs - copies), len(other_pairs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flickr8k", type=Path, help="folder with captions.csv and Images/")
    parser.add_argument("exports", type=Path, nargs="+", help="folders of exported models")
    args = parser.parse_args()
    files = sorted((args.flickr8k / "Images").iterdir())
    chosen = np.random.default_rng(0).permutation(len(files))[: PHOTOGRAPHS + OTHERS]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        made = write_images([files[i] for i in chosen[:PHOTOGRAPHS]], work / "photos")
        (work / "others").mkdir()
        for i in chosen[PHOTOGRAPHS:]:
            shutil.copyfile(files[i], work / "others" / files[i].name)
        kinds = " | ".join(KINDS)
        print(f"| model, threshold | cosine | {kinds} | other pairs among these 300 | pairs among 1,000 others |")
        print("|" + "---|" * (len(KINDS) + 4))
        for export in args.exports:
            measure_model(export, work / "photos", work / "others", made, work)
        measure_check(work / "photos", work / "others", made)


if __name__ == "__main__":
    main()
