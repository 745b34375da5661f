"""Memory and time of the training loss, in tiles and over the whole matrix of similarities.

    python benchmarks/loss.py > benchmarks/loss.md

First a whole step of heads on stored features, with 32,768 images and five captions each; then the loss alone with its
gradients, against `symmetric_contrastive_loss`, which holds the whole matrix and is what a Trainer gets. Each figure
of memory is the peak of a separate process. Linux only, because the peak is read from /proc.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from modeling_miniclip import MiniClipConfig, MiniClipModel, MiniClipOutput, symmetric_contrastive_loss
from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.training.grad_cache import backward_in_chunks, split_batch
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.utils.performance import keep_freed_memory, release_freed_memory

CAPTIONS, DIM = 5, 256
STEP_IMAGES, STEP_CHUNK = 32_768, 1_024
SIZES = ((32, 1), (256, 1), (1024, 1), (256, 5), (1024, 5), (2048, 5))  # images, captions of each
SECONDS_PER_SIZE = 5.0  # for which the two losses take turns
HEAD = f"""# The loss in tiles

Written by `benchmarks/loss.py`: embeddings of {DIM} dimensions in float32, threads: {torch.get_num_threads()}.

A step of heads on stored features with {STEP_IMAGES:,} images and {CAPTIONS} captions each, heads computed in chunks
of {STEP_CHUNK:,}: {{memory:.2f}} GiB in all, {{minutes:.1f}} minutes. The similarities alone would be
{STEP_IMAGES**2 * CAPTIONS * 4 / 2**30:.0f} GiB.

Loss and gradients of a batch; memory is what the computation adds to the process:

| loss | images | captions | whole matrix, MiB | tiles, MiB | whole matrix, ms | tiles, ms | tiles / whole matrix |
|---|---|---|---|---|---|---|---|"""


def peak_mib() -> float:
    """Peak memory of this process in MiB since the last reset: `VmHWM` in proc(5)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def reset_peak() -> None:
    """Reset the peak to the memory held now."""
    Path("/proc/self/clear_refs").write_text("5")


def step_of_heads(images: int) -> dict[str, float]:
    """Take one step of an optimizer; returns the peak memory of the process in GiB, and the minutes."""
    torch.manual_seed(0)
    config = MiniClipConfig(
        vision_config={"architecture": "efficientnet_lite0"},
        text_config={"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 1, "vocab_size": 100,
                     "num_attention_heads": 6, "intermediate_size": 384},
        projection_dim=DIM,
    )  # fmt: skip
    model, accelerator = MiniClipModel(config), Accelerator(cpu=True)
    heads = [p for name, p in model.named_parameters() if "projection" in name or "logit_scale" in name]
    optimizer = torch.optim.AdamW(heads, lr=1e-3)
    ids = torch.arange(images)
    batch = {
        "vision_pooler_output": torch.randn(images, model.vision_width),
        "text_pooler_output": torch.randn(images * CAPTIONS, config.text_config.hidden_size),
        "image_id": ids,
        "text_image_id": ids.repeat_interleave(CAPTIONS),
    }
    names = ("vision_pooler_output", "text_pooler_output")

    def inputs_of(chunk: dict[str, Tensor]) -> dict[str, Any]:
        return {name: chunk[name] for name in names} | {"return_logits": False}

    def loss_of(output: MiniClipOutput) -> Tensor:
        rows = (output["image_embeds"], output["text_embeds"], output["logit_scale"])
        return global_contrastive_loss(*rows, ids, batch["text_image_id"])

    start = time.perf_counter()
    chunks = split_batch(batch, STEP_CHUNK, accelerator.device)
    loss = backward_in_chunks(accelerator, model, chunks, inputs_of, loss_of)
    optimizer.step()
    assert loss.isfinite()
    return {"memory": peak_mib() / 2**10, "minutes": (time.perf_counter() - start) / 60}


def batch_of(images: int, captions: int) -> list[Tensor]:
    """Random embeddings, scale and bias that need gradients, and ids."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = normalize(torch.randn(images, DIM, generator=generator), dim=-1)
    noise = torch.randn(images * captions, DIM, generator=generator) / DIM**0.5
    text_embeds = normalize(image_embeds.repeat_interleave(captions, 0) + noise, dim=-1)
    leaves = [image_embeds, text_embeds, torch.tensor([20.0]), torch.tensor([-10.0])]
    ids = torch.arange(images)
    return [*(leaf.requires_grad_() for leaf in leaves), ids, ids.repeat_interleave(captions)]


def compute(loss_of: Callable[..., Tensor], batch: list[Tensor], loss_type: str) -> None:
    """Loss and gradients."""
    image_embeds, text_embeds, scale, bias, *ids = batch
    loss_of(image_embeds, text_embeds, scale, *ids, loss_type, bias if loss_type == "sigmoid" else None).backward()
    for leaf in batch[:4]:
        leaf.grad = None


LOSSES: dict[str, Callable[..., Tensor]] = {"whole": symmetric_contrastive_loss, "tiles": global_contrastive_loss}


def memory_of(name: str, loss_type: str, images: int, captions: int) -> dict[str, float]:
    """What the computation adds to the memory of the process, in MiB."""
    compute(LOSSES[name], batch_of(8, 1), loss_type)
    batch = batch_of(images, captions)
    release_freed_memory()
    reset_peak()
    before = peak_mib()
    compute(LOSSES[name], batch, loss_type)
    return {"memory": peak_mib() - before}


def times(loss_type: str, images: int, captions: int) -> tuple[float, float]:
    """Median milliseconds of the whole matrix and of tiles, which take turns."""
    batch = batch_of(images, captions)
    taken: dict[str, list[float]] = {name: [] for name in LOSSES}
    for loss_of in LOSSES.values():
        compute(loss_of, batch, loss_type)
    end = time.perf_counter() + SECONDS_PER_SIZE
    while time.perf_counter() < end or len(taken["tiles"]) < 3:
        for name, loss_of in LOSSES.items():
            start = time.perf_counter()
            compute(loss_of, batch, loss_type)
            taken[name].append(time.perf_counter() - start)
    whole, tiles = (1000 * statistics.median(values) for values in taken.values())
    return whole, tiles


def in_process(function: str, *arguments: object) -> dict[str, float]:
    """Run a function of this script in a process that has done nothing before."""
    argv = [sys.executable, __file__, "--call", function, *map(str, arguments)]
    result = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    values: dict[str, float] = json.loads(result)
    return values


def main() -> None:
    """Print the Markdown page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=STEP_IMAGES, help="images of the step of heads")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.call:
        name, *arguments = args.call
        functions: dict[str, Callable[..., dict[str, float]]] = {"step": step_of_heads, "memory": memory_of}
        print(json.dumps(functions[name](*(int(x) if x.isdigit() else x for x in arguments))))
        return
    print(HEAD.format(**in_process("step", args.images)), flush=True)
    for loss_type in LOSS_TYPES:
        for images, captions in SIZES:
            case = (loss_type, images, captions)
            memory = [in_process("memory", name, *case)["memory"] for name in LOSSES]
            whole, tiles = times(*case)
            print(f"| `{loss_type}` | {images:,} | {captions} | {memory[0]:.0f} | {memory[1]:.0f} | {whole:.2f} | "
                  f"{tiles:.2f} | {tiles / whole:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
