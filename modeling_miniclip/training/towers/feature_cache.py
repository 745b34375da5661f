"""Features of frozen towers on disk: computed once, memory-mapped, resumable, shared between runs.

The images of a split are in several tables, and so are its captions, so that a change of some leaves the others. Each
table has a folder, named by a hash of everything that its values depend on. It is filled batch by batch; a batch
belongs to one process, and its values do not depend on the number of processes or on interruptions. Two runs that fill
the same table at the same time do some work twice and write the same values.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from ...errors import MiniClipError
from ...utils.files import move_folder, name_to_write, shared_file
from ..command_line.arguments import TrainingArguments

FORMAT = 2  # part of every hash: increase it when the values or their layout change


def default_cache_dir() -> Path:
    """`HF_HOME/miniclip/features`, next to the caches of the other Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "miniclip" / "features"


def cache_of(arguments: TrainingArguments) -> Path | None:
    """Folder in which a run with a frozen tower keeps what its towers say about its data; None if both are trained."""
    if arguments.freeze in (None, "none"):
        return None
    return Path(arguments.feature_cache_dir or default_cache_dir())


def digest(parts: Iterable[bytes]) -> str:
    """A hash of byte strings and their lengths."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def digest_of_weights(module: nn.Module, without_adapters: bool = False) -> str:
    """A hash of all parameters and buffers with their names; of a module with adapters, perhaps without these."""
    state = module.state_dict().items()
    tensors = sorted((name, tensor) for name, tensor in state if not (without_adapters and ".lora_" in name))
    return digest(
        part
        for name, tensor in tensors
        for part in (name.encode(), tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    )


def image_tower_settings(model: Any) -> dict[str, Any]:
    """What the features of a `MiniClipModel`'s image tower depend on, but for its weights."""
    tower = model.config.vision_config
    if tower.model_type == "timm_wrapper":
        return {"architecture": tower.architecture, "model_args": tower.model_args}
    return _settings_of(tower) | {"pooling": model.config.vision_pooling}


def text_tower_settings(model: Any) -> dict[str, Any]:
    """What the features of a `MiniClipModel`'s text tower depend on, but for its weights."""
    settings = {"tower": _settings_of(model.config.text_config), "pooling": model.config.text_pooling}
    return settings if model.config.text_length is None else settings | {"padded to": model.config.text_length}


def _settings_of(tower_config: Any) -> dict[str, Any]:
    return {name: value for name, value in tower_config.to_dict().items() if name != "_name_or_path"}


def digest_of_texts(texts: pa.Array) -> str:
    """A hash of texts, in their order."""
    strings = (pc.binary_length(texts).to_numpy().tobytes(), "".join(texts.to_pylist()).encode())
    return digest(strings)


def digest_of_tokenizer(tokenizer: Any) -> str:
    """A hash of what the token ids of a text depend on."""
    settings = {name: getattr(tokenizer, name) for name in ("model_max_length", "truncation_side")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([repr((type(tokenizer), settings, sorted(tokenizer.get_vocab().items()))).encode()])
    parts = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # which each call sets
    return digest([json.dumps([parts, settings], sort_keys=True).encode()])


class KeptValue:
    """A small result on disk, next to the features.

    Args:
        cache_dir: folder of all results.
        name: what it is.
        depends_on: everything that it depends on, as JSON-compatible values.
    """

    def __init__(self, cache_dir: Path, name: str, depends_on: dict[str, Any]):
        text = json.dumps(depends_on, sort_keys=True, default=str)
        self.path = cache_dir / f"{name}-{digest([text.encode('utf-8', 'surrogatepass')])}.json"

    def read(self) -> Any:
        """The result; None if there is none, or if its file is damaged."""
        with suppress(OSError, ValueError):
            return json.loads(self.path.read_text(encoding="utf-8"))
        return None

    def write(self, value: Any) -> None:
        """Keep a JSON-compatible result, if the folder can be written to."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with shared_file(self.path) as fresh:
                fresh.write_text(json.dumps(value), encoding="utf-8")


class FeatureTable:
    """`[rows, width]` float32 on disk, filled a few rows at a time.

    Args:
        cache_dir: folder of all tables.
        depends_on: everything that the values depend on, as JSON-compatible values.
        rows, width: shape of the table.

    Raises:
        MiniClipError: the folder cannot be written to.
    """

    def __init__(self, cache_dir: Path, depends_on: dict[str, Any], rows: int, width: int):
        about = {"format": FORMAT, "rows": rows, "width": width, **depends_on}
        text = json.dumps(about, indent=1, sort_keys=True)
        self.rows, self.width = rows, width
        self.folder = cache_dir / digest([text.encode()])
        try:
            self._open(text)
        except (ValueError, FileNotFoundError):  # a file is truncated, or was deleted by a process that then died
            shutil.rmtree(self.folder, ignore_errors=True)  # another process may delete it, too
            self._open(text)
        except OSError as error:
            raise MiniClipError(
                f"--feature_cache_dir {cache_dir} cannot be written: {error.strerror or error}; choose another folder"
            ) from error

    def _open(self, about: str) -> None:
        if not self.folder.exists():
            self._create(about, self.rows, self.width)
        self._values_at, self._done_at = (
            np.load(self.folder / name, mmap_mode="r").offset for name in ("features.npy", "done.npy")
        )

    def _create(self, about: str, rows: int, width: int) -> None:
        fresh = name_to_write(self.folder)
        fresh.mkdir()
        try:
            # Sparse files: each part takes space only when it is written.
            np.lib.format.open_memmap(fresh / "features.npy", "w+", np.float32, (rows, width))
            np.lib.format.open_memmap(fresh / "done.npy", "w+", np.uint8, (rows,))
            (fresh / "about.json").write_text(about + "\n", encoding="utf-8")
            move_folder(fresh, self.folder)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not (isinstance(error, OSError) and self.folder.exists()):  # another process was faster
                raise

    def done(self) -> np.ndarray:
        """`[rows]` bool, the rows that are filled by now."""
        return np.fromfile(self.folder / "done.npy", np.uint8, self.rows, offset=self._done_at) > 0

    def write(self, rows: Sequence[int] | np.ndarray, features: Tensor) -> None:
        """Fill some rows; they count as done once their values are on disk.

        Args:
            rows: numbers of the rows, ascending or not.
            features: `[len(rows), width]` values.

        Raises:
            MiniClipError: the disk is full. Rows written before are kept.
        """
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        values, size = features.cpu().numpy(), 4 * self.width
        try:
            # Not through a memory map: on a full disk that would kill the process.
            _write_at(
                self.folder / "features.npy",
                [(self._values_at + rows[run[0]] * size, values[run[0] : run[-1] + 1].tobytes()) for run in runs],
            )
            _write_at(self.folder / "done.npy", [(self._done_at + rows[run[0]], b"\1" * len(run)) for run in runs])
        except OSError as error:
            raise MiniClipError(
                f"{self.folder}: features cannot be written: {error.strerror or error}; free some space, or choose "
                "another folder with --feature_cache_dir, and run again: the features computed so far are kept"
            ) from error

    def read(self) -> Tensor:
        """`[rows, width]`, memory-mapped: pages are read when they are used, and shared by all processes."""
        skipped = self._values_at // 4
        # Unlike a memory map of NumPy, this one keeps no file open: a run may have thousands of tables.
        whole = torch.from_file(str(self.folder / "features.npy"), size=skipped + self.rows * self.width)
        return whole[skipped:].view(self.rows, self.width)


class FeatureRows:
    """Rows of several tensors, one after the other, without copying them together.

    Args:
        parts: `[rows, width]` tensors, none of them empty.
        tables: where they were read from, see [`of_tables`][FeatureRows.of_tables].
    """

    def __init__(self, parts: Sequence[Tensor], tables: Sequence[FeatureTable] = ()):
        self.parts, self.tables = list(parts), list(tables)
        self.starts = [0, *accumulate(map(len, self.parts))]

    @classmethod
    def of_tables(cls, tables: Sequence[FeatureTable]) -> "FeatureRows":
        """The rows of tables, memory-mapped."""
        return cls([table.read() for table in tables], tables)

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader process that is not forked maps the files itself: PyTorch would copy them to shared memory.
        return (FeatureRows.of_tables, (self.tables,)) if self.tables else (FeatureRows, (self.parts,))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Tensor:
        """`[width]`, one row."""
        return self.between(row, row + 1)[0]

    def between(self, start: int, stop: int) -> Tensor:
        """`[stop - start, width]`, rows of one tensor."""
        part = min(bisect_right(self.starts, start), len(self.parts)) - 1
        return self.parts[part][start - self.starts[part] : stop - self.starts[part]]

    def take(self, rows: Sequence[int]) -> Tensor:
        """`[len(rows), width]`, a copy of some rows."""
        return torch.stack([self[row] for row in rows])


class CaptionFeatures:
    """Features of the captions of each image.

    Args:
        features: features of all captions, those of an image in one part.
        offsets: `[images + 1]` int64, number of the first caption of each image, and of all captions.
    """

    def __init__(self, features: FeatureRows, offsets: np.ndarray):
        self.features, self.offsets = features, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, image: int) -> Tensor:
        """`[captions, width]` of an image."""
        return self.features.between(int(self.offsets[image]), int(self.offsets[image + 1]))


def _write_at(path: Path, pieces: Iterable[tuple[int, bytes]]) -> None:
    with path.open("r+b") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
