"""The embeddings of an index on disk: written in blocks, read memory-mapped."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16"}  # safetensors' names of them


BLOCK = 65_536  # rows copied at a time


def write_embeddings(path: Path, rows: int, dim: int, dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """One tensor `embeddings` in safetensors' format, without ever holding all of it.

    The format: https://huggingface.co/docs/safetensors/index#format.

    Raises:
        ValueError: the blocks have other rows than announced.
    """
    size = rows * dim * np.dtype(dtype).itemsize
    tensor = {"dtype": DTYPES[dtype], "shape": [rows, dim], "data_offsets": [0, size]}
    header = json.dumps({"embeddings": tensor}).encode()
    header += b" " * (-(len(header) + 8) % 64)  # so that the numbers are aligned to a cache line
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
        written = file.tell() - len(header) - 8
    if written != size:
        raise ValueError(f"{path}: {written} bytes of embeddings instead of {size}")


def map_embeddings(path: Path) -> np.ndarray:
    """`[rows, dim]` of [`write_embeddings`], memory-mapped.

    Raises:
        ValueError: another file, or one that was cut off.
    """
    if sys.byteorder != "little":
        raise ValueError("embeddings are little-endian, this machine is not")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(length))["embeddings"]
    dtype = next(name for name, code in DTYPES.items() if code == tensor["dtype"])
    size = math.prod(tensor["shape"]) * np.dtype(dtype).itemsize
    if tensor["data_offsets"] != [0, size] or path.stat().st_size != 8 + length + size:
        raise ValueError(f"{path} was cut off")
    if 0 in tensor["shape"]:
        return np.zeros(tensor["shape"], dtype)
    # "c": what a caller writes stays in its memory; torch warns of arrays that cannot be written.
    return np.memmap(path, dtype, "c", 8 + length, tuple(tensor["shape"]))


def gather_blocks(parts: Sequence[np.ndarray], part_of: np.ndarray, row_of: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of several arrays in any order, block by block.

    Args:
        parts: `[n, dim]` each.
        part_of, row_of: `[rows]`, where each row is.
    """
    for start in range(0, len(part_of), BLOCK):
        which, rows = part_of[start : start + BLOCK], row_of[start : start + BLOCK]
        block = np.empty((len(which), parts[0].shape[1]), parts[0].dtype)
        for part in np.unique(which):
            here = which == part
            block[here] = parts[part][rows[here]]
        yield block
