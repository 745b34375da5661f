"""Embeddings on disk as safetensors: written in blocks, read memory-mapped."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16"}  # names in NumPy and in safetensors
BLOCK = 65_536  # rows that are copied at a time


def write_embeddings(path: Path, rows: int, dim: int, dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """Write a safetensors file with one tensor, `embeddings`, without ever holding all of it.

    For the format see https://huggingface.co/docs/safetensors/index#format.

    Args:
        path: file to write.
        rows: total number of embeddings.
        dim: numbers per embedding.
        dtype: number format of the file, a key of [`DTYPES`].
        blocks: `[n, dim]` arrays, `rows` rows in total.

    Raises:
        ValueError: the blocks do not have `rows` rows of `dim` numbers.
    """
    size = rows * dim * np.dtype(dtype).itemsize
    tensor = {"dtype": DTYPES[dtype], "shape": [rows, dim], "data_offsets": [0, size]}
    header = json.dumps({"embeddings": tensor}).encode()
    header += b" " * (-(len(header) + 8) % 64)  # aligns the numbers to a cache line
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
        written = file.tell() - len(header) - 8
    if written != size:
        raise ValueError(f"{path}: {written} bytes of embeddings instead of {size}")


def map_embeddings(path: Path) -> np.ndarray:
    """Memory-map a file of [`write_embeddings`].

    Args:
        path: file to map.

    Returns:
        `[rows, dim]` float32 or float16.

    Raises:
        ValueError: the file is truncated, or of another kind.
    """
    if sys.byteorder != "little":
        raise ValueError("embeddings are little-endian, but this machine is not")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(length))["embeddings"]
    dtype = next(name for name, code in DTYPES.items() if code == tensor["dtype"])
    size = math.prod(tensor["shape"]) * np.dtype(dtype).itemsize
    if tensor["data_offsets"] != [0, size] or path.stat().st_size != 8 + length + size:
        raise ValueError(f"{path} is truncated")
    if 0 in tensor["shape"]:
        return np.zeros(tensor["shape"], dtype)
    # "c" (copy on write), because torch warns about read-only arrays.
    return np.memmap(path, dtype, "c", 8 + length, tuple(tensor["shape"]))


def gather_blocks(parts: Sequence[np.ndarray], part_of: np.ndarray, row_of: np.ndarray) -> Iterator[np.ndarray]:
    """Gather rows of several arrays in any order, block by block.

    Args:
        parts: arrays of `[n, dim]`.
        part_of: `[rows]`, for each row the number of its array.
        row_of: `[rows]`, for each row its position in that array.
    """
    for start in range(0, len(part_of), BLOCK):
        which, rows = part_of[start : start + BLOCK], row_of[start : start + BLOCK]
        block = np.empty((len(which), parts[0].shape[1]), parts[0].dtype)
        for part in np.unique(which):
            here = which == part
            block[here] = parts[part][rows[here]]
        yield block
