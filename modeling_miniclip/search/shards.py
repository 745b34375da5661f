"""What has been encoded, kept at once: small indexes beside the one that they will become part of.

Before an image is encoded it is looked for in the index as it is and in all finished shards, by the size and time of
its file and by its content.
"""

import hashlib
import io
import os
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from PIL import ExifTags, Image
from tqdm.auto import tqdm

from ..data.loader import model_inputs
from ..data.sources import UNKNOWN, Item
from ..errors import MiniClipError, printable
from ..inference.loading import load_tower, model_folder
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor, to_rgb
from ..utils.performance import to_channels_last
from ..utils.thumbnails import encode_thumbnail
from .index import MANIFEST, SCHEMA, ImageIndex, Manifest, write_index

SHARD = 1024  # images that an interruption costs at most, in each process

Place = tuple[int, int]  # part of the pool, and row in it


class Pool:
    """Everything that was encoded before with this model.

    Args:
        parts: indexes, older ones first.
    """

    def __init__(self, parts: list[ImageIndex]):
        self.parts = parts
        self.by_id: dict[str, Place] = {}
        self.by_hash: dict[str, Place] = {}
        self.stats: list[list[tuple[int, int]]] = []
        for number, part in enumerate(parts):
            columns = part.entries.select(["id", "hash", "size", "mtime"]).to_pydict()
            self.stats.append(list(zip(columns["size"], columns["mtime"], strict=True)))
            for row, (name, content) in enumerate(zip(columns["id"], columns["hash"], strict=True)):
                self.by_id[name] = self.by_hash[content] = (number, row)

    def find(self, item: Item) -> Place | None:
        """Where an image is whose file has not changed, as far as its size and time tell."""
        place = self.by_id.get(item.id)
        if place is None or item.mtime == UNKNOWN or self.stats[place[0]][place[1]] != (item.size, item.mtime):
            return None
        return place


def open_pool(former: ImageIndex | None, shards: Path, manifest: Manifest) -> Pool:
    """The index and the finished shards; those that another model or another type of number made are left aside."""
    folders = [path for path in shards.iterdir() if not path.name.startswith(".") and (path / MANIFEST).is_file()]
    folders.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    parts = [*([former] if former else []), *(ImageIndex.open(path) for path in folders)]
    same = (manifest.fingerprint, manifest.dtype)
    return Pool([part for part in parts if (part.manifest.fingerprint, part.manifest.dtype) == same])


@dataclass(frozen=True)
class Prepared:
    """An image as the thread that read it leaves it: what is known of it, and its pixels or where it was found."""

    facts: dict[str, Any]
    pixels: np.ndarray | None = None  # [3, H, W] uint8
    place: Place | None = None


class Encoding:
    """One process's part of the work: images are read in threads, encoded in batches and kept in shards.

    Args:
        manifest: of the index to be.
        pool: what need not be encoded.
        shards: folder of the shards.
        batch_size: images a forward pass.
        num_workers: threads.
    """

    def __init__(self, manifest: Manifest, pool: Pool, shards: Path, batch_size: int, num_workers: int):
        self.manifest, self.pool, self.shards = manifest, pool, shards
        self.batch_size, self.num_workers = batch_size, num_workers
        self.loading = Lock()
        self.encoded = 0
        self.skipped: dict[str, str] = {}  # names of images that could not be read, and why
        self.finished: list[tuple[dict[str, Any], np.ndarray]] = []  # rows of the next shard

    @cached_property
    def tower(self) -> tuple[MiniClipModel, MiniClipProcessor]:
        """The image side of the model and its processor, loaded when the first image is to be encoded."""
        model, processor = load_tower(model_folder(self.manifest.model), "image")
        to_channels_last(model.vision_model)
        return model.to(PartialState().device), processor

    def run(self, items: Iterable[Item], total: int | None, progress: bool) -> None:
        """Encode images and keep them, also those that were finished when an error or Ctrl-C ends it."""
        batch: list[Prepared] = []
        if total:
            self.tower  # noqa: B018  (loaded before the clock of the progress bar starts)
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
        """Images in order, read by threads while others are encoded; what cannot be read is noted and left out."""
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
                except Exception as error:  # Pillow's decoders raise all sorts
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    self.skipped[item.id] = reason
                    bar.write(printable(f"skipped: {item.id}: {reason}"), file=sys.stderr)
                else:
                    yield prepared
                bar.update()

    def _prepare(self, item: Item) -> Prepared:
        content = item.read()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        place = self.pool.by_hash.get(digest)
        with Image.open(io.BytesIO(content)) as image:
            exif = image.getexif()
            turned = exif.get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
            facts: dict[str, Any] = {
                "id": item.id, "path": item.path, "size": item.size, "mtime": item.mtime, "hash": digest,
                "date": _date_of(exif, item.mtime), "width": width, "height": height,
            }  # fmt: skip
            needs_thumbnail = item.path is None and (place is None or self.pool.by_id.get(item.id) != place)
            if place is not None and not needs_thumbnail:
                return Prepared(facts, place=place)
            rgb = to_rgb(image)
        if needs_thumbnail:
            facts["thumbnail"] = encode_thumbnail(rgb)
        if place is not None:
            return Prepared(facts, place=place)
        with self.loading:
            _, processor = self.tower
        return Prepared(facts, processor.crop(rgb))

    def _copy(self, prepared: Prepared) -> None:
        """An image whose content was encoded before, under another name or, its file being as new, under this one."""
        assert prepared.place is not None
        if prepared.facts["mtime"] != UNKNOWN or self.pool.by_id.get(prepared.facts["id"]) != prepared.place:
            part, row = prepared.place
            self._keep(prepared.facts, self.pool.parts[part].embeddings[row])

    @torch.inference_mode()
    def _encode(self, batch: list[Prepared]) -> None:
        if not batch:
            return
        model, processor = self.tower
        pixels = torch.from_numpy(np.stack([prepared.pixels for prepared in batch if prepared.pixels is not None]))
        inputs = model_inputs({"pixel_values": pixels}, processor, model.device)
        embeddings = model(**inputs).image_embeds.float().cpu().numpy()
        if not np.isfinite(embeddings).all():
            raise MiniClipError(f"{self.manifest.model} gives embeddings that are no numbers (NaN): train it again")
        self.encoded += len(batch)
        for prepared, embedding in zip(batch, embeddings, strict=True):
            self._keep(prepared.facts, embedding)

    def _keep(self, facts: dict[str, Any], embedding: np.ndarray) -> None:
        self.finished.append((facts, embedding))
        if len(self.finished) == SHARD:
            self._write_shard()

    def _write_shard(self) -> None:
        if self.finished:
            entries = pa.Table.from_pylist([facts for facts, _ in self.finished], schema=SCHEMA)
            block = np.stack([embedding for _, embedding in self.finished])
            manifest = replace(self.manifest, neighbours="exact")
            write_index(self.shards / f"shard-{uuid.uuid4().hex[:16]}", manifest, entries, [block])
            self.finished = []


def _date_of(exif: Any, mtime: int) -> datetime | None:
    """When a photograph was taken, as its camera tells, else when its file changed last; local time."""
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for text in (details.get(ExifTags.Base.DateTimeOriginal), exif.get(ExifTags.Base.DateTime)):
        try:
            return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
        except ValueError:  # none, or zeros of a camera whose clock was never set
            continue
    return datetime.fromtimestamp(mtime // 10**9) if mtime != UNKNOWN else None


def default_workers() -> int:
    """One thread a core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
