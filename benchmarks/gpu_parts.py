"""The parts of `gpu.py`: `python benchmarks/gpu_parts.py NAME ARGUMENTS SETUP`, both as JSON, prints the rows of one.

A row has `what`, what was `found`, and whether that is `ok`, or None for a figure without a target.
"""

import copy
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_setup import HERE, Setup, flags_of
from plain_loop import PlainLoop
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

import train_miniclip
from modeling_miniclip import ImageIndex, encode_images, encode_texts, export, retrieval_metrics, update_index
from modeling_miniclip.data.loading.collation import model_inputs
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.loader import BatchLoader
from modeling_miniclip.data.loading.order import RowOrder
from modeling_miniclip.inference.loading import load_export
from modeling_miniclip.search.exact import Neighbours
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.memory import steps as memory_steps
from modeling_miniclip.training.memory.sizes import StepSizes
from modeling_miniclip.training.run import TrainingRun
from modeling_miniclip.training.setup import load_splits
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.training.towers.layers import set_training_mode

CPU = torch.device("cpu")
FOUND = 10  # images that a search returns
Rows = list[dict[str, Any]]


def row(what: str, found: str, ok: bool | None = None) -> dict[str, Any]:
    """A row of the table."""
    return {"what": what, "found": found, "ok": ok}


def device_of(setup: Setup) -> torch.device:
    """The device that everything is measured on."""
    return CPU if setup.on_cpu else torch.accelerator.current_accelerator(check_available=True) or CPU


def wait_for(device: torch.device) -> None:
    """Wait until a device has computed everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_gib(device: torch.device) -> float:
    """Peak memory of the device, or of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- agreement with the CPU ------------------------------------------------------------------------------------------


def agreement(setup: Setup) -> Rows:
    """Loss and gradients in float32 on both, and recall in bf16."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows: Rows = []
    for pair in setup.pairs:
        rows += same_gradients(setup, pair)
    return rows + same_recall(setup)


def same_gradients(setup: Setup, pair: str) -> Rows:
    """Differences of loss and gradients of one batch, without dropout and with frozen batch norms."""
    arguments = parse_arguments(flags_of(setup, pair, batch_size=setup.agreement))
    split = load_splits(arguments)["train"]
    model, processor = create_model(arguments, list(split["captions"]))
    (batch,) = BatchLoader(CaptionRows(split, processor), [[(0, i) for i in range(setup.agreement)]], 0)

    def on(device: torch.device) -> tuple[float, Tensor]:
        here = copy.deepcopy(model).to(device).eval()
        output = here(**model_inputs(batch, processor, device), return_logits=False)
        ids = (batch["image_id"].to(device), batch["text_image_id"].to(device))
        loss = global_contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale, *ids)
        loss.backward()
        gradients = [p.grad.flatten().double().cpu() for p in here.parameters() if p.grad is not None]
        return loss.item(), torch.cat(gradients)

    (loss, gradient), (found_loss, found_gradient) = on(CPU), on(device_of(setup))
    of_loss = abs(found_loss - loss) / abs(loss)
    of_gradient = ((found_gradient - gradient).norm() / gradient.norm()).item()
    return [
        row(f"{pair}: difference of the loss, float32", f"{of_loss:.1e}", of_loss < 1e-5),
        row(f"{pair}: difference of the gradient, float32", f"{of_gradient:.1e}", of_gradient < 1e-3),
    ]


def same_recall(setup: Setup) -> Rows:
    """Recall of a trained model on the CPU in float32, and on the device in bf16."""
    pair, precision = next(iter(setup.pairs)), None if setup.on_cpu else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        argv = flags_of(setup, pair, output_dir=f"{folder}/run", feature_cache_dir=f"{folder}/features",
                        mixed_precision=precision, **setup.recall)  # fmt: skip
        start = time.perf_counter()
        exported = train_miniclip.main(argv)
        seconds = time.perf_counter() - start
        model, processor = load_export(str(exported), "export")
    split = load_splits(parse_arguments(argv))["validation"]
    texts = [text for captions in split["captions"] for text in captions]
    owners = [i for i, captions in enumerate(split["captions"]) for _ in captions]

    def rsum(device: torch.device, is_bf16: bool) -> float:
        model.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            images = encode_images(model, (each["image"] for each in split), processor, 64, progress=False)
            return retrieval_metrics(images, encode_texts(model, texts, processor, progress=False), owners)["rsum"]

    expected, found = rsum(CPU, False), rsum(device_of(setup), True)
    what = f"{pair}: rsum in float32 on the CPU, in bf16 on the device, after {seconds:.0f} s of training"
    # With 16 images, one more or less of them is 6 points.
    return [row(what, f"{expected:.1f}, {found:.1f}", abs(found - expected) < (60.0 if setup.on_cpu else 6.0))]


# --- a run that is killed --------------------------------------------------------------------------------------------


def resume(setup: Setup) -> Rows:
    """A killed run continues as one that was not, with the state of the optimizer and the scale of fp16's loss."""
    batch_size, steps, killed = setup.resume
    with tempfile.TemporaryDirectory() as folder:

        def flags(name: str, **values: Any) -> list[str]:
            return flags_of(
                setup, next(iter(setup.pairs)), output_dir=f"{folder}/{name}", batch_size=batch_size, max_steps=steps,
                num_train_epochs=99, checkpointing_steps=killed // 2, logging_steps=1, max_validation_images=16,
                mixed_precision=None if setup.on_cpu else "fp16", **values,
            )  # fmt: skip

        if start_run(flags("whole")).wait():
            return [row("a run", "it failed", False)]
        process = start_run(flags("killed"))
        while process.poll() is None and len(losses(folder, "killed")) < killed:
            time.sleep(0.005)
        process.kill()
        if process.wait() == 0 or len(losses(folder, "killed")) >= steps:
            return [row("a run that is killed", "it ended before it was killed", False)]
        done, again = len(losses(folder, "killed")), flags("killed", resume_from_checkpoint="latest")
        rows = same_state(again, Path(folder, "killed", "checkpoints"), setup)
        if start_run(again).wait():
            return [*rows, row("a run that is killed and resumed", "it failed", False)]
        whole, resumed = losses(folder, "whole"), losses(folder, "killed")
    if len(resumed) != steps:
        return [*rows, row("a run that is killed and resumed", f"{len(resumed)} of {steps} steps", False)]
    # Relative to the largest loss: that of a last batch of one image is 0.
    apart = max(abs(whole[step] - resumed[step]) for step in range(done, min(done + 10, steps))) / max(whole)
    is_finite = all(map(math.isfinite, whole + resumed))
    precision = "" if setup.on_cpu else " in fp16"
    what = f"killed after {done} of {steps} steps and resumed{precision}: difference of the loss"
    return [*rows, row(what, f"{apart:.1e}", is_finite and apart < (1e-4 if setup.on_cpu else 0.05))]


def same_state(argv: list[str], checkpoints: Path, setup: Setup) -> Rows:
    """A run that is resumed has the optimizer's state of the latest checkpoint, and its scale of the loss."""
    latest = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    saved = torch.load(latest / "optimizer.bin", map_location=CPU, weights_only=True)["state"]
    run = train_miniclip.prepare(parse_arguments(argv))
    state = run.optimizer.state_dict()["state"]
    pairs = [(value, state[key][name]) for key, values in saved.items() for name, value in values.items()]
    equal = sum(torch.equal(value, loaded.cpu()) for value, loaded in pairs)
    what = "tensors of the optimizer that a resumed run has as they were saved"
    rows = [row(what, f"{equal} of {len(pairs)}", bool(pairs) and equal == len(pairs))]
    if not setup.on_cpu:
        kept = torch.load(latest / "scaler.pt", map_location=CPU, weights_only=True)
        scaler = run.accelerator.scaler.state_dict()
        found = f"{kept['scale']:g} and {scaler['scale']:g}, {kept['_growth_tracker']} and {scaler['_growth_tracker']}"
        rows.append(row("scale of the loss and steps since it changed, saved and resumed", found, kept == scaler))
    run.close()
    return rows


def start_run(argv: list[str]) -> "subprocess.Popen[bytes]":
    """Start `train_miniclip.py` in a process."""
    return subprocess.Popen([sys.executable, str(HERE.parent / "train_miniclip.py"), *argv], stdout=subprocess.DEVNULL)


def losses(folder: str, name: str) -> list[float]:
    """Losses of the steps that a run has logged."""
    log = Path(folder, name, "metrics.jsonl")
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(setup: Setup) -> Rows:
    """A step in six tenths of the memory that it takes is computed in chunks."""
    pair, (batch_size, _), device = next(iter(setup.pairs)), setup.batches[0], device_of(setup)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(setup, pair, folder, batch_size=batch_size)
        batches = batches_of(run)
        take_step(run, next(batches))  # with the state of the optimizer
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        take_step(run, next(batches))
        whole, run.sizes = peak_gib(device), StepSizes()
        with less_memory(device, 0.6 * whole):
            take_step(run, next(batches))
        chunk = run.arguments.chunk_size
        run.close()
    what = f"{pair}: images at a time in a step of {batch_size}, with six tenths of its {whole:.1f} GiB"
    return [row(what, str(chunk), chunk is not None and chunk < batch_size)]


@contextmanager
def less_memory(device: torch.device, gib: float) -> Iterator[None]:
    """Within the block, this process gets so much of a GPU, or finds nothing left on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(gib / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        with mock.patch.object(memory_steps, "free_memory", lambda: 0):
            yield


# --- speed -----------------------------------------------------------------------------------------------------------


def prepare(setup: Setup, pair: str, folder: str, **values: Any) -> TrainingRun:
    """A run that is ready to train."""
    argv = flags_of(setup, pair, output_dir=folder, num_train_epochs=99, max_validation_images=16, **values)
    run = train_miniclip.prepare(parse_arguments(argv))
    set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
    return run


class Endless:
    """The rows of all epochs as those of one, so that every batch is full and is read ahead.

    Args:
        order: order of the rows of each epoch.
    """

    num_rows = sys.maxsize

    def __init__(self, order: RowOrder):
        self.order = order

    def pieces(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """See `RowOrder`."""
        yield from self.order.pieces(epoch, start)
        for later in count(epoch + 1):
            yield from self.order.pieces(later)


def batches_of(run: TrainingRun) -> Iterator[dict[str, Any]]:
    """As many full batches as it takes."""
    run.train_batches.order = Endless(run.train_batches.order)
    return iter(run.train_loader)


def take_step(run: TrainingRun, batch: dict[str, Any]) -> None:
    """A step of `train_miniclip.py`."""
    batch.pop("undecodable", None)
    train_miniclip.train_step(run, batch, len(batch["image_id"]))


def timed(
    setup: Setup, batches: Iterator[dict[str, Any]], step: Callable[[dict[str, Any]], None], size: str
) -> dict[str, float]:
    """Rates of some steps.

    Args:
        setup: numbers of steps.
        batches: batches of the steps.
        step: takes one.
        size: tensor of a batch that has a row per image.
    """
    device = device_of(setup)
    images, waited, start = 0, 0.0, 0.0
    for number in range(setup.warm_up + setup.steps):
        if number == setup.warm_up:
            wait_for(device)
            images, waited, start = 0, 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images += len(batch[size])
        step(batch)
    wait_for(device)
    seconds = time.perf_counter() - start
    return {"images": images / seconds, "waiting": 100 * waited / seconds, "memory": peak_gib(device)}


def described(what: str, rates: dict[str, float]) -> Rows:
    """The row of timed steps, with one caption per image."""
    found = f"{rates['images']:.0f} images and pairs/s, {rates['memory']:.1f} GiB, {rates['waiting']:.0f} % waiting"
    return [row(what, found)]


def train(setup: Setup, pair: str, batch_size: int, chunk_size: int | None, compiled: bool) -> Rows:
    """Steps of `train_miniclip.py`."""
    values = {"batch_size": batch_size, "chunk_size": chunk_size, "compile_towers": str(compiled).lower()}
    eager = (
        torch.compiler.set_stance("force_eager") if setup.on_cpu else nullcontext()
    )  # compiling takes minutes there
    with tempfile.TemporaryDirectory() as folder, eager:
        run = prepare(setup, pair, folder, **values)
        rates = timed(setup, batches_of(run), lambda batch: take_step(run, batch), "image_id")
        run.close()
    chunks = "" if chunk_size is None else f" in chunks of {chunk_size}"
    return described(f"{pair}: {batch_size} images{chunks}, {'compiled' if compiled else 'eager'}", rates)


def plain(setup: Setup, pair: str, batch_size: int) -> Rows:
    """Steps of the plain loop on the device, in the same precision."""
    device = device_of(setup)
    loop = PlainLoop(parse_arguments(flags_of(setup, pair, batch_size=batch_size)), captions_per_image=1)
    loop.model.to(device)
    set_training_mode(loop.model, loop.arguments.freeze, freeze_batch_norm=True)
    workers, pins = loop.arguments.num_workers, device.type == "cuda"
    loader = DataLoader(loop.loader.dataset, batch_size, shuffle=True, num_workers=workers, pin_memory=pins,
                        persistent_workers=workers > 0)  # fmt: skip

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    def step(batch: dict[str, Tensor]) -> None:
        inputs = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = loop.model(**inputs).logits_per_image
        labels = torch.arange(len(logits), device=device)
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.t(), labels)) / 2
        loop.optimizer.zero_grad()
        loss.backward()
        loop.optimizer.step()

    return described(f"{pair}: {batch_size} images, plain loop", timed(setup, batches(), step, "input_ids"))


# --- the loss, and search --------------------------------------------------------------------------------------------


def loss(setup: Setup) -> Rows:
    """The loss in tiles over many rows, against one that is computed block by block."""
    (rows, dim), device = setup.loss, device_of(setup)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    left, right = (normalize(each, dim=-1).to(device).requires_grad_() for each in (images, images + noise))
    scale, ids = torch.tensor([20.0], device=device, requires_grad=True), torch.arange(rows, device=device)
    for _ in range(2):  # the first one warms up
        wait_for(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, start = peak_gib(device), time.perf_counter()
        found = global_contrastive_loss(left, right, scale, ids, ids)
        found.backward()
        wait_for(device)
        seconds, peak = time.perf_counter() - start, peak_gib(device) - before
    expected = by_blocks(left.detach(), right.detach(), 20.0)
    apart = abs(found.item() - expected) / expected
    return [
        row(f"loss and gradients of {rows:,} rows in tiles", f"{seconds:.2f} s, {peak:.1f} GiB more"),
        row(f"loss of {rows:,} rows: difference from blocks", f"{apart:.1e}", apart < 1e-4),
    ]


def by_blocks(images: Tensor, texts: Tensor, scale: float, block: int = 1024) -> float:
    """CLIP's loss of rows of pairs, some rows at a time."""
    total = 0.0
    for queries, keys in ((images, texts), (texts, images)):
        for start in range(0, len(queries), block):
            logits = (scale * queries[start : start + block] @ keys.t()).double()
            labels = torch.arange(start, start + len(logits), device=logits.device)
            total += cross_entropy(logits, labels, reduction="sum").item() / len(queries)
    return total / 2


def search(setup: Setup) -> Rows:
    """An index of a folder, and exact search among many vectors, with bare torch and with the package on the CPU."""
    (number, dim), device = setup.vectors, device_of(setup)
    arguments = parse_arguments(flags_of(setup, next(iter(setup.pairs))))
    with tempfile.TemporaryDirectory() as folder:
        model, processor = create_model(arguments, list(load_splits(arguments)["train"]["captions"]))
        exported = export(model, processor, f"{folder}/export")
        files = sum(1 for _ in Path(setup.images).iterdir())
        start = time.perf_counter()
        update_index(f"{folder}/index", [setup.images], exported, batch_size=256, progress=False)
        rate = files / (time.perf_counter() - start)
        indexed = len(ImageIndex.open(f"{folder}/index").embeddings)
    generator = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(number, dim, generator=generator), dim=-1)
    queries = normalize(torch.randn(16, dim, generator=generator), dim=-1)
    there, asked = vectors.to(device), queries.to(device)
    seconds = []
    for query in asked:
        wait_for(device)
        start = time.perf_counter()
        (there @ query).topk(FOUND)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    exact, own, equal = Neighbours(vectors.numpy()), [], True
    for query in queries[:4].numpy():
        start = time.perf_counter()
        scores, _ = exact.search(query, FOUND)
        own.append(time.perf_counter() - start)
        found = (there @ torch.from_numpy(query).to(device)).topk(FOUND).values.cpu().numpy()
        equal = equal and bool(np.allclose(found, scores, atol=1e-4))
    on_device, on_cpu = (1000 * float(np.median(each)) for each in (seconds, own))
    times = f"{on_device:.2f} ms with bare torch on the device, {on_cpu:.2f} ms with the package, on the CPU"
    return [
        row(f"index of {files} images, with loading the model", f"{rate:.0f} images/s", indexed == files),
        row(f"exact search of {number:,} vectors of {dim} dimensions", times, equal),
    ]


PARTS: dict[str, Callable[..., Rows]] = {
    part.__name__: part for part in (agreement, resume, memory, train, plain, loss, search)
}


if __name__ == "__main__":
    name, arguments, settings = sys.argv[1], json.loads(sys.argv[2]), Setup(**json.loads(sys.argv[3]))
    print(json.dumps(PARTS[name](settings, **arguments)), flush=True)
