"""An index made and kept up to date: only images that are new or changed are encoded, by one process or by several.

What has been encoded is kept at once in `.NAME.shards` beside the index `NAME` (see `shards.py`), so that a run that
was interrupted, or a process of several that was lost, costs only its unfinished shard. At the end everything becomes
one index, which replaces the former one at once.
"""

import os
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..configuration_miniclip import MiniClipConfig
from ..data.caption_files import ColumnNames
from ..data.sources import DEFAULT_COLUMNS, Item, is_listed_at_once, resolve_source, walk_sources
from ..errors import DataError, MiniClipError, ModelError, UsageError, one_line
from ..inference.loading import model_folder
from ..utils.files import discard_folder, recover_folder
from .approximate import is_chosen
from .embeddings_file import DTYPES, gather_blocks
from .fingerprints import describe_files, fingerprint
from .index import ImageIndex, Manifest, write_index
from .shards import Encoding, Pool, default_workers, open_pool

PATIENCE = timedelta(days=7)  # that processes wait for the slowest


@dataclass
class Report:
    """What a run of [`update_index`] did.

    Args:
        images: in the index now.
        encoded: by the model in this run.
        reused: images of the sources that had been encoded before.
        dropped: images that were in the index and are no longer.
        skipped: names of images that could not be read, and why.
        seconds: of the whole run.
    """

    images: int = 0
    encoded: int = 0
    reused: int = 0
    dropped: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Listed:
    """What the sources tell of an image now, whenever it was encoded."""

    source: str
    id: str
    path: str | None
    captions: list[str]
    split: str


@dataclass(frozen=True)
class _Plan:
    """What a run is going to do."""

    target: Path
    existing: ImageIndex | None  # the index as it is
    manifest: Manifest  # of the index to be
    sources_to_scan: list[str]  # sources to walk through
    sources_kept: list[str]  # sources whose part of the index stays as it is
    overwrite: bool

    @property
    def shards(self) -> Path:
        return self.target.with_name(f".{self.target.name}.shards")

    def pool(self) -> Pool:
        """What has been encoded up to now."""
        return open_pool(None if self.overwrite else self.existing, self.shards, self.manifest)


def update_index(
    folder: str | os.PathLike,
    sources: Iterable[str | os.PathLike] = (),
    model: str | os.PathLike | None = None,
    *,
    remove: Iterable[str | os.PathLike] = (),
    overwrite: bool = False,
    columns: ColumnNames = DEFAULT_COLUMNS,
    dtype: str | None = None,
    neighbours: str | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Make an index or bring it up to date. Several processes of `accelerate launch` share the work.

    Args:
        folder: of the index.
        sources: folders, caption files, tar archives, data sets, see `walk_source`. What the index has of other
            sources stays; none: all that it was made of are looked through again.
        model: folder or Hub name of the model; of an index that is there, by default its own.
        remove: sources whose images shall be dropped from the index.
        overwrite: use nothing of an index that is there, whatever model made it; it stays until the new one is ready.
        columns: names in caption files and data sets.
        dtype: of the embeddings, `float32` (default) or `float16`, which takes half the space.
        neighbours: `exact` search, an `approximate` index, or `auto` (default): approximate where there are many
            images and FAISS is installed.
        batch_size: images a forward pass.
        num_workers: threads that read images; by default one a core.
        progress: show a progress bar with images a second.

    Returns:
        What was done. Images that cannot be read are in its `skipped`; the index has all others.

    Raises:
        ModelError: no model there, or the index was made by another one.
        UsageError: no model or no source is named, or another type than the index has.
        DataError: a source cannot be read, or has no image.

    Example:
        >>> update_index("photos.index", ["~/Pictures"], "my-clip/export").encoded  # doctest: +SKIP
        8000
    """
    start = time.perf_counter()
    processes = _processes()
    target = Path(folder).expanduser()
    recover_folder(target)
    existing = ImageIndex.open(target, verify=True) if target.exists() else None
    sources_to_scan, sources_kept = _sources_of(existing, list(sources), list(remove))
    manifest = _manifest(target, existing, model, dtype, neighbours, overwrite)
    plan = _Plan(target, existing, manifest, sources_to_scan, [] if overwrite else sources_kept, overwrite)
    with _locked(plan, processes):
        encoding = Encoding(manifest, plan.pool(), plan.shards, batch_size, num_workers or default_workers())
        listed = _encode_share(encoding, sources_to_scan, columns, processes, progress)
        report = gather_reports(encoding)
        if processes.is_main_process:
            _merge(plan, listed, report)
    if processes.is_main_process:
        discard_folder(plan.shards)
    report.seconds = time.perf_counter() - start
    return report


# --- before any long work -------------------------------------------------------------------------------------------


def _processes() -> PartialState:
    """This process among those that a launcher started; alone, if there is none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    # Not told to use CPUs, accelerate takes the processes of a machine without a GPU for single ones.
    return PartialState(cpu=told or not torch.accelerator.is_available(), timeout=PATIENCE)


def _sources_of(existing: ImageIndex | None, sources: list[Any], remove: list[Any]) -> tuple[list[str], list[str]]:
    """The sources to walk through, and those whose part of the index stays as it is."""
    known = existing.manifest.sources if existing else []
    gone = []
    for name in map(os.fspath, remove):
        found = next((s for s in (name, os.path.abspath(os.path.expanduser(name))) if s in known), None)
        if found is None:
            raise UsageError(f"{name} is none of the sources of this index: {', '.join(known) or 'it has none'}")
        gone.append(found)
    staying = [name for name in known if name not in gone]
    asked = list(dict.fromkeys(resolve_source(source) for source in sources))
    if not asked and not gone:
        asked = staying
    if not asked and not staying:
        raise UsageError("no source to index: name a folder, a caption file, a tar archive or a data set")
    return asked, [name for name in staying if name not in asked]


def _manifest(
    target: Path, existing: ImageIndex | None, model: Any, dtype: str | None, neighbours: str | None, overwrite: bool
) -> Manifest:
    """What can be told of the new index before any image is read."""
    if model is None and existing is None:
        raise UsageError(f"{target}: no index here; make one with: miniclip index MODEL SOURCE -o {target}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    name = os.fspath(model) if model is not None else existing.model if existing else ""
    if os.path.isdir(os.path.expanduser(name)):
        name = os.path.abspath(os.path.expanduser(name))
    folder = model_folder(name)
    values = MiniClipConfig.get_config_dict(folder)[0]
    if values.get("model_type") != MiniClipConfig.model_type:
        raise ModelError(f"{name}: a model of type {values.get('model_type')!r}, not one that MiniCLIP exported")
    files = describe_files(folder)
    unchanged = existing is not None and (existing.model, existing.manifest.files) == (name, files)
    print_of = existing.manifest.fingerprint if existing and unchanged else fingerprint(folder)
    neighbours = neighbours or (existing.manifest.neighbours if existing else "auto")
    is_chosen(neighbours, 0)  # tells now what it would tell at the end
    manifest = Manifest(name, print_of, MiniClipConfig.from_pretrained(folder).projection_dim, dtype or "float32",
                        files=files, neighbours=neighbours)  # fmt: skip
    if existing is None or overwrite:
        return manifest
    rebuild = shlex.join(["miniclip", "index", name, *existing.manifest.sources, "-o", str(target), "--overwrite"])
    if existing.manifest.fingerprint != print_of:
        raise ModelError(
            f"{target} was built by {existing.model} with other weights than {name} has now, so their embeddings are "
            f"not comparable; rebuild the index: {rebuild}"
        )
    if dtype not in (None, existing.manifest.dtype):
        raise UsageError(
            f"{target} holds {existing.manifest.dtype}, not {dtype}; rebuild the index: {rebuild} --dtype {dtype}"
        )
    return replace(manifest, dtype=existing.manifest.dtype)


@contextmanager
def _locked(plan: _Plan, processes: PartialState) -> Iterator[None]:
    """Keep a second run away from the same index; the lock is gone with its process."""
    from huggingface_hub.utils import WeakFileLock

    plan.shards.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if processes.is_main_process:
            try:
                stack.enter_context(WeakFileLock(plan.shards / "lock", timeout=0.1))
            except TimeoutError:
                raise MiniClipError(f"{plan.target} is being written by another run; wait for its end") from None
        processes.wait_for_everyone()
        yield


# --- the work, and putting it together ------------------------------------------------------------------------------


def _encode_share(
    encoding: Encoding, sources_to_scan: list[str], columns: ColumnNames, processes: PartialState, progress: bool
) -> list[Listed]:
    """Encode this process's share of what is new. Returns all images that the sources list."""
    listed: list[Listed] = []

    def share() -> Iterator[Item]:
        for number, (source, item) in enumerate(walk_sources(sources_to_scan, columns) if sources_to_scan else ()):
            listed.append(Listed(source, item.id, item.path, item.captions, item.split))
            if number % processes.num_processes == processes.process_index and encoding.pool.find(item) is None:
                yield item

    shown = progress and processes.is_main_process
    if all(map(is_listed_at_once, sources_to_scan)):
        items = list(share())
        encoding.run(items, len(items), shown)
    else:
        encoding.run(share(), None, shown)
    return listed


def gather_reports(encoding: Encoding) -> Report:
    """The reports of all processes, which are waited for, as one."""
    try:
        parts = gather_object([(encoding.encoded, encoding.skipped)])
    except RuntimeError as error:
        raise MiniClipError(
            f"a process of this run was lost ({one_line(error)}); start the same command again: all that was encoded "
            "is kept but for its unfinished shard"
        ) from error
    skipped = {name: reason for _, some in parts for name, reason in some.items()}
    return Report(encoded=sum(encoded for encoded, _ in parts), skipped=skipped)


def _merge(plan: _Plan, listed: list[Listed], report: Report) -> None:
    """Write the index: what it has of sources that were not walked through, then what is listed and was encoded."""
    pool = plan.pool()
    former = pool.parts[0].read_entries() if plan.sources_kept else None
    new = [image for image in listed if image.id not in report.skipped]
    if lost := [image.id for image in new if image.id not in pool.by_id]:
        raise MiniClipError(
            f"{len(lost)} of {len(new)} images are not in {plan.shards}, the first {lost[0]}: all processes have to "
            "see this folder on a file system that they share; start the same command again there"
        )
    met = {image.id for image in new}
    stays = []
    if former is not None:
        listed_before = zip(former["source"].to_pylist(), former["id"].to_pylist(), strict=True)
        for row, (source, name) in enumerate(listed_before):
            if source in plan.sources_kept and name not in met:
                stays.append(row)
    places = [*((0, row) for row in stays), *(pool.by_id[image.id] for image in new)]
    if not places:
        raise DataError(
            f"none of the {len(listed)} images can be read; the first: {next(iter(report.skipped.items()))}"
        )
    part_of, row_of = np.array(places, dtype=np.int64).reshape(-1, 2).T
    offsets = np.cumsum([0, *(len(part) for part in pool.parts)])
    facts = pa.concat_tables([part.read_entries() for part in pool.parts]).take(pa.array(offsets[part_of] + row_of))
    for name in ("source", "path", "captions", "split"):  # as the sources tell them now
        old = facts[name].slice(0, len(stays)).combine_chunks()
        now = pa.array([getattr(image, name) for image in new], type=facts.schema.field(name).type)
        values = pa.chunked_array([old, now] if len(stays) else [now])
        facts = facts.set_column(facts.schema.get_field_index(name), facts.schema.field(name), values)
    manifest = replace(plan.manifest, sources=[*plan.sources_kept, *plan.sources_to_scan], skipped=report.skipped)
    write_index(plan.target, manifest, facts, gather_blocks([part.embeddings for part in pool.parts], part_of, row_of))
    now = set(facts["id"].to_pylist())
    before = plan.existing.entries["id"].to_pylist() if plan.existing else []
    report.images, report.reused = len(places), len(new) - report.encoded
    report.dropped = sum(name not in now for name in before)
