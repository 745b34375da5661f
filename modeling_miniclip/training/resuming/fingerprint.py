"""What a run trains on and with, as a small fingerprint that is saved with each checkpoint.

`rows.parquet` has a row per image, with hashes of the image and of its captions: about 40 MB for a million images.
`settings.json` has the flags, the settings of model, preprocessing and augmentation, and the vocabulary.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetDict

from ...data.tables.table_cache import default_cache_dir
from ...errors import ModelError, one_line
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ...utils.files import replace_text
from ..command_line.arguments import TrainingArguments
from ..command_line.check_arguments import augmentation_list
from ..towers.feature_cache import digest_of_weights
from .fingerprint_rows import (
    SPLITS,
    FingerprintRows,
    RowsOfFile,
    RowsOfSplits,
    image_hashes,
    image_sizes,
    related_columns,
)
from .resume_rules import recorded_flags

ROWS, SETTINGS = "rows.parquet", "settings.json"  # in a checkpoint
UNDECODABLE = "undecodable.json"  # in the output folder: what was found after the last checkpoint counts too
# Bytes and images of the largest set that is compared by content; larger ones are by the size of each file.
READ_WHOLE, READ_MOST = 256_000_000, 100_000
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
        rows: hashes of images and captions.
        settings: settings of model, preprocessing and augmentation by name, such as `tokenizer.normalizer.lowercase`.
        vocabulary: number of each piece of the tokenizer.
        undecodable: `image_id` of the images that could not be decoded, by split: their files may be repaired.
        order: checksum of what the order of the training images depends on besides flags, see `row_order.py`.
        zero_shot: checksum of the images and classes of `--zero_shot_dataset`, see `zero_shot.py`; 0 without it.
        retention: checksum of the images and captions of `--retention_dataset`, see `retention.py`; 0 without it.
        related: checksums of [`related_columns`]; None in checkpoints of earlier versions, where they are unknown.
    """

    flags: dict[str, Any]
    by_content: bool
    rows: FingerprintRows
    settings: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    undecodable: dict[str, list[str]] = field(default_factory=dict)
    order: int = 0
    zero_shot: int = 0
    retention: int = 0
    related: dict[str, int] | None = None

    def save(self, folder: Path) -> None:
        """Write both files to a folder."""
        self.rows.save(folder / ROWS)
        values = {name: value for name, value in vars(self).items() if name != "rows"}
        (folder / SETTINGS).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def mark_undecodable(self, rows: Mapping[str, Sequence[int]], output_dir: Path) -> None:
        """Remember the images of these rows, numbered within each split, as undecodable; in the output folder too."""
        assert isinstance(self.rows, RowsOfSplits), "the run has its rows"
        for split in SPLITS:
            self.undecodable[split] = self.rows.names(split, sorted(rows.get(split, ())))
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
            return cls(**values | {"rows": RowsOfFile(folder / ROWS)})
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
    measured = {name: image_sizes(splits[name]) for name in SPLITS}
    if by_content is None:
        few = sum(len(splits[name]) for name in SPLITS) <= READ_MOST
        by_content = few and sum(size for _, size in measured.values()) <= READ_WHOLE
    cache_dir = Path(arguments.dataset_cache_dir or default_cache_dir())
    images = {name: image_hashes(splits[name], cache_dir) if by_content else measured[name][0] for name in SPLITS}
    related = related_columns(splits, "column" in (arguments.hard_negatives or ()))
    return Fingerprint(recorded_flags(arguments), by_content, RowsOfSplits(splits, images), related=related)


def add_model(
    fingerprint: Fingerprint,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    teacher: dict[str, Any] | None = None,
) -> None:
    """Add the model's settings, the vocabulary, preprocessing and augmentation, weights of frozen towers, the teacher.

    Trained weights are in the checkpoint itself. Those of a frozen tower are too, but its features were computed with
    the weights that the flags name. Those below adapters are not, nor is the model that `--blend` goes back to.

    Args:
        fingerprint: fingerprint of the data.
        model, processor, arguments: those of the run.
        teacher: `settings` of the `RunTeacher`, if there is one.
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
        if arguments.freeze in (tower, "both") or arguments.lora_rank is not None:
            parts[f"frozen {tower} tower"] = {"weights": digest_of_weights(module, without_adapters=True)}
    if arguments.blend is not None:
        parts["model before training"] = {"weights": digest_of_weights(model, without_adapters=True)}
    if teacher is not None:
        parts["teacher"] = teacher
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
