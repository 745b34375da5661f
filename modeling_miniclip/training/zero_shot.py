"""`--zero_shot_dataset`: images of class folders, classified by the names of the classes at each validation."""

import json
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from datasets import Image as UndecodedImage
from torch import Tensor
from torch.nn.functional import normalize

from ..data.loading.batches import GlobalBatches
from ..data.loading.collation import model_inputs
from ..data.loading.dataset import FILLER, CaptionRows
from ..data.loading.loader import BatchLoader
from ..data.loading.order import InOrder
from ..errors import UsageError
from ..evaluation.eval_sets import EvalSet, load_class_folders
from ..evaluation.metrics import ZERO_SHOT_METRICS, named_intervals, ranks, resampled_recalls
from ..evaluation.zero_shot import class_sentences
from ..hub.model_card import inline_code
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.names import is_utf8
from .bad_images import BadImages
from .command_line.arguments import TrainingArguments
from .processes.distributed import compute_on_main, gather_rows
from .reports.reporting import say
from .towers.feature_cache import CaptionFeatures, default_cache_dir
from .towers.features import (
    EVALUATION_BATCH,
    TEXT_BLOCK,
    embed_split,
    frozen_image_features,
    frozen_text_features,
)

SPLIT = "zero_shot_dataset"  # its name among the splits, for images that cannot be decoded


@dataclass
class ZeroShotSet:
    """The images and classes that a run classifies.

    Args:
        data: images with the index of their class as group; class names as texts.
        loader: loader of this process's share of the images.
        sentences: sentences of each class, all of the same number.
        features: features of the sentences of each class from a frozen text tower; None if the tower runs.
    """

    data: EvalSet
    loader: BatchLoader
    sentences: list[list[str]]
    features: CaptionFeatures | None


def load_zero_shot(arguments: TrainingArguments, accelerator: Accelerator) -> EvalSet | None:
    """The class folders of `--zero_shot_dataset`, None without it; reports their size.

    Raises:
        DataError: it is not a folder of class folders.
        UsageError: there are too few classes for `--best_metric`.
    """
    if arguments.zero_shot_dataset is None:
        return None
    data = load_class_folders(arguments.zero_shot_dataset, "--zero_shot_dataset")
    measured = [f"zero_shot_top-{k}" for k in data.at]
    if arguments.best_metric in ZERO_SHOT_METRICS and arguments.best_metric not in measured:
        raise UsageError(
            f"--best_metric {arguments.best_metric}: {data.name} has {len(data.texts)} classes, and any model "
            f"has the right one among its first five; choose {measured[0]}"
        )
    say(accelerator, f"zero-shot classification: {data.name}, {data.split}: {len(data.image_ids)} images of "
        f"{len(data.texts)} classes")  # fmt: skip
    for reason in [*data.skipped.values(), *data.unlisted.values()]:
        say(accelerator, f"warning: {reason}; left out of the zero-shot classification")
    return data


def zero_shot_checksum(data: EvalSet | None) -> int:
    """What must stay the same when a run is resumed: names and classes of the images, and names of the classes."""
    if data is None:
        return 0
    return zlib.crc32(json.dumps([data.image_ids, data.image_group.tolist(), data.texts]).encode())


def zero_shot_about(data: EvalSet | None) -> dict[str, Any]:
    """What the model card says about them."""
    if data is None:
        return {}
    about = {
        "name": inline_code(Path(data.name).resolve().name),
        "split": data.split,
        "images": len(data.image_ids),
        "classes": len(data.texts),
    }
    return {"zero_shot": about}


def build_zero_shot(
    data: EvalSet | None,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> ZeroShotSet | None:
    """Loader of the images; features of frozen towers are computed here, once, and kept on disk."""
    if data is None:
        return None
    sentences = class_sentences(data.texts)
    images = image_table(data)
    rows = CaptionRows(images, processor)
    cache_dir, features = Path(arguments.feature_cache_dir or default_cache_dir()), None
    if arguments.freeze in ("vision", "both"):
        found = frozen_image_features(model, rows, 1, arguments.num_workers, cache_dir, accelerator)
        rows = CaptionRows(images, processor, vision_features=found)
    if arguments.freeze in ("text", "both"):
        features = frozen_text_features(model, Dataset.from_dict({"captions": sentences}), processor, cache_dir,
                                        accelerator)  # fmt: skip
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = GlobalBatches(InOrder(len(rows)), EVALUATION_BATCH * world_size, rank, world_size)
    workers = arguments.num_workers if rows.vision_features is None else 0
    loader = BatchLoader(rows, batches, workers, accelerator.device.type == "cuda")
    return ZeroShotSet(data, loader, sentences, features)


def image_table(data: EvalSet) -> Dataset:
    """The images as rows without captions."""
    # Arrow holds no path that is not UTF-8.
    images = [{"path": path, "bytes": None} if is_utf8(path) else {"path": None, "bytes": Path(path).read_bytes()}
              for path in data.images]  # fmt: skip
    columns = {"image": images, "image_id": data.image_ids, "captions": [[]] * len(images)}
    text = Value("string")
    return Dataset.from_dict(
        columns, Features({"image": UndecodedImage(decode=False), "image_id": text, "captions": List(text)})
    )


def measure_zero_shot(
    zero_shot: ZeroShotSet | None,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    accelerator: Accelerator,
    bad_images: BadImages,
) -> tuple[dict[str, float], Tensor | None]:
    """Classify all images; every process must call it.

    Args:
        zero_shot: images and classes, or None.
        model, processor, accelerator: those of the run.
        bad_images: where images that cannot be decoded are recorded.

    Returns:
        `zero_shot_top-1` and, with more than five classes, `zero_shot_top-5` in percent, and `[images]`, the rank of
        the right class of each; nothing without `--zero_shot_dataset`.
    """
    if zero_shot is None:
        return {}, None
    is_main, record = accelerator.is_main_process, partial(bad_images.record_undecodable, SPLIT)
    title = "classify" if is_main else None
    images, _, _ = embed_split(model, zero_shot.loader, processor, accelerator.device, title, record)
    classes = embed_classes(zero_shot, model, processor, accelerator)
    label = zero_shot.data.image_group[bad_images.good_rows(SPLIT)]
    rank = compute_on_main(lambda: ranks(images, classes, label, torch.arange(len(classes))), is_main)
    return {f"zero_shot_top-{k}": 100 * (rank <= k).double().mean().item() for k in zero_shot.data.at}, rank


def zero_shot_intervals(data: EvalSet, rank: Tensor) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics, from a bootstrap over images.

    Args:
        data: images and classes.
        rank: `[images]` from [`measure_zero_shot`].
    """
    recalls = resampled_recalls({"": rank}, {"": torch.arange(len(rank))}, len(rank), data.at)
    return named_intervals([f"zero_shot_top-{k}" for k in data.at], recalls, None)


@torch.no_grad()
def embed_classes(
    zero_shot: ZeroShotSet, model: MiniClipModel, processor: MiniClipProcessor, accelerator: Accelerator
) -> Tensor:
    """`[classes, dim]` embeddings on the CPU, as `zero_shot_weights` computes them; each process embeds its share.

    Every process runs the model equally often, as FSDP and ZeRO-3 need.
    """
    model.eval()
    templates, world_size = len(zero_shot.sentences[0]), accelerator.num_processes
    order = InOrder(len(zero_shot.sentences))
    per_batch = max(1, TEXT_BLOCK // templates) * world_size
    own, numbers = [], []
    for keys in GlobalBatches(order, per_batch, accelerator.process_index, world_size):
        classes = [number if number >= 0 else FILLER - number for _, number in keys]
        if zero_shot.features is not None:
            batch = {"text_pooler_output": torch.cat([zero_shot.features[i] for i in classes])}
        else:
            texts = [sentence for i in classes for sentence in zero_shot.sentences[i]]
            batch = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        embeds = model(**model_inputs(batch, processor, accelerator.device)).text_embeds.float()
        own.append(normalize(embeds.view(len(keys), templates, -1).mean(dim=1), dim=-1))
        numbers += [number for _, number in keys]
    number = torch.tensor(numbers, device=accelerator.device)
    whole = gather_rows(torch.cat(own)[number >= 0])
    return whole[gather_rows(number[number >= 0]).argsort()].cpu()
