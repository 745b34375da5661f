"""Peak memory of training steps by batch size, with and without chunks.

    python benchmarks/memory.py FLICKR8K LITE0 MINILM > benchmarks/memory.md
    python benchmarks/memory.py FLICKR8K LITE0 MINILM --only 32 2048:32    # two of the rows

FLICKR8K is a folder with Images/ and captions; LITE0 and MINILM are folders of EfficientNet-Lite0 and
all-MiniLM-L6-v2, or their names on the Hub. Each row is two steps of `train_miniclip.py` with all layers of both
towers trained: the second one has the state of the optimizer, and its batch is read after the first one is dropped.
Linux only: memory is the proportional set size of the main process and its loader workers, which counts shared pages
once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

SCRIPT = Path(__file__).resolve().parents[1] / "train_miniclip.py"
# Batch size and chunk size. Without chunks, memory grows with the batch: 256 images need more than most machines have.
# The first two have chunks of the same size.
CASES = ((32, None), (2048, 32), (64, None), (64, 16), (512, 16), (2048, 16))
HEAD = """# Peak memory of a training step

Written by `benchmarks/memory.py`: EfficientNet-Lite0 and all-MiniLM-L6-v2, all layers trained, images of 224 x 224
pixels, {steps} steps. The last column is what a row needs more than a batch of the size of its chunks, if that was
measured.

| batch size | chunk size | peak memory, GiB | pixels of the batch, GiB | more than one chunk, GiB |
|---|---|---|---|---|"""
INTERVAL = 0.1  # seconds between two measurements


def peak_of(argv: list[str]) -> float:
    """Run a command and return the peak memory of all its processes together, in GiB."""
    peak = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            total = 0
            for member in (process, *process.children(recursive=True)):
                with suppress(OSError, IndexError):  # it has ended
                    rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text(encoding="utf-8")
                    total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
            peak = max(peak, total)
            time.sleep(INTERVAL)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read())
    return peak / 2**30


def case(text: str) -> tuple[int, int | None]:
    """Batch size and, after a colon, chunk size."""
    batch_size, _, chunk_size = text.partition(":")
    return int(batch_size), int(chunk_size) if chunk_size else None


def main() -> None:
    """Print the Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("vision_model")
    parser.add_argument("text_model")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="+", type=case, default=CASES, metavar="BATCH[:CHUNK]")
    args = parser.parse_args()
    print(HEAD.format(steps=args.steps), flush=True)
    plain: dict[int, float] = {}  # peak by batch size, without chunks
    for batch_size, chunk_size in args.only:
        with tempfile.TemporaryDirectory() as folder:
            flags = {
                "dataset": args.dataset,
                "vision_model": args.vision_model,
                "text_model": args.text_model,
                "recipe": Path(__file__).parent / "plain.yaml",
                "text_pooling": "mean",
                "batch_size": batch_size,
                "chunk_size": chunk_size,
                "max_steps": args.steps,
                "max_validation_images": 64,
                "output_dir": f"{folder}/run",
            }
            argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
            peak = peak_of([sys.executable, str(SCRIPT), *argv])
        if chunk_size is None:
            plain[batch_size] = peak
        more = f"{peak - plain[chunk_size]:.2f}" if chunk_size in plain else ""
        pixels = batch_size * 3 * 224 * 224 / 2**30
        print(f"| {batch_size} | {chunk_size or 'none'} | {peak:.2f} | {pixels:.2f} | {more} |", flush=True)


if __name__ == "__main__":
    main()
