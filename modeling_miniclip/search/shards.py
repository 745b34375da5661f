"""Shards: finished embeddings, written as small indexes and merged at the end of an update.

Before an image is encoded, it is looked up in the existing index and in all finished shards: by the size and time of
its file, then by its contents.
"""

import errno
import hashlib
import os
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
from tqdm.auto import tqdm

from ..data.loading.collation import model_inputs
from ..data.picture_formats import decode_picture
from ..data.sources import UNKNOWN, Item
from ..errors import MiniClipError, printable
from ..inference.loading import load_tower, model_folder
from ..modeling_miniclip import MiniClipModel
from ..pictures_miniclip import exif_orientation, to_rgb
from ..processing_miniclip import MiniClipProcessor
from ..utils.performance import to_channels_last
from ..utils.thumbnails import encode_thumbnail
from .index import MANIFEST, SCHEMA, ImageIndex, Manifest, write_index

SHARD = 1024  # images per shard; an interruption loses fewer than this per process

Place = tuple[int, int]  # part of the pool, and row in it


class Pool:
    """All embeddings that the model of an index has computed before.

    Args:
        parts: the existing index and the shards, oldest first.
    """

    def __init__(self, parts: list[ImageIndex]):
        self.parts = parts
        self.by_id: dict[str, Place] = {}
        self.by_hash: dict[str, Place] = {}
        self.stats: list[list[tuple[int, int]]] = []  # size and mtime of each row of each part
        for number, part in enumerate(parts):
            columns = part.entries.select(["id", "hash", "size", "mtime"]).to_pydict()
            self.stats.append(list(zip(columns["size"], columns["mtime"], strict=True)))
            for row, (name, content) in enumerate(zip(columns["id"], columns["hash"], strict=True)):
                self.by_id[name] = self.by_hash[content] = (number, row)

    def find(self, item: Item) -> Place | None:
        """Place of an image whose file has not changed, judged by its size and time; otherwise None."""
        place = self.by_id.get(item.id)
        if place is None or item.mtime == UNKNOWN or self.stats[place[0]][place[1]] != (item.size, item.mtime):
            return None
        return place


def open_pool(existing: ImageIndex | None, shards: Path, manifest: Manifest) -> Pool:
    """Open the existing index and the finished shards, except those of another model or number format.

    Args:
        existing: the index before the update, if there is one.
        shards: folder of the shards.
        manifest: manifest of the index after the update.
    """
    folders = [path for path in shards.iterdir() if not path.name.startswith(".") and (path / MANIFEST).is_file()]
    folders.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    parts = [*([existing] if existing else []), *(ImageIndex.open(path) for path in folders)]
    same = (manifest.fingerprint, manifest.dtype)
    return Pool([part for part in parts if (part.manifest.fingerprint, part.manifest.dtype) == same])


@dataclass(frozen=True)
class Prepared:
    """An image after a thread has read it.

    Args:
        entry: the columns of [`SCHEMA`][modeling_miniclip.search.index.SCHEMA] that the image determines.
        pixels: `[3, H, W]` uint8, or None if the image was encoded before.
        place: where in the pool it was encoded before, or None.
        warning: what is odd about the image; may be empty.
    """

    entry: dict[str, Any]
    pixels: np.ndarray | None = None
    place: Place | None = None
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
        self._loading = Lock()
        self._next_shard: list[tuple[dict[str, Any], np.ndarray]] = []  # entries and embeddings

    def load(self) -> tuple[MiniClipModel, MiniClipProcessor]:
        """Image tower of the model and its processor; any thread may call it, and the first call loads them."""
        with self._loading:
            if self._tower is None:
                model, processor = load_tower(model_folder(self.manifest.model), "image")
                to_channels_last(model.vision_model)
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
                    if prepared.pixels is None:
                        self._copy(prepared)
                    else:
                        batch.append(prepared)
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
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        place = self.pool.by_hash.get(digest)
        needs_thumbnail = item.path is None and (place is None or self.pool.by_id.get(item.id) != place)
        needs_pixels = place is None or needs_thumbnail
        image = decode_picture(content, lambda opened: needs_pixels)
        orientation = exif_orientation(image)
        width, height = image.size[::-1] if (orientation or 1) >= 5 else image.size
        entry: dict[str, Any] = {
            "id": item.id, "path": item.path, "size": item.size, "mtime": item.mtime, "hash": digest,
            "date": _date_of(image, item.mtime), "width": width, "height": height,
        }  # fmt: skip
        if not needs_pixels:
            return Prepared(entry, place=place)
        if orientation is None:
            warning = "its EXIF data cannot be read, so it may be shown turned"
            for key in ("exif", "Raw profile type exif"):
                image.info.pop(key, None)
        else:
            warning = ""
        rgb = to_rgb(image)
        if needs_thumbnail:
            entry["thumbnail"] = encode_thumbnail(rgb)
        if place is not None:
            return Prepared(entry, None, place, warning)
        _, processor = self.load()
        return Prepared(entry, processor.crop(rgb), None, warning)

    def _copy(self, prepared: Prepared) -> None:
        """Store an image whose contents were encoded before, under another name or when its file had another time."""
        assert prepared.place is not None
        if prepared.entry["mtime"] != UNKNOWN or self.pool.by_id.get(prepared.entry["id"]) != prepared.place:
            part, row = prepared.place
            self._store(prepared.entry, self.pool.parts[part].embeddings[row])

    @torch.inference_mode()
    def _encode(self, batch: list[Prepared]) -> None:
        if not batch:
            return
        model, processor = self.load()
        pixels = torch.from_numpy(np.stack([prepared.pixels for prepared in batch if prepared.pixels is not None]))
        inputs = model_inputs({"pixel_values": pixels}, processor, model.device)  # pixels [batch, 3, H, W]
        embeddings = model(**inputs).image_embeds.float().cpu().numpy()  # [batch, dim]
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
            write_index(self.shards / f"shard-{uuid.uuid4().hex[:16]}", manifest, entries, [block])
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


def default_workers() -> int:
    """Number of threads that read images by default: one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
