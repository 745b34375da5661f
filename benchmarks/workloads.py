"""The workloads that `speed.py` times: `python benchmarks/workloads.py NAME [flags]` prints the numbers of one.

The flags are those of `train_miniclip.py`. Each workload needs a separate process, because
allocator settings are global.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import timm
import torch
from PIL import Image
from plain_loop import PlainLoop

import train_miniclip
from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images
from modeling_miniclip.data.loading.augmentation import build_augmentation
from modeling_miniclip.data.loading.batches import GlobalBatches
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.loader import BatchLoader
from modeling_miniclip.data.loading.order import Shuffled
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.check_arguments import augmentation_list
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.setup import load_splits
from modeling_miniclip.utils.performance import keep_freed_memory

HERE = Path(__file__).resolve().parent
WARM_UP, STEPS = 4, 10  # steps of training
BATCH, ENCODED = 32, 192  # images per forward pass and in total
LOADED = 40  # batches
LARGE = (500, 375)  # pixels of most images of Flickr8k as published
RECALL, LIMIT = "text_to_image_R@10", 50.0  # goal of the race, in percent
TOWERS_OWN = {"image_size": 224, "crop_pct": 0.875}  # preprocessing of EfficientNet-Lite0
TIMES = {"seconds": "loop", "epoch_seconds": "epoch"}  # times of the race, and their names in the plain loop's log
POLL = 0.1  # seconds between two checks of a running process


class Stopwatch:
    """A loader that records when each batch was requested, and how long it took to arrive."""

    def __init__(self, loader: Any):
        self.loader, self.batch_sampler = loader, loader.batch_sampler
        self.requested: list[float] = []
        self.waited: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            self.requested.append(time.perf_counter())
            batch = next(batches, None)
            self.waited.append(time.perf_counter() - self.requested[-1])
            if batch is None:
                return
            yield batch

    def rates(self, images: int, captions: int) -> dict[str, float]:
        """Rates of the steps after the warm-up.

        Args:
            images: images per step.
            captions: captions per image.
        """
        seconds = self.requested[-1] - self.requested[WARM_UP]
        steps = len(self.requested) - 1 - WARM_UP
        return {
            "pairs_per_second": steps * images * captions / seconds,
            "images_per_second": steps * images / seconds,
            "waiting_percent": 100 * sum(self.waited[WARM_UP:-1]) / seconds,
        }


def train_plain(arguments: TrainingArguments) -> dict[str, float]:
    """Steps of the plain loop, whose rows are pairs of an image and one caption."""
    loop = PlainLoop(arguments, arguments.captions_per_image)
    watch = loop.loader = Stopwatch(loop.loader)  # type: ignore[assignment]
    for _ in islice(loop.train_epoch(), WARM_UP + STEPS + 1):
        pass
    return watch.rates(arguments.batch_size, 1)


def train_package(arguments: TrainingArguments) -> dict[str, float]:
    """Steps of `train_miniclip.py`."""
    with tempfile.TemporaryDirectory() as folder:
        run = train_miniclip.prepare(replace(arguments, output_dir=folder, max_steps=WARM_UP + STEPS + 1))
        watch = run.train_loader = Stopwatch(run.train_loader)  # type: ignore[assignment]
        train_miniclip.train_one_epoch(run)
        return watch.rates(arguments.batch_size, arguments.captions_per_image)


def parts_for_encoding(arguments: TrainingArguments) -> tuple[MiniClipModel, MiniClipProcessor, list[str]]:
    """Model, processor and image files to encode."""
    towers = (str(arguments.vision_model), str(arguments.text_model))
    return MiniClipModel.from_towers(*towers), MiniClipProcessor.from_towers(*towers), image_files(arguments, ENCODED)


def image_files(arguments: TrainingArguments, count: int) -> list[str]:
    """Paths of the first images of the training split."""
    images = load_splits(arguments)["train"].select_columns(["image"])
    undecoded = images.cast_column("image", datasets.Image(decode=False))
    return [row["image"]["path"] for row in undecoded.select(range(count))]


def images_per_second(encode: Callable[[], Any], count: int) -> dict[str, float]:
    """Images per second of the second of two calls; the first one warms up."""
    encode()
    start = time.perf_counter()
    encode()
    return {"images_per_second": count / (time.perf_counter() - start)}


def encode_timm(arguments: TrainingArguments, memory_format: Any = torch.contiguous_format) -> dict[str, float]:
    """The bare tower with timm's own transform, as its documentation calls it."""
    model, _, files = parts_for_encoding(arguments)
    tower = model.vision_model.timm_model
    transform = timm.data.create_transform(**timm.data.resolve_data_config(tower.pretrained_cfg))

    @torch.inference_mode()
    def encode() -> None:
        for start in range(0, len(files), BATCH):
            pixels = [transform(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
            tower(torch.stack(pixels).contiguous(memory_format=memory_format))

    return images_per_second(encode, len(files))


def encode_timm_tuned(arguments: TrainingArguments) -> dict[str, float]:
    """The bare tower with the allocator and the memory format of the package."""
    keep_freed_memory()
    return encode_timm(arguments, torch.channels_last)


def encode_package(arguments: TrainingArguments) -> dict[str, float]:
    """[`encode_images`]."""
    keep_freed_memory()
    model, processor, files = parts_for_encoding(arguments)
    return images_per_second(lambda: encode_images(model, files, processor, BATCH, progress=False), len(files))


def encode_no_reading(arguments: TrainingArguments) -> dict[str, float]:
    """The bare tower with the package's allocator and memory format on pixels in memory: the upper bound."""
    keep_freed_memory()
    model, processor, files = parts_for_encoding(arguments)
    pixels = processor(images=files[:BATCH], return_tensors="pt")["pixel_values"]
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode() -> None:
        for _ in range(0, len(files), BATCH):
            model.vision_model.timm_model(pixels)

    return images_per_second(encode, len(files))


def load_bare(arguments: TrainingArguments, size: tuple[int, int] | None = None) -> dict[str, float]:
    """Decoding, augmenting and tokenizing in as many processes as the loader has, passing nothing on."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = loader_rows(arguments, Path(folder), size)
        files = [row["image"]["path"] for row in rows.undecoded]
        pairs = list(zip(files, [captions[0] for captions in rows.captions_of(range(len(rows)))], strict=True))
        workers = arguments.num_workers
        parts = [pairs[worker::workers] for worker in range(workers)]
        with multiprocessing.get_context("fork").Pool(workers, prepare_worker, (rows, arguments.batch_size)) as pool:
            return images_per_second(lambda: pool.map(prepare_pairs, parts, chunksize=1), len(files))


def load_package(arguments: TrainingArguments, size: tuple[int, int] | None = None) -> dict[str, float]:
    """The training loader alone on the same images: random draws, batches and their transfer between processes too."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = loader_rows(arguments, Path(folder), size)
        loader = BatchLoader(rows, GlobalBatches(Shuffled(len(rows)), arguments.batch_size), arguments.num_workers)
        return images_per_second(lambda: deque(loader, maxlen=0), len(rows))


def load_bare_large(arguments: TrainingArguments) -> dict[str, float]:
    """[`load_bare`] with enlarged images."""
    return load_bare(arguments, LARGE)


def load_package_large(arguments: TrainingArguments) -> dict[str, float]:
    """[`load_package`] with enlarged images."""
    return load_package(arguments, LARGE)


def loader_rows(arguments: TrainingArguments, folder: Path, size: tuple[int, int] | None) -> CaptionRows:
    """Augmented rows of the training split; with a size, of resized copies of its images in `folder`."""
    processor = MiniClipProcessor.from_towers(str(arguments.vision_model), str(arguments.text_model))
    crop = processor.image_processor.crop_size
    augmentation = build_augmentation(augmentation_list(arguments), (crop["height"], crop["width"]))
    split = load_splits(arguments)["train"].select(range(LOADED * arguments.batch_size))
    if size:
        files = [str(folder / f"{row}.jpg") for row in range(len(split))]
        for row, file in zip(split, files, strict=True):
            row["image"].convert("RGB").resize(size).save(file, quality=90)
        split = split.remove_columns("image").add_column("image", files).cast_column("image", datasets.Image())
    return CaptionRows(split, processor, augmentation, arguments.captions_per_image)


# Set in each process of the pool of `load_bare`.
augmentation: Any = None
tokenizer: Any = None
texts_together = 0


def prepare_worker(rows: CaptionRows, batch_size: int) -> None:
    """Set what [`prepare_pairs`] uses in a process of the pool."""
    global augmentation, tokenizer, texts_together
    augmentation, tokenizer, texts_together = rows.augmentation, rows.processor.tokenizer, batch_size
    torch.set_num_threads(1)  # as in a DataLoader's worker


def prepare_pairs(pairs: list[tuple[str, str]]) -> int:
    """Decode, augment and tokenize pairs of a file and a caption; returns a number that depends on all of them."""
    total = 0
    for file, _ in pairs:
        pixels = augmentation(image=np.array(Image.open(file).convert("RGB")))["image"]
        total += np.ascontiguousarray(pixels.transpose(2, 0, 1)).shape[0]
    for start in range(0, len(pairs), texts_together):
        texts = [caption for _, caption in pairs[start : start + texts_together]]
        total += len(tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"])
    return total


def race_plain(arguments: TrainingArguments) -> dict[str, float]:
    """Seconds until the plain loop reaches the recall with frozen towers, without its validations."""
    flags = {name: getattr(arguments, name) for name in ("dataset", "vision_model", "text_model", "text_pooling")}
    flags |= {"freeze": "both", "augmentation": "[]"}
    script = [str(HERE / "plain_loop.py"), "--validation_steps=100"]
    return race(script, flags)


def race_package(arguments: TrainingArguments) -> dict[str, float]:
    """Seconds until a recipe of `train_miniclip.py` reaches the recall, including all features and validations.

    Images have the tower's own size and crop, as in the plain loop, instead of the recipe's.
    """
    flags = {name: getattr(arguments, name) for name in ("dataset", "vision_model", "text_model", "recipe")}
    flags |= TOWERS_OWN
    with tempfile.TemporaryDirectory() as folder:
        return race([str(HERE.parent / "train_miniclip.py")], flags | {"feature_cache_dir": folder})


def race(script: list[str], flags: dict[str, Any]) -> dict[str, float]:
    """Start a run, follow its `metrics.jsonl` and stop it once it has reached the recall."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        log = Path(folder) / "run" / "metrics.jsonl"
        flags = {**flags, "output_dir": log.parent}
        argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        start, read = time.perf_counter(), 0
        process = psutil.Popen([sys.executable, *script, *argv], stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
                for line in map(json.loads, lines[read:]):
                    seconds = time.perf_counter() - start
                    print(f"{seconds:.0f} s: {line}", file=sys.stderr)
                    if line["split"] == "validation" and line[RECALL] >= LIMIT:
                        own = {name: line.get(f"{kind}_seconds", seconds) for name, kind in TIMES.items()}
                        return {**own, "recall": line[RECALL], "step": line["step"]}
                read = len(lines)
                time.sleep(POLL)
        finally:
            process.terminate()
            process.wait()
        errors.seek(0)
        sys.exit(f"{script[0]} ended before {RECALL} reached {LIMIT}: {errors.read()[-2000:]}")


WORKLOADS: dict[str, Callable[[TrainingArguments], dict[str, float]]] = {
    function.__name__: function
    for function in (
        train_plain, train_package, encode_timm, encode_timm_tuned, encode_no_reading, encode_package, load_bare,
        load_package, load_bare_large, load_package_large, race_plain, race_package,
    )
}  # fmt: skip


if __name__ == "__main__":
    arguments = parse_arguments([f"--recipe={HERE / 'plain.yaml'}", *sys.argv[2:]])  # unless another one is given
    print(json.dumps(WORKLOADS[sys.argv[1]](arguments)))
