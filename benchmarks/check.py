"""How long `miniclip check` takes without decoding, beside a plain pass of `csv.reader` over the same file.

    python benchmarks/check.py [rows]

Each image has five rows; its file is a link to one small picture.
"""

import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from PIL import Image

from modeling_miniclip.data.check import check

CAPTIONS = 5
WORDS = "a the two red small dog child boat runs stands near over on grass water street with and old man".split()


def write_data(folder: Path, rows: int) -> Path:
    """A CSV of so many rows and its images."""
    (folder / "Images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "picture.png")
    rng = Random(0)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "caption"])
        for row in range(rows):
            if row % CAPTIONS == 0:
                os.link(folder / "picture.png", folder / "Images" / f"{row // CAPTIONS}.png")
            writer.writerow([row, f"{row // CAPTIONS}.png", " ".join(rng.choices(WORDS, k=11))])
    return folder / "captions.csv"


def main(rows: int) -> None:
    """Print the seconds of both, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder), rows)
        check(str(path), decode=False)  # modules imported, files in the system's cache
        start = time.process_time()
        with path.open(newline="", encoding="utf-8") as file:
            assert sum(1 for _ in csv.reader(file)) == rows + 1
        plain = time.process_time() - start
        start, wall = time.process_time(), time.perf_counter()
        report = check(str(path), decode=False)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    print(f"{rows:,} rows of {rows // CAPTIONS:,} images, problems: {report.counts or 'none'}")
    print(f"csv.reader {plain:.2f} s, miniclip check {seconds:.2f} s of one core ({wall:.2f} s passed), "
          f"{seconds / plain:.0f} times as long")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
