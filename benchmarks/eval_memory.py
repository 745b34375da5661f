"""Peak memory and time of ranking images and captions in both directions without the full similarity matrix.

    python benchmarks/eval_memory.py > benchmarks/eval_memory.md

Does to random unit-norm embeddings of 256 dimensions what `miniclip eval` does to those of a model: ranks in both
directions, and the first ten results of each query. Each size runs in a separate process; `--images` sets the sizes,
with five captions per image. Linux only, because peak memory is read from /proc and reset there.
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
HEAD = f"""# Ranking without the full similarity matrix

Written by `benchmarks/eval_memory.py`: random embeddings of {DIM} dimensions, {CAPTIONS} captions per image, ranks
both ways and the first {TOP} results of each query. Threads: {THREADS}. Memory is the peak of the process, without the
embeddings and including the results.

| images | captions | full matrix, GiB | peak memory, MiB | minutes | CPU minutes |
|---|---|---|---|---|---|"""


def resident(what: str, pid: int | str = "self") -> float:
    """Memory of a process in MiB: `VmRSS` is the current value, `VmHWM` the peak since the last reset (proc(5))."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def reset_peak() -> None:
    """Reset `VmHWM` to the memory held now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(images: int) -> str:
    """Rank in both directions; return a row of the table."""
    torch.manual_seed(0)
    group = torch.arange(images)
    owner = group.repeat_interleave(CAPTIONS)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, DIM), dim=1)
    text_embeds = torch.empty(len(owner), DIM)
    for rows in range(0, len(owner), 65_536):  # in parts, so that this is not the peak
        text_embeds[rows : rows + 65_536] = image_embeds[owner[rows : rows + 65_536]]
    for part in text_embeds.split(65_536):
        part.add_(torch.randn_like(part), alpha=0.2).div_(part.norm(dim=1, keepdim=True))
    keep_freed_memory()
    release_freed_memory()  # memory of the set-up would otherwise be reused and not counted
    reset_peak()
    before, wall, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
    rank_keys(text_embeds, image_embeds, owner, group, TOP)
    rank_keys(image_embeds, text_embeds, group, owner, TOP)
    minutes = (time.perf_counter() - wall) / 60, (time.process_time() - processor) / 60
    matrix = images * len(owner) * 4 / 2**30
    figures = f"{matrix:.2f} | {resident('VmHWM') - before:.0f} | {minutes[0]:.2f} | {minutes[1]:.2f}"
    return f"| {images:,} | {len(owner):,} | {figures} |"


def main() -> None:
    """Print the Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    args = parser.parse_args()
    print(HEAD)
    for images in args.images:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (images,)), flush=True)


if __name__ == "__main__":
    main()
