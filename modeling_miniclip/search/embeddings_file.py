"""Embeddings on disk as safetensors: written in blocks, read memory-mapped."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}  # names in NumPy and in safetensors
BLOCK = 65_536  # rows that are copied at a time
DECODED = 4_096  # rows of int8 that are decoded at a time: few enough for the processor's cache
LARGEST = 127  # code of the largest number of a row


class CodedEmbeddings:
    """Embeddings of which each number takes 8 bits, like an array of float32 that is decoded where it is read.

    The largest number of a row has the code 127 or -127, and the scale gives the row length 1. So each row is coded on
    its own: rows can be added, dropped and coded again without a change.

    Args:
        codes: `[rows, dim]` int8; may be memory-mapped.
        scales: `[rows]` float32, one over the length of the codes.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray):
        self.codes, self.scales = codes, scales

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "CodedEmbeddings":
        """Code embeddings.

        Args:
            rows: `[rows, dim]`, unit norm.
        """
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0).astype(np.float32)
        codes = np.rint(rows * (LARGEST / np.maximum(largest, 1e-30))).astype(np.int8)
        lengths = np.sqrt(np.square(codes, dtype=np.int64).sum(axis=1))
        return cls(codes, (1 / np.maximum(lengths, 1)).astype(np.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and numbers per row."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """The format in which the numbers are stored, int8."""
        return self.codes.dtype

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows in float32, unit norm: `[dim]` for a number, `[n, dim]` for a slice or `[n]` rows."""
        decoded: np.ndarray = self.codes[rows] * np.asarray(self.scales[rows])[..., None]
        return decoded

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(np.float32 if dtype is None else dtype, copy=False)

    def products(self, query: np.ndarray) -> np.ndarray:
        """`[rows]` float32 inner products with a `[dim]` float32 query, which is not rounded to 8 bits."""
        found = np.empty(len(self), np.float32)
        for start in range(0, len(self), DECODED):
            here = slice(start, start + DECODED)
            found[here] = self.codes[here].astype(np.float32) @ query
        return found * self.scales


Embeddings = np.ndarray | CodedEmbeddings


def write_embeddings(path: Path, rows: int, dim: int, dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """Write a safetensors file with the tensor `embeddings`, without ever holding all of it.

    For int8 it also has `scales`, see [`CodedEmbeddings`]. For the format see
    https://huggingface.co/docs/safetensors/index#format.

    Args:
        path: file to write.
        rows: total number of embeddings.
        dim: numbers per embedding.
        dtype: number format of the file, a key of [`DTYPES`].
        blocks: `[n, dim]` arrays, `rows` rows in total.

    Raises:
        ValueError: the blocks do not have `rows` rows of `dim` numbers.
    """
    layout = _layout(rows, dim, dtype)
    header = json.dumps(layout).encode()
    header += b" " * (-(len(header) + 8) % 64)  # aligns the numbers to a cache line
    written = dict.fromkeys(layout, 0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            for name, numbers in _stored(block, dtype).items():
                content = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<")).tobytes()
                file.seek(8 + len(header) + layout[name]["data_offsets"][0] + written[name])
                written[name] += file.write(content)
    for name, tensor in layout.items():
        start, end = tensor["data_offsets"]
        if written[name] != end - start:
            raise ValueError(f"{path}: {written[name]} bytes of {name} instead of {end - start}")


def _layout(rows: int, dim: int, dtype: str) -> dict[str, Any]:
    """The header of a file: its tensors. The scales come first, so that their numbers are aligned."""
    shapes: dict[str, tuple[str, list[int]]] = {"scales": ("float32", [rows])} if dtype == "int8" else {}
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in (shapes | {"embeddings": (dtype, [rows, dim])}).items():
        start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [start, end]}
    return header


def _stored(block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What a file holds of a block, by tensor."""
    if dtype != "int8":
        return {"embeddings": np.asarray(block, dtype=dtype)}
    coded = CodedEmbeddings.from_rows(block)
    return {"scales": coded.scales, "embeddings": coded.codes}


def map_embeddings(path: Path) -> Embeddings:
    """Memory-map a file of [`write_embeddings`].

    Args:
        path: file to map.

    Returns:
        `[rows, dim]` float32 or float16, or [`CodedEmbeddings`].

    Raises:
        ValueError: the file is truncated, or of another kind.
    """
    if sys.byteorder != "little":
        raise ValueError("embeddings are little-endian, but this machine is not")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    stored = header["embeddings"]
    dtype = next(name for name, code in DTYPES.items() if code == stored["dtype"])
    rows, dim = stored["shape"]
    layout = _layout(rows, dim, dtype)
    size = layout["embeddings"]["data_offsets"][1]  # the last tensor
    if any(header.get(name) != tensor for name, tensor in layout.items()) or path.stat().st_size != 8 + length + size:
        raise ValueError(f"{path} is truncated")
    if dtype == "int8":
        return CodedEmbeddings(*(_map_tensor(path, 8 + length, layout[name]) for name in ("embeddings", "scales")))
    return _map_tensor(path, 8 + length, stored)


def _map_tensor(path: Path, start: int, tensor: dict[str, Any]) -> np.ndarray:
    """Memory-map one tensor of a file whose numbers start at byte `start`."""
    dtype = next(name for name, code in DTYPES.items() if code == tensor["dtype"])
    if 0 in tensor["shape"]:
        return np.zeros(tensor["shape"], dtype)
    # "c" (copy on write), because torch warns about read-only arrays.
    return np.memmap(path, dtype, "c", start + tensor["data_offsets"][0], tuple(tensor["shape"]))


def gather_blocks(parts: Sequence[Embeddings], part_of: np.ndarray, row_of: np.ndarray) -> Iterator[np.ndarray]:
    """Gather rows of several arrays in any order, block by block.

    Args:
        parts: arrays of `[n, dim]`.
        part_of: `[rows]`, for each row the number of its array.
        row_of: `[rows]`, for each row its position in that array.
    """
    for start in range(0, len(part_of), BLOCK):
        which, rows = part_of[start : start + BLOCK], row_of[start : start + BLOCK]
        block = np.empty((len(which), parts[0].shape[1]), parts[0][:0].dtype)
        for part in np.unique(which):
            here = which == part
            block[here] = parts[part][rows[here]]
        yield block


def truncate_rows(rows: np.ndarray, dim: int) -> np.ndarray:
    """`[n, dim]` float32, the first numbers of `[n, width]` embeddings, normalised again."""
    short = rows[:, :dim].astype(np.float32)
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    return short / np.maximum(lengths, 1e-12)
