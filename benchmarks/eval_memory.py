"""Peak memory and time of ranking captions and images, both ways, without the matrix of their similarities.

    python benchmarks/eval_memory.py > benchmarks/eval_memory.md

Random unit-norm embeddings of 256 dimensions; what `miniclip eval` does with those of a model: ranks both ways and the
first ten results of each query. Each line is a process of its own; `--images` takes other sizes, with five captions an
image. Linux only, whose record of the largest memory can be reset.
"""

import argparse
import multiprocessing
import re
import time
from pathlib import Path

import torch

from modeling_miniclip.evaluation.metrics import rank_keys
from modeling_miniclip.utils.performance import keep_freed_memory, release_freed_memory

CAPTIONS, DIM, TOP, THREADS = 5, 256, 10, torch.get_num_threads()
HEAD = f"""# Ranking without the matrix of similarities

Written by `benchmarks/eval_memory.py`: random embeddings of {DIM} dimensions, {CAPTIONS} captions per image, ranks
both ways and the first {TOP} results of each query. Threads: {THREADS}. Memory is the peak of the process, without the
embeddings and including the results.

| images | captions | matrix, GiB | memory, MiB | minutes | processor minutes |
|---|---|---|---|---|---|"""


def resident(what: str, pid: int | str = "self") -> float:
    """`VmRSS`, what a process holds, or `VmHWM`, the most since the last reset, in MiB; see proc(5)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def forget_peak() -> None:
    """Let `VmHWM` begin anew at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(images: int) -> str:
    """Rank both ways and return a line of the table."""
    torch.manual_seed(0)
    group = torch.arange(images)
    owner = group.repeat_interleave(CAPTIONS)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, DIM), dim=1)
    text_embeds = torch.empty(len(owner), DIM)
    for rows in range(0, len(owner), 65_536):  # in parts, that making them is not the peak
        text_embeds[rows : rows + 65_536] = image_embeds[owner[rows : rows + 65_536]]
    for part in text_embeds.split(65_536):
        part.add_(torch.randn_like(part), alpha=0.2).div_(part.norm(dim=1, keepdim=True))
    keep_freed_memory()
    release_freed_memory()  # of making them, or it would be used again and not be counted
    forget_peak()
    before, wall, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    rank_keys(text_embeds, image_embeds, owner, group, TOP)
    rank_keys(image_embeds, text_embeds, group, owner, TOP)
    minutes = (time.perf_counter() - wall) / 60, (time.process_time() - processor) / 60
    matrix = images * len(owner) * 4 / 2**30
    figures = f"{matrix:.2f} | {resident('VmHWM') - before:.0f} | {minutes[0]:.2f} | {minutes[1]:.2f}"
    return f"| {images:,} | {len(owner):,} | {figures} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    args = parser.parse_args()
    print(HEAD)
    for images in args.images:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (images,)), flush=True)


if __name__ == "__main__":
    main()
