"""Features of frozen towers on disk: computed once, memory-mapped, resumable, shared between runs.

Each table has a folder, named by a hash of everything that its values depend on. It is filled block by block; a block
belongs to one process, and its values do not depend on the number of processes or on interruptions. Two runs that fill
the same table at the same time do some work twice and write the same values.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MiniClipError

FORMAT = 1  # part of every hash: increase it when the values or their layout change


def default_cache_dir() -> Path:
    """`HF_HOME/miniclip/features`, next to the caches of the other Hugging Face libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "miniclip" / "features"


def digest(parts: Iterable[bytes]) -> str:
    """A hash of byte strings and their lengths."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def digest_of_weights(module: nn.Module) -> str:
    """A hash of all parameters and buffers with their names."""
    tensors = sorted(module.state_dict().items())
    return digest(
        part
        for name, tensor in tensors
        for part in (name.encode(), tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    )


def digest_of_images(undecoded: Iterable[dict[str, Any]]) -> str:
    """A hash of encoded images, independent of the names of their files.

    Args:
        undecoded: `{"bytes", "path"}` of each image, as `datasets.Image(decode=False)` returns them.
    """
    return digest(
        image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes() for image in undecoded
    )


class FeatureTable:
    """`[rows, width]` float32 on disk, filled in blocks of rows.

    Args:
        cache_dir: folder of all tables.
        depends_on: everything that the values depend on, as JSON-compatible values.
        rows, width: shape of the table.
        block: number of rows per block.

    Raises:
        MiniClipError: the folder cannot be written to.
    """

    def __init__(self, cache_dir: Path, depends_on: dict[str, Any], rows: int, width: int, block: int):
        about = {"format": FORMAT, "rows": rows, "width": width, "block": block, **depends_on}
        text = json.dumps(about, indent=1, sort_keys=True)
        self.block = block
        self.folder = cache_dir / digest([text.encode()])
        try:
            self._open(text, rows, width)
        except ValueError:  # a file is truncated
            shutil.rmtree(self.folder)
            self._open(text, rows, width)
        except OSError as error:
            raise MiniClipError(
                f"--feature_cache_dir {cache_dir} cannot be written: {error.strerror or error}; choose another folder"
            ) from error

    def _open(self, about: str, rows: int, width: int) -> None:
        if not self.folder.exists():
            self._create(about, rows, width)
        self.values = np.load(self.folder / "features.npy", mmap_mode="c")
        self.done = np.load(self.folder / "done.npy", mmap_mode="r")

    def _create(self, about: str, rows: int, width: int) -> None:
        fresh = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        try:
            # Sparse files: each part takes space only when it is written.
            np.lib.format.open_memmap(fresh / "features.npy", "w+", np.float32, (rows, width))
            np.lib.format.open_memmap(fresh / "done.npy", "w+", np.uint8, (-(-rows // self.block),))
            (fresh / "about.json").write_text(about + "\n", encoding="utf-8")
            fresh.rename(self.folder)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not (isinstance(error, OSError) and self.folder.exists()):  # another process was faster
                raise

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """Rows of each block that this process has to fill.

        Args:
            rank, world_size: index of this process, and number of processes that share the work.
        """
        rows = len(self.values)
        blocks = (b for b in range(rank, len(self.done), world_size) if not self.done[b])
        return [range(b * self.block, min(rows, (b + 1) * self.block)) for b in blocks]

    def write(self, rows: range, features: Tensor) -> None:
        """Fill a block; it counts as done once its values are on disk.

        Raises:
            MiniClipError: the disk is full. Blocks written before are kept.
        """
        start = self.values.offset + rows.start * self.values.strides[0]
        try:
            # Not through the memory map: on a full disk that would kill the process.
            _write_at(self.folder / "features.npy", start, features.cpu().numpy().tobytes())
            _write_at(self.folder / "done.npy", self.done.offset + rows.start // self.block, b"\1")
        except OSError as error:
            raise MiniClipError(
                f"{self.folder}: features cannot be written: {error.strerror or error}; free some space, or choose "
                "another folder with --feature_cache_dir, and run again: the features computed so far are kept"
            ) from error

    def read(self) -> Tensor:
        """`[rows, width]`, memory-mapped: pages are read when they are used, and shared by all processes."""
        return torch.from_numpy(self.values)


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
