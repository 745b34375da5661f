"""The sides that `data.py` compares: `python benchmarks/data_sides.py NAME ...` prints the numbers of one as JSON."""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_memory import INTERVAL, private_mib
from workloads import prepare_pairs, prepare_worker

from modeling_miniclip import MiniClipProcessor
from modeling_miniclip.data.load_rows import load_datasets
from modeling_miniclip.data.loading.batches import GlobalBatches
from modeling_miniclip.data.loading.loader import BatchLoader
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.errors import MiniClipError
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.row_order import training_order
from modeling_miniclip.training.setup import caption_rows, load_splits
from modeling_miniclip.training.towers.features import FrozenFeatures
from modeling_miniclip.utils.performance import keep_freed_memory

IN_BUFFER = 1_000  # samples that `webdataset` shuffles in each worker, as its documentation does


def timed_pass(batches: Iterable[Any], count: Callable[[Any], int]) -> dict[str, float]:
    """Images per second of the second of two passes; the first one starts the processes and fills caches."""
    for _ in batches:
        pass
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += count(batch)
    return {"images": images, "images_per_second": images / (time.perf_counter() - start)}


def training_loader(arguments: TrainingArguments, rank: int = 0, world_size: int = 1) -> BatchLoader:
    """The loader of one process of a training run."""
    splits = load_splits(arguments)
    processor = MiniClipProcessor.from_towers(str(arguments.vision_model), str(arguments.text_model))
    captions = arguments.captions_per_image
    rows = caption_rows(splits, "train", FrozenFeatures(), processor, arguments, captions)
    batches = GlobalBatches(training_order(splits, arguments), arguments.batch_size, rank, world_size)
    return BatchLoader(rows, batches, arguments.num_workers)


def load_package(flags: list[str]) -> dict[str, float]:
    """The training loader; its source is `--dataset`."""
    keep_freed_memory()
    return timed_pass(training_loader(parse_arguments(flags)), lambda batch: len(batch["image_id"]))


def load_webdataset(flags: list[str]) -> dict[str, float]:
    """`webdataset` with the same decoder, augmentation, tokenizer and number of worker processes."""
    try:
        import webdataset
    except ImportError:
        sys.exit("needs webdataset: pip install webdataset (into an environment for benchmarks)")
    keep_freed_memory()
    arguments = parse_arguments(flags)
    rows = training_loader(arguments).rows
    augmentation, tokenizer = rows.augmentation, rows.processor.tokenizer

    def prepare(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        pixels = augmentation(image=np.array(sample["jpg"]))["image"].transpose(2, 0, 1)
        return pixels, random.choice(sample["txt"].splitlines())

    def collate(samples: list[tuple[np.ndarray, str]]) -> dict[str, torch.Tensor]:
        pixels, captions = zip(*samples, strict=True)
        texts = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return {"pixel_values": torch.from_numpy(np.stack(pixels)), **texts}

    shards = sorted(map(str, Path(str((arguments.dataset or [""])[0])).parent.glob("train-*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(IN_BUFFER)
    batches = samples.decode("pilrgb").map(prepare).batched(arguments.batch_size, collation_fn=collate)
    workers = arguments.num_workers
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return timed_pass(loader, lambda batch: len(batch["pixel_values"]))


def load_bare(flags: list[str]) -> dict[str, float]:
    """Decoding, augmenting and tokenizing loose files in as many processes, passing nothing on."""
    keep_freed_memory()
    arguments = parse_arguments(flags)
    rows = training_loader(arguments).rows
    files = [row["image"]["path"] for row in rows.undecoded]
    pairs = [(file, captions[0]) for file, captions in zip(files, rows.captions_of(range(len(rows))), strict=True)]
    workers = arguments.num_workers
    parts = [pairs[worker::workers] for worker in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers, prepare_worker, (rows, arguments.batch_size)) as pool:
        for _ in range(2):
            start = time.perf_counter()
            pool.map(prepare_pairs, parts, chunksize=1)
    return {"images": len(pairs), "images_per_second": len(pairs) / (time.perf_counter() - start)}


def read_pandas(argv: list[str]) -> dict[str, float]:
    """`pandas.read_csv` and a list of each column, as open_clip's `CsvDataset` does."""
    try:
        import pandas
    except ImportError:
        sys.exit("needs pandas: pip install pandas (into an environment for benchmarks)")
    before, start = private_mib(os.getpid()), time.perf_counter()
    table = pandas.read_csv(argv[0], sep=",")
    images, captions = table["image"].tolist(), table["caption"].tolist()
    seconds = time.perf_counter() - start
    time.sleep(3 * INTERVAL)  # the lists and the table are in memory at the same time: let that be sampled
    return {"rows": len(images) + len(captions) - len(table), "seconds": seconds, "before": before}


def read_rows(argv: list[str]) -> dict[str, float]:
    """The package's table of rows: written if it is not in the cache, then opened."""
    before, start = private_mib(os.getpid()), time.perf_counter()
    splits = load_datasets([argv[0]], ReadOptions(image_dir=argv[1] if len(argv) > 1 else None))
    return {
        "rows": sum(map(len, splits.values())),
        "seconds": time.perf_counter() - start,
        "before": before,
    }


def read_share(flags: list[str]) -> dict[str, Any]:
    """One process's share of two epochs, with the seconds of each; an error ends it as it ends a run.

    Args:
        flags: rank, number of processes, and the flags of the run.
    """
    keep_freed_memory()
    start, seconds, images = time.perf_counter(), [], 0
    loader = training_loader(parse_arguments(flags[2:]), int(flags[0]), int(flags[1]))
    batches = loader.batch_sampler
    assert isinstance(batches, GlobalBatches)
    for batches.epoch in range(2):
        images = sum(int((batch["image_id"] >= 0).sum()) for batch in loader)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"images": images, "seconds": seconds}


SIDES: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    function.__name__: function
    for function in (load_package, load_webdataset, load_bare, read_pandas, read_rows, read_share)
}


if __name__ == "__main__":
    try:
        print(json.dumps(SIDES[sys.argv[1]](sys.argv[2:])))
    except MiniClipError as problem:
        sys.exit(f"error: {problem}")
