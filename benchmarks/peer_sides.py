"""What each side of `peers.py` does, in a process of its own; prints the numbers of one turn as JSON.

    python benchmarks/peer_sides.py train open_clip --scratch FOLDER --dataset FLICKR8K --vision_model LITE0 \\
        --text_model MINILM --allocator --set workers=2

Each side trains through the entry point that its documentation names: `open_clip_train.main` with a table of files and
captions, `SentenceTransformerTrainer` with a `Router` of two towers, the plain loop, and `train_miniclip.main`. The
augmentation, frozen batch norms, and a clock that notes the end of each step are set from outside. `--set` takes a
side's own settings under their own names. `peers.py` prepares FOLDER.
"""

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PAIRS, CONFIG, TOWER = "pairs.tsv", "peers.json", "tower"  # in the scratch folder
DIM, SIZE = 256, 224  # of the embeddings, and pixels of an image's side
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of EfficientNet-Lite0's pixels
WARM_UP, STEPS = 1, 3  # steps of training
BATCH = 32  # images per forward pass when encoding


class Done(BaseException):
    """Training has taken long enough. No handler of ordinary errors catches it."""


@dataclass
class Clock:
    """Times of a training run since its process started, in seconds.

    Args:
        limit: time after which training ends; None ends it after [`STEPS`] steps beyond the warm-up.
    """

    limit: float | None = None
    imported: float = 0.0
    ends: list[float] = field(default_factory=list)
    rsum: Callable[[], float] | None = None  # validates the trained model

    def start(self) -> None:
        """Note the end of the imports, and from now on that of each step of any optimizer."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.imported = since_start()
        register_optimizer_step_post_hook(self.end_step)

    def end_step(self, *_: Any) -> None:
        """Note the end of a step, and end training after the last one."""
        self.ends.append(since_start())
        if len(self.ends) > WARM_UP + STEPS if self.limit is None else self.ends[-1] >= self.limit:
            raise Done

    def check_end(self) -> None:
        """End with a message if training ended long before its time, as with too few pairs for it."""
        if self.limit is not None and math.isfinite(self.limit) and self.ends[-1] < 0.95 * self.limit:
            sys.exit(f"training ended after {self.ends[-1]:.0f} of {self.limit:.0f} s: it needs more pairs")

    def numbers(self) -> dict[str, float]:
        """Times until the imports and the first step have ended, and steps per second after the warm-up."""
        timed = self.ends[WARM_UP:]
        rate = {"steps_per_second": (len(timed) - 1) / (timed[-1] - timed[0])} if len(timed) > 1 else {}
        times = {"import_seconds": self.imported, "first_step_seconds": self.ends[0]}
        return {**times, **rate, "steps": len(self.ends)}


def since_start() -> float:
    """Seconds since this process started."""
    return time.time() - psutil.Process().create_time()


class Augment:
    """The augmentation of `plain.yaml`: from an image of Pillow to `[H, W, 3]` uint8."""

    def __init__(self) -> None:
        import yaml

        from modeling_miniclip.data.loading.augmentation import build_augmentation

        recipe = yaml.safe_load((HERE / "plain.yaml").read_text(encoding="utf-8"))
        self.steps = build_augmentation(recipe["augmentation"], (SIZE, SIZE))

    def __call__(self, image: Any) -> Any:
        import numpy as np

        return self.steps(image=np.array(image.convert("RGB")))["image"]


def freeze_batch_norm(model: Any) -> None:
    """Keep the statistics of batch norms, whatever mode the model is put into; their weights are trained."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = partial(_unchanged, module)  # type: ignore[method-assign]


def _unchanged(module: Any, mode: bool = True) -> Any:
    return module


def read_pairs(scratch: Path) -> tuple[list[str], list[str]]:
    """Files and captions, one row per caption."""
    with (scratch / PAIRS).open(newline="", encoding="utf-8") as file:
        files, captions = zip(*list(csv.reader(file, delimiter="\t"))[1:], strict=True)
    return list(files), list(captions)


def batches(rows: list[Any]) -> Iterator[list[Any]]:
    """Parts of [`BATCH`] rows."""
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def validation_rsum(args: argparse.Namespace, images: Callable[..., Any], texts: Callable[..., Any]) -> float:
    """Sum of the six recalls on the validation split, from functions that embed images and texts."""
    from modeling_miniclip import retrieval_metrics
    from modeling_miniclip.training.command_line.parsing import parse_arguments
    from modeling_miniclip.training.setup import load_splits

    rows = load_splits(parse_arguments(flags_of(args)))["validation"]
    captions = rows["captions"]
    owners = [i for i, own in enumerate(captions) for _ in own]
    text_embeds = texts([text for own in captions for text in own])
    return retrieval_metrics(images([row.convert("RGB") for row in rows["image"]]), text_embeds, owners)["rsum"]


# --- open_clip ------------------------------------------------------------------------------------------------------


def embed_with_open_clip(model: Any, prepare: Callable[[Any], Any], rows: list[Any], kind: str) -> Any:
    """Embeddings in batches, as in its README; `kind` is `image` or `text`."""
    import torch

    model.eval()
    encode = getattr(model, f"encode_{kind}")
    with torch.no_grad():
        parts = (torch.stack([prepare(row).squeeze(0) for row in part]) for part in batches(rows))
        return torch.cat([encode(part, normalize=True) for part in parts])


def train_open_clip(args: argparse.Namespace, clock: Clock) -> None:
    """`open_clip_train.main` with a table of files and captions."""
    import open_clip
    import open_clip_train.main as entry
    from torchvision.transforms import Compose

    clock.start()
    open_clip.add_model_config(args.scratch / CONFIG)
    create = entry.create_model_and_transforms

    def create_alike(*arguments: Any, **keywords: Any) -> Any:
        model, train, validation = create(*arguments, **keywords)
        freeze_batch_norm(model)
        tokenizer = open_clip.get_tokenizer("peers")
        images, texts = (
            partial(embed_with_open_clip, model, prepare, kind=kind)
            for prepare, kind in ((validation, "image"), (tokenizer, "text"))
        )
        clock.rsum = partial(validation_rsum, args, images, texts)
        return model, Compose([Augment(), *train.transforms[-2:]]), validation  # to a tensor, normalised

    entry.create_model_and_transforms = create_alike
    flags = {"train-data": args.scratch / PAIRS, "dataset-type": "csv", "model": "peers", "precision": "fp32"}
    flags |= {"batch-size": args.batch_size, "epochs": 1, "logs": args.output_dir, **args.set}
    argv = [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items()]
    half = [str(value) for value in HALF]
    entry.main([*argv, "--image-mean", *half, "--image-std", *half])


def encode_open_clip(args: argparse.Namespace, files: list[str]) -> Callable[[], Any]:
    """`encode_image` in batches of a `DataLoader`."""
    import open_clip
    import torch
    from torch.utils.data import DataLoader

    open_clip.add_model_config(args.scratch / CONFIG)
    model, _, transform = open_clip.create_model_and_transforms("peers", image_mean=HALF, image_std=HALF)
    model.eval()
    encode_image = torch.compile(model.encode_image) if "compile" in args.set else model.encode_image
    rows: Any = Files(files, transform)
    loader = DataLoader(rows, BATCH, num_workers=int(args.set.get("workers", 0)))

    @torch.no_grad()
    def encode() -> None:
        for pixels in loader:
            encode_image(pixels)

    return encode


@dataclass
class Files:
    """A data set of images, opened and transformed."""

    files: list[str]
    transform: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.files[index]))


# --- sentence-transformers ------------------------------------------------------------------------------------------


def create_sentence_transformer(vision_model: str, text_model: str) -> Any:
    """A `Router` with tower, pooling and linear head for each modality."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer
    from torch.nn import Identity

    image, text = Transformer(vision_model), Transformer(text_model)
    image_width, text_width = image.get_embedding_dimension(), text.get_embedding_dimension()
    linear: dict[str, Any] = {"bias": False, "activation_function": Identity()}
    routes = {
        "text": [text, Pooling(text_width, "mean"), Dense(text_width, DIM, **linear)],
        "image": [image, Pooling(image_width, "mean"), Dense(image_width, DIM, **linear)],
    }
    model = SentenceTransformer(modules=[Router(routes)])
    freeze_batch_norm(model)
    return model


def train_sentence_transformers(args: argparse.Namespace, clock: Clock) -> None:
    """`SentenceTransformerTrainer` with a table of images and captions."""
    import yaml
    from datasets import Dataset, Image
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    clock.start()
    model = create_sentence_transformer(str(args.scratch / TOWER), args.text_model)
    files, captions = read_pairs(args.scratch)
    rows = Dataset.from_dict({"image": files, "caption": captions}).cast_column("image", Image())
    rows.set_transform(partial(augment_column, Augment()))
    settings = {name: yaml.safe_load(value) for name, value in args.set.items()}
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.output_dir,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            router_mapping={"image": "image", "caption": "text"},
            **settings,
        ),
        train_dataset=rows,
        loss=losses.MultipleNegativesRankingLoss(model, scale=1 / 0.07, **both),
    )
    embed = partial(model.encode, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    clock.rsum = partial(validation_rsum, args, embed, embed)
    trainer.train()


def augment_column(augment: Augment, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows with their images augmented."""
    from PIL import Image

    return {**rows, "image": [Image.fromarray(augment(image)) for image in rows["image"]]}


def encode_sentence_transformers(args: argparse.Namespace, files: list[str]) -> Callable[[], Any]:
    """`encode` of opened images, by `processes` of a pool if there are some."""
    from PIL import Image

    model = create_sentence_transformer(args.vision_model, args.text_model)
    settings: dict[str, Any] = {"batch_size": BATCH, "show_progress_bar": False}
    if "processes" in args.set:
        settings["pool"] = model.start_multi_process_pool(["cpu"] * int(args.set["processes"]))
    if "compile" in args.set:
        model.compile()
    return lambda: model.encode([Image.open(file) for file in files], **settings)


# --- plain loop and package -----------------------------------------------------------------------------------------


def flags_of(args: argparse.Namespace) -> list[str]:
    """Flags of `train_miniclip.py` that all its turns have."""
    names = ("dataset", "vision_model", "text_model", "output_dir", "batch_size")
    recipe = f"--recipe={HERE / 'plain.yaml'}"
    return [recipe, "--text_pooling=mean", *(f"--{name}={getattr(args, name)}" for name in names)]


def train_plain(args: argparse.Namespace, clock: Clock) -> None:
    """The plain loop; its settings are those of PyTorch's guide to performance."""
    import torch
    from plain_loop import PlainLoop

    from modeling_miniclip.training.command_line.parsing import parse_arguments
    from modeling_miniclip.utils.performance import compile_towers

    clock.start()
    loop = PlainLoop(parse_arguments([*flags_of(args), f"--num_workers={args.set.get('num_workers', 2)}"]))
    if "channels_last" in args.set:
        loop.model.vision_model.to(memory_format=torch.channels_last)
    if "compile" in args.set:
        compile_towers(loop.model.vision_model, loop.model.text_model)
    clock.rsum = lambda: loop.validate()["rsum"]
    while True:
        for _ in loop.train_epoch():
            pass


def encode_plain(args: argparse.Namespace, arguments: Any) -> dict[str, float]:
    """The bare tower with timm's transform."""
    import torch
    from workloads import encode_timm

    return encode_timm(arguments, torch.channels_last if "channels_last" in args.set else torch.contiguous_format)


def train_package(args: argparse.Namespace, clock: Clock) -> None:
    """`train_miniclip.py`; with a limit of time, it keeps it by itself."""
    import train_miniclip

    clock.start()
    settings = {"captions_per_image": args.captions, **args.set}
    if clock.limit is not None:
        settings["time_limit"] = f"{clock.limit - since_start():.0f}s"
        clock.limit, clock.rsum = math.inf, partial(last_rsum, args)
    train_miniclip.main([*flags_of(args), *(f"--{name}={value}" for name, value in settings.items())])


def last_rsum(args: argparse.Namespace) -> float:
    """Sum of the recalls in the last validation of a run: its best one would be chosen on what is measured."""
    lines = (Path(args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["rsum"] for line in map(json.loads, lines) if line["split"] == "validation"][-1]


# --- one turn -------------------------------------------------------------------------------------------------------

TRAIN: dict[str, Callable[[argparse.Namespace, Clock], None]] = {
    "open_clip": train_open_clip,
    "sentence_transformers": train_sentence_transformers,
    "plain": train_plain,
    "package": train_package,
}


def train(args: argparse.Namespace) -> dict[str, float]:
    """Steps of one side; with `--minutes`, as many as fit into them, and the recall on the validation split."""
    clock = Clock(60 * args.minutes if args.minutes else None)
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = f"{folder}/run"
        with suppress(Done):
            TRAIN[args.side](args, clock)
        clock.check_end()
        return clock.numbers() | ({"rsum": clock.rsum()} if args.minutes and clock.rsum else {})


def encode(args: argparse.Namespace) -> dict[str, float]:
    """Images per second of one side."""
    args.output_dir = str(args.scratch)
    from workloads import ENCODED, encode_package, image_files, images_per_second

    from modeling_miniclip.training.command_line.parsing import parse_arguments

    arguments = parse_arguments(flags_of(args))
    if args.side == "plain":
        return encode_plain(args, arguments)
    if args.side == "package":
        return encode_package(arguments)
    files = image_files(arguments, ENCODED)
    prepare = encode_open_clip if args.side == "open_clip" else encode_sentence_transformers
    return images_per_second(prepare(args, files), len(files))


def setting(text: str) -> tuple[str, str]:
    """Name and value of a side's own setting; a switch has no value."""
    name, _, value = text.partition("=")
    return name, value


def main(argv: list[str]) -> None:
    """Run one turn, and print its numbers in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "encode"])
    parser.add_argument("side", choices=list(TRAIN))
    for name in ("dataset", "vision_model", "text_model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32, help="rows per step: images, or pairs of a peer")
    parser.add_argument("--captions", type=int, default=1, help="captions per image of the package")
    parser.add_argument("--minutes", type=float, help="train for this long, then validate")
    parser.add_argument("--allocator", action="store_true", help="use the package's settings of the allocator")
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    args.set = dict(args.set)
    if args.allocator:
        from modeling_miniclip.utils.performance import keep_freed_memory

        keep_freed_memory()
    with redirect_stdout(sys.stderr):
        numbers = train(args) if args.work == "train" else encode(args)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(sys.argv[1:])
