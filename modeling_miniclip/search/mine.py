"""`miniclip mine`: wrong captions that a model finds hard, written as a column of the dataset.

As `mine_hard_negatives` of sentence-transformers does: the captions of other images that are nearest to an image,
without the very first ones, and without those that are nearly as near as its own captions, since many of them are
right. The margin is relative (de Souza P. Moreira et al. 2024, "NV-Retriever").
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as UndecodedImage
from torch import Tensor

from ..data.captions import load_captions
from ..data.columns import NEGATIVES
from ..data.picture_formats import read_encoded
from ..data.tables.image_places import IN_FILE, image_places
from ..data.tables.row_blocks import Captions
from ..data.word_swaps.swaps import normalised
from ..errors import DataError, UsageError
from ..evaluation.encoders import open_encoder
from ..evaluation.eval_sets import ReadableImages
from ..evaluation.evaluate import encode_readable
from ..utils.files import replaced_file
from .duplicates import threshold_of

BLOCK = 512  # images whose nearest captions are searched at a time
ROWS = 256  # rows of a Parquet file that are in memory at a time


@dataclass(frozen=True)
class MiningRules:
    """Which captions of other images are hard negatives.

    Args:
        num_negatives: number of negatives for each image, each from another image.
        range_min: number of nearest captions to skip.
        range_max: number of nearest captions to look at.
        relative_margin: a negative is at most 1 minus this times as similar as the image's own captions on average.
    """

    num_negatives: int = 5
    range_min: int = 5
    range_max: int = 200
    relative_margin: float = 0.05

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UsageError(f"--num_negatives {self.num_negatives}: expected at least 1")
        if not 0 <= self.range_min < self.range_max:
            raise UsageError(f"--range_min {self.range_min}: expected at least 0 and below --range_max")
        if not 0 <= self.relative_margin < 1:
            raise UsageError(f"--relative_margin {self.relative_margin}: expected a number from 0 to below 1")


@dataclass(frozen=True)
class Mined:
    """What [`mine`] found.

    Args:
        images: number of training images.
        mined: number of those with negatives.
        negatives: number of all negatives.
        unreadable: why each image that cannot be read has none.
        image_dir: folder of the images that a CSV names; None for a file with the images in it.
    """

    images: int
    mined: int
    negatives: int
    unreadable: list[str]
    image_dir: Path | None


def mine(
    model: str,
    dataset: str,
    output: str,
    rules: MiningRules,
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> Mined:
    """Write a dataset with hard negatives for its training images.

    Args:
        model: model as for [`open_encoder`][modeling_miniclip.evaluation.encoders.open_encoder].
        dataset: dataset as for `load_captions`.
        output: new `.csv` file with the names of the images, or new `.parquet` file with the images in it.
        rules: which captions are negatives.
        batch_size: images per forward pass.
        progress: whether to show progress bars.
        options: other options of `load_captions`.

    Returns:
        What was found.

    Raises:
        DataError: the dataset, or any of its images, cannot be read, or nothing was found.
        UsageError: the output exists, or a CSV cannot name the images.
    """
    target = Path(output).expanduser()
    if target.suffix not in (".csv", ".parquet") or not target.absolute().parent.is_dir() or target.exists():
        raise UsageError(f"--output {output}: expected a new .csv or .parquet file in an existing folder")
    encoder = open_encoder(model, "MODEL")
    splits = load_captions(dataset, **options)
    train = splits["train"].cast_column("image", UndecodedImage(decode=False))
    if target.suffix == ".csv" and not all(map(_are_files, splits.values())):
        raise UsageError(f"--output {output}: some images of {dataset} are no files; name a .parquet file")
    readable = ReadableImages(train)
    images = encode_readable(encoder, readable, batch_size, progress)
    rows = [row for row in range(len(train)) if row not in readable.unreadable]
    kept = train.select(rows)
    captions = list(Captions(kept))
    texts = encoder.encode_texts([text for some in captions for text in some], 4 * batch_size, progress)
    groups = kept["group"] if "group" in train.column_names else None
    found = dict(zip(rows, find_negatives(images, texts, captions, groups, rules), strict=True))
    mined = Mined(
        images=len(train),
        mined=sum(map(bool, found.values())),
        negatives=sum(map(len, found.values())),
        unreadable=list(readable.unreadable.values()),
        image_dir=_folder_of(train) if target.suffix == ".csv" else None,
    )
    if not mined.negatives:
        raise DataError(
            f"{dataset}: no caption of another image is a hard negative of one of the {len(train):,} training images: "
            f"lower --range_min (now {rules.range_min}) or --relative_margin ({rules.relative_margin}), raise "
            f"--range_max ({rules.range_max}), or use a model that tells these images apart"
        )
    write_mined(target, splits, [found.get(row, []) for row in range(len(train))])
    return mined


def _are_files(rows: Dataset) -> bool:
    """Whether all images of a split are files of their own."""
    return all(
        pc.all(pc.equal(places.shards, IN_FILE)).as_py()
        and not pc.any(pc.match_substring(places.paths, "://")).as_py()
        for places in image_places(rows)
    )  # fmt: skip


def _folder_of(rows: Dataset) -> Path:
    """The folder that the names of images are relative to."""
    first = rows[0]
    path, name = Path(first["image"]["path"]).absolute(), Path(first["image_id"])
    return path.parents[len(name.parts) - 1]


def find_negatives(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[Sequence[str]],
    groups: Sequence[str | None] | None,
    rules: MiningRules,
) -> list[list[str]]:
    """Hard negatives of each image, the most similar first.

    Captions of images that are near-identical to it, share a caption with it, or are in its group, are none.

    Args:
        images: `[B, dim]` embeddings.
        texts: `[N, dim]` embeddings of all captions, image by image.
        captions: captions of each image.
        groups: group of each image, or None for one on its own; None without groups.
        rules: which captions are negatives.
    """
    words = [text for some in captions for text in some]
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(some) for some in captions]))
    same = _linked(captions, groups)
    threshold = threshold_of(images.numpy(), np.arange(len(images)))
    found: list[list[str]] = []
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        similarity = block @ texts.t()  # [block, N]
        excluded = block @ images.t() >= threshold  # [block, B]
        for i in range(len(block)):
            excluded[i, [start + i, *same[start + i]]] = True
        for i, row in enumerate(similarity):
            own = row[owner == start + i].mean()
            candidates = row.masked_fill(excluded[i][owner], -torch.inf)
            nearest = candidates.topk(min(rules.range_max, len(candidates)))
            limit = own - rules.relative_margin * own.abs()
            values, indices = (each.tolist()[rules.range_min :] for each in nearest)
            rows = [j for value, j in zip(values, indices, strict=True) if -torch.inf < value <= limit]
            first = list({int(owner[j]): j for j in reversed(rows)}.values())[::-1]  # the nearest one of each image
            found.append([words[j] for j in first[: rules.num_negatives]])
    return found


def _linked(captions: Sequence[Sequence[str]], groups: Sequence[str | None] | None) -> list[list[int]]:
    """For each image those with an equal caption, or in its group."""
    by_key: dict[tuple[str, str], list[int]] = defaultdict(list)
    keys: list[set[tuple[str, str]]] = []
    for i, some in enumerate(captions):
        keys.append({("caption", normalised(text)) for text in some})
        if groups is not None and groups[i]:
            keys[i].add(("group", str(groups[i])))
        for key in keys[i]:
            by_key[key].append(i)
    return [sorted({other for key in some for other in by_key[key]}) for some in keys]


def write_mined(target: Path, splits: DatasetDict, negatives: Sequence[Sequence[str]]) -> None:
    """Write all splits with the negatives of `train`, as CSV or as Parquet."""
    with replaced_file(target) as fresh:
        if target.suffix == ".csv":
            _write_csv(fresh, splits, negatives)
        else:
            _write_parquet(fresh, splits, negatives)


def _rows(splits: DatasetDict, negatives: Sequence[Sequence[str]]) -> Iterator[tuple[Dataset, int, dict[str, Any]]]:
    """All rows of all splits: the split, the row in it, and its texts."""
    for split, rows in splits.items():
        columns = [name for name in ("image_id", "captions", "group") if name in rows.column_names]
        for i, row in enumerate(rows.select_columns(columns)):
            wrong = list(negatives[i]) if split == "train" else []
            yield rows, i, {**row, "split": split, NEGATIVES: wrong}


def _write_csv(path: Path, splits: DatasetDict, negatives: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "caption", "split", "group", NEGATIVES])
        for _, _, row in _rows(splits, negatives):
            for i, caption in enumerate(row["captions"]):
                wrong = json.dumps(row[NEGATIVES], ensure_ascii=False) if i == 0 and row[NEGATIVES] else ""
                writer.writerow([row["image_id"], caption, row["split"], row.get("group") or "", wrong])


def _write_parquet(path: Path, splits: DatasetDict, negatives: Sequence[Sequence[str]]) -> None:
    texts = pa.list_(pa.string())
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "image_id": pa.string(),
            "captions": texts,
            "split": pa.string(),
            "group": pa.string(),
            NEGATIVES: texts,
        }
    )
    undecoded = {id(rows): rows.cast_column("image", UndecodedImage(decode=False)) for rows in splits.values()}
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        block: list[dict[str, Any]] = []
        for rows, i, row in _rows(splits, negatives):
            image = {"bytes": read_encoded(undecoded[id(rows)][i]["image"]), "path": row["image_id"]}
            block.append({**row, "image": image, "group": row.get("group")})
            if len(block) == ROWS:
                writer.write_table(pa.Table.from_pylist(block, schema))
                block.clear()
        writer.write_table(pa.Table.from_pylist(block, schema))
