"""Time `miniclip check` without decoding, compared with a plain pass of `csv.reader` over the same file.

    python benchmarks/check.py [rows]

Each image has five rows; all image files are links to one small picture.
"""

import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from PIL import Image

from modeling_miniclip.data.checking.check import check

CAPTIONS = 5
WORDS = "a the two red small dog child boat runs sits near over on grass water street with and old man".split()


def write_data(folder: Path, rows: int) -> Path:
    """Write a CSV with this many rows, and its images. Returns the CSV."""
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
    """Print both times and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_data(Path(folder), rows)
        check(str(path), decode=False)  # imports the modules and fills the system's file cache
        start = time.process_time()
        with path.open(newline="", encoding="utf-8") as file:
            assert sum(1 for _ in csv.reader(file)) == rows + 1
        plain = time.process_time() - start
        start, wall = time.process_time(), time.perf_counter()
        report = check(str(path), decode=False)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    print(f"{rows:,} rows, {rows // CAPTIONS:,} images, problems: {report.counts or 'none'}")
    print(f"csv.reader {plain:.2f} s, miniclip check {seconds:.2f} s of CPU time ({wall:.2f} s of wall time), "
          f"{seconds / plain:.0f} times as long")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
