"""Shards: finished embeddings, written as small indexes and merged at the end of an update.

Before an image is encoded, it is looked up in the existing index and in all finished shards by its contents.
"""

import errno
import hashlib
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from PIL import ExifTags, Image
from torch import Tensor
from tqdm.auto import tqdm

from ...clips.exported import export_folder
from ...data.all_images import Item, state_of
from ...data.find_images import UNKNOWN
from ...data.loading.collation import model_inputs
from ...data.loading.reduced_size import reduction_before_crop
from ...data.picture_formats import decode_picture
from ...errors import MiniClipError, printable
from ...inference.encode import truncate_embeddings
from ...inference.fit import Parts
from ...inference.loading import load_tower
from ...modeling_miniclip import MiniClipModel
from ...pictures_miniclip import exif_orientation, to_rgb
from ...processing_miniclip import MiniClipProcessor
from ...utils.performance import to_channels_last
from ...utils.thumbnails import encode_thumbnail
from ..index import SCHEMA, Manifest, write_index
from .pool import MISSING, Pool

SHARD = 1024  # images per shard; an interruption loses fewer than this per process


@dataclass(frozen=True)
class Prepared:
    """An image after a thread has read it.

    Args:
        entry: the columns of [`SCHEMA`][modeling_miniclip.search.index.SCHEMA] that the image determines.
        pixels: `[3, H, W]` uint8, or None if the image was encoded before.
        row: the row of the pool in which it was encoded before, or None.
        is_stored: whether it needs an entry, as there is none for it yet, or one of a file or shard that has changed.
        warning: what is odd about the image; may be empty.
    """

    entry: dict[str, Any]
    pixels: np.ndarray | None = None
    row: int | None = None
    is_stored: bool = True
    warning: str = ""


class Encoding:
    """One process's share of the work: threads read images, the model encodes them in batches, shards store them.

    Args:
        manifest: manifest of the new index.
        pool: embeddings that exist already.
        shards: folder of the shards.
        batch_size: images per forward pass.
        num_workers: number of threads.
    """

    def __init__(self, manifest: Manifest, pool: Pool, shards: Path, batch_size: int, num_workers: int):
        self.manifest, self.pool, self.shards = manifest, pool, shards
        self.batch_size, self.num_workers = batch_size, num_workers
        self.encoded = 0
        self.skipped: dict[str, str] = {}  # names of images that could not be read, with the reason
        self.unreachable: set[str] = set()  # those of them whose files exist, but a disk or its permissions failed
        self._tower: tuple[MiniClipModel, MiniClipProcessor] | None = None
        self._fitting = Parts("images", PartialState().device)
        self._loading = Lock()
        self._next_shard: list[tuple[dict[str, Any], np.ndarray]] = []  # entries and embeddings

    def load(self) -> tuple[MiniClipModel, MiniClipProcessor]:
        """Image tower of the model and its processor; any thread may call it, and the first call loads them."""
        with self._loading:
            if self._tower is None:
                model, processor = load_tower(export_folder(self.manifest.model), "image")
                to_channels_last(model.vision_model, PartialState().device)
                self._tower = model.to(PartialState().device), processor
        return self._tower

    def run(self, items: Iterable[Item], total: int | None, progress: bool) -> None:
        """Encode images and store them. An error or Ctrl-C stores those that are finished.

        Args:
            items: images to encode.
            total: number of these images, if it is known.
            progress: whether to show a progress bar.
        """
        batch: list[Prepared] = []
        if total:
            self.load()  # before the clock of the progress bar starts
        try:
            with tqdm(total=total, desc="index", unit="image", disable=not progress) as bar:
                for prepared in self._read_ahead(items, bar):
                    if prepared.pixels is not None:
                        batch.append(prepared)
                    elif prepared.is_stored and prepared.row is not None:  # its contents were encoded before
                        self._store(prepared.entry, self.pool.embedding(prepared.row))
                    if len(batch) == self.batch_size:
                        self._encode(batch)
                        batch = []
                self._encode(batch)
        finally:
            self._write_shard()

    def _read_ahead(self, items: Iterable[Item], bar: Any) -> Iterator[Prepared]:
        """Images in the order of `items`, read by threads while others are encoded. Unreadable ones are skipped."""
        waiting: deque[tuple[Item, Future[Prepared]]] = deque()
        iterator = iter(items)
        with ThreadPoolExecutor(self.num_workers) as threads:
            while True:
                while len(waiting) < 2 * self.batch_size and (item := next(iterator, None)) is not None:
                    waiting.append((item, threads.submit(self._prepare, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                try:
                    prepared = future.result()
                except MemoryError as error:  # not the image's fault
                    raise MiniClipError(
                        f"not enough memory to read {item.id}: lower --num_workers or --batch_size"
                    ) from error
                except Exception as error:  # Pillow's decoders raise errors of many classes
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    self.skipped[item.id] = reason
                    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
                        self.unreachable.add(item.id)
                    bar.write(printable(f"skipped: {item.id}: {reason}"), file=sys.stderr)
                else:
                    if prepared.warning:
                        bar.write(printable(f"warning: {item.id}: {prepared.warning}"), file=sys.stderr)
                    yield prepared
                bar.update()

    def _prepare(self, item: Item) -> Prepared:
        content = item.read()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        row = self.pool.row_of_content(digest)
        is_stored = self._is_stored(item, row)
        needs_thumbnail = item.path is None and is_stored
        needs_pixels = row == MISSING or needs_thumbnail
        # A thumbnail may need more pixels than the model.
        is_reduced = self.manifest.reduced and needs_pixels and not needs_thumbnail
        reduction = reduction_before_crop(self.load()[1]) if is_reduced else None
        stored: list[tuple[int, int]] = []

        def prepare(opened: Image.Image) -> bool:
            stored.append(opened.size)
            return needs_pixels

        image = decode_picture(content, prepare, reduction)
        orientation = exif_orientation(image)
        size = image.size if reduction is None else stored[-1]
        width, height = size[::-1] if (orientation or 1) >= 5 else size
        entry: dict[str, Any] = {
            "id": item.id,
            "path": item.path,
            "size": len(content) if item.size == UNKNOWN else item.size,
            "mtime": item.mtime,
            "version": item.version,
            "hash": digest.hex(),
            "date": _date_of(image, item.mtime),
            "width": width,
            "height": height,
        }
        if not needs_pixels:
            return Prepared(entry, row=row, is_stored=is_stored)
        if orientation is None:
            warning = "its EXIF data cannot be read, so it may be shown turned"
            for key in ("exif", "Raw profile type exif"):
                image.info.pop(key, None)
        else:
            warning = ""
        rgb = to_rgb(image)
        if needs_thumbnail:
            entry["thumbnail"] = encode_thumbnail(rgb)
        if row != MISSING:
            return Prepared(entry, None, row, is_stored, warning)
        _, processor = self.load()
        return Prepared(entry, processor.crop(rgb), warning=warning)

    def _is_stored(self, item: Item, row: int) -> bool:
        """Whether an image needs an entry; `row` is the row of the pool with its contents."""
        known = state_of(item.size, item.mtime, item.version) != 0
        return known or row == MISSING or self.pool.row_of_name(item.id) != row

    @torch.inference_mode()
    def _encode(self, batch: list[Prepared]) -> None:
        if not batch:
            return
        model, processor = self.load()
        pixels = np.stack([prepared.pixels for prepared in batch if prepared.pixels is not None])

        def embed(some: Tensor) -> Tensor:
            inputs = model_inputs({"pixel_values": some}, processor, model.device)  # [n, 3, H, W]
            return truncate_embeddings(model(**inputs).image_embeds.float(), self.manifest.dim).cpu()

        embeddings = self._fitting.of(torch.from_numpy(pixels), embed).numpy()  # [batch, dim]
        if not np.isfinite(embeddings).all():
            raise MiniClipError(
                f"{self.manifest.model} computes embeddings that are not numbers (NaN): train it again"
            )
        self.encoded += len(batch)
        for prepared, embedding in zip(batch, embeddings, strict=True):
            self._store(prepared.entry, embedding)

    def _store(self, entry: dict[str, Any], embedding: np.ndarray) -> None:
        self._next_shard.append((entry, embedding))
        if len(self._next_shard) == SHARD:
            self._write_shard()

    def _write_shard(self) -> None:
        if self._next_shard:
            entries = pa.Table.from_pylist([entry for entry, _ in self._next_shard], schema=SCHEMA)
            block = np.stack([embedding for _, embedding in self._next_shard])
            manifest = replace(self.manifest, neighbours="exact")
            write_index(self.shards / f"shard-{uuid.uuid4().hex[:16]}", manifest, [entries], [block])
            self._next_shard = []


def _date_of(image: Image.Image, mtime: int) -> datetime | None:
    """Local time at which a photograph was taken, or else at which its file last changed."""
    for find in (
        lambda: image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal),
        lambda: image.getexif().get(ExifTags.Base.DateTime),
    ):
        try:
            return datetime.strptime(str(find()).strip("\0 "), "%Y:%m:%d %H:%M:%S")
        except Exception:  # missing, all zeros because the camera's clock was never set, or damaged in any way
            continue
    return datetime.fromtimestamp(mtime // 10**9) if mtime != UNKNOWN else None
