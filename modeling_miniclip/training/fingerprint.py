"""What a run trains on and with, as a small fingerprint that is saved with each checkpoint.

`rows.parquet` has a row per image, with hashes of the image and of its captions: about 40 MB for a million images.
`settings.json` has the flags, the settings of model, preprocessing and augmentation, and the vocabulary.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image

from ..errors import ModelError, one_line
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.files import replace_text
from .arguments import TrainingArguments
from .check_arguments import augmentation_list
from .feature_cache import digest_of_weights
from .resume_rules import recorded_flags

ROWS, SETTINGS = "rows.parquet", "settings.json"  # in a checkpoint
UNDECODABLE = "undecodable.json"  # in the output folder: what was found after the last checkpoint counts too
SPLITS = ("train", "validation")  # nothing of a run depends on a test split
READ_WHOLE = (
    256_000_000  # images of up to this many bytes are compared by content, larger sets by the size of each file
)

SCHEMA = pa.schema(
    {"split": pa.string(), "image_id": pa.string(), "image": pa.uint64(), "captions": pa.list_(pa.uint32())}
)
# Settings that may change without changing what is trained: places, versions, and the dropout that its flags apply.
VOLATILE = frozenset(
    "transformers_version _name_or_path auto_map architectures dtype torch_dtype pretrained_cfg id2label label2id "
    "image_processor_type projection_dropout".split()
)
# Parts of a tokenizer that are in its vocabulary, that each call sets, or that texts do not go through.
NOT_SETTINGS = ("version", "added_tokens", "truncation", "padding", "decoder")


@dataclass
class Fingerprint:
    """Everything that must stay the same for a run to continue, and its flags.

    Args:
        flags: [`recorded_flags`] of the run.
        by_content: whether images are compared by content, or by the size of their files.
        rows: table `{split, image_id, image, captions}`: a hash (or size) of the image, a hash for each caption.
        settings: settings of model, preprocessing and augmentation by name, such as `tokenizer.normalizer.lowercase`.
        vocabulary: number of each piece of the tokenizer.
        undecodable: `image_id` of the images that could not be decoded, by split: their files may be repaired.
    """

    flags: dict[str, Any]
    by_content: bool
    rows: pa.Table
    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    undecodable: dict[str, list[str]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write both files to a folder."""
        pq.write_table(self.rows, folder / ROWS, compression="zstd")
        values = {name: value for name, value in vars(self).items() if name != "rows"}
        (folder / SETTINGS).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def mark_undecodable(self, rows: Mapping[str, Sequence[int]], output_dir: Path) -> None:
        """Remember the images of these rows, numbered within each split, as undecodable; in the output folder too."""
        for split in SPLITS:
            names = self.rows.filter(pc.equal(self.rows["split"], split))["image_id"]
            self.undecodable[split] = names.take(pa.array(sorted(rows.get(split, ())), pa.int64())).to_pylist()
        replace_text(output_dir / UNDECODABLE, json.dumps(self.undecodable, indent=1))

    def add_undecodable(self, output_dir: Path) -> None:
        """Add the images that [`mark_undecodable`][Fingerprint.mark_undecodable] left in an output folder."""
        path = output_dir / UNDECODABLE
        if path.exists():
            for split, names in json.loads(path.read_text(encoding="utf-8")).items():
                self.undecodable[split] = [*self.undecodable.get(split, ()), *names]

    @classmethod
    def load(cls, folder: Path) -> "Fingerprint":
        """Read what [`save`][Fingerprint.save] wrote.

        Raises:
            ModelError: a file is missing or damaged.
        """
        try:
            values = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            return cls(**values | {"rows": pq.read_table(folder / ROWS).cast(SCHEMA)})
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise ModelError(
                f"--resume_from_checkpoint: {folder} is damaged or was saved by an earlier version of this package: "
                f"{one_line(error)}; resume from another checkpoint, or start a new run with another --output_dir"
            ) from error


def fingerprint_of_data(
    splits: DatasetDict, arguments: TrainingArguments, by_content: bool | None = None
) -> Fingerprint:
    """Fingerprint of the flags and of the rows that training sees; [`add_model`] completes it.

    Args:
        splits: rows `{image, image_id, captions}`.
        arguments: flags of the run.
        by_content: whether to compare images by content; None decides by their number of bytes.
    """
    used = {name: splits[name] for name in SPLITS}
    sizes = {name: image_sizes(rows) for name, rows in used.items()}
    if by_content is None:
        by_content = sum(int(one.sum()) for one in sizes.values()) <= READ_WHOLE
    parts = []
    for name, rows in used.items():
        captions = [[zlib.crc32(_encoded(text)) for text in row] for row in rows["captions"]]
        images = image_hashes(rows) if by_content else sizes[name]
        columns = [[name] * len(rows), list(rows["image_id"]), images.astype(np.uint64), captions]
        parts.append(pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)],
                                          schema=SCHEMA))  # fmt: skip
    return Fingerprint(recorded_flags(arguments), by_content, pa.concat_tables(parts).combine_chunks())


def image_sizes(rows: Dataset) -> np.ndarray:
    """`[rows]` int64, bytes of each encoded image, without reading the images; 0 for a file that is not there."""
    column = rows.data.column("image")  # all rows of the table, of which a selection has some
    sizes = np.concatenate([np.zeros(0, np.int64)] + [_sizes_of_chunk(chunk) for chunk in column.chunks])
    return sizes if rows._indices is None else sizes[rows._indices.column(0).to_numpy()]


def _sizes_of_chunk(chunk: pa.StructArray) -> np.ndarray:
    lengths = pc.binary_length(pc.struct_field(chunk, "bytes"))
    if lengths.null_count == 0:
        return np.asarray(lengths).astype(np.int64)
    paths = pc.struct_field(chunk, "path").to_pylist()
    return np.array(
        [_size_of_file(path) if size is None else size for size, path in zip(lengths.to_pylist(), paths, strict=True)],
        np.int64,
    )


def _size_of_file(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def image_hashes(rows: Dataset) -> np.ndarray:
    """`[rows]` uint64, a hash of each encoded image; 0 for a file that cannot be read."""
    undecoded = rows.select_columns(["image"]).cast_column("image", Image(decode=False))
    return np.array([_hash_of_image(row["image"]) for row in undecoded], np.uint64)


def _hash_of_image(image: dict[str, Any]) -> int:
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except OSError:
        return 0
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def add_model(
    fingerprint: Fingerprint, model: MiniClipModel, processor: MiniClipProcessor, arguments: TrainingArguments
) -> None:
    """Add the model's settings, the vocabulary, preprocessing and augmentation, and the weights of frozen towers.

    Trained weights are in the checkpoint itself. Those of a frozen tower are too, but its features were computed with
    the weights that the flags name.
    """
    tokenizer = processor.tokenizer
    numbers = tokenizer.get_vocab()
    fingerprint.vocabulary = {piece: numbers[piece] for piece in sorted(numbers, key=numbers.__getitem__)}
    augmentation = {"transforms": augmentation_list(arguments), "train_image_size": arguments.train_image_size}
    parts = {
        "model": model.config.to_dict(),
        "image_processor": processor.image_processor.to_dict(),
        "tokenizer": tokenizer_settings(tokenizer),
        "augmentation": augmentation,
    }
    for tower, module in (("vision", model.vision_model), ("text", model.text_model)):
        if arguments.freeze in (tower, "both"):
            parts[f"frozen {tower} tower"] = {"weights": digest_of_weights(module)}
    # As JSON reads them back: a tuple is a list, a key is a string.
    fingerprint.settings = flat_settings(json.loads(json.dumps(parts, default=str)))


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does to a text, except for its vocabulary."""
    settings = {name: getattr(tokenizer, name) for name in ("model_max_length", "truncation_side", "padding_side")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return settings
    parts = {name: part for name, part in json.loads(backend.to_str()).items() if name not in NOT_SETTINGS}
    for name in ("vocab", "merges"):  # too long for a setting; a list of pieces has scores too
        pieces = parts["model"].pop(name, None)
        if isinstance(pieces, list):
            parts["model"][f"hash of {name}"] = zlib.crc32(json.dumps(pieces).encode())
    return parts | settings


def flat_settings(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary, with names such as `image_processor.crop_size.height`."""
    if isinstance(value, dict):
        items = [(key, part) for key, part in value.items() if key not in VOLATILE]
    elif isinstance(value, list) and value:
        items = list(enumerate(value))
    else:
        return {name: value}
    return {
        key: leaf
        for part_name, part in items
        for key, leaf in flat_settings(part, f"{name}.{part_name}".lstrip(".")).items()
    }
