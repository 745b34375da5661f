"""`update_index`: build an index or update it. One or several processes encode only new and changed images.

Finished embeddings go at once to `.NAME.shards` next to the index `NAME` (see `shards.py`), so an interrupted run or a
lost process costs only its unfinished shard. At the end everything is merged into one index, which replaces the old
one in a single step.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..configuration_miniclip import MiniClipConfig
from ..data.columns import ColumnNames
from ..data.listing import is_hidden
from ..data.problems import SHARD_PROBLEMS, OnProblem
from ..data.skipped import describe_skipped
from ..data.sources import DEFAULT_COLUMNS, WARNINGS, Item, is_gone, is_listed_at_once, resolve_source, walk_sources
from ..errors import DataError, MiniClipError, ModelError, Problem, UsageError, printable
from ..inference.loading import model_folder
from ..training.command_line.launch import read_launch
from ..training.processes.heartbeat import ends_with_lost_processes, join_processes
from ..utils.files import discard_folder, recover_folder
from ..utils.names import check_name, name_of, path_of
from .approximate import uses_approximate_search
from .embeddings_file import DTYPES, gather_blocks
from .fingerprints import describe_files, fingerprint
from .index import MANIFEST, ImageIndex, Manifest, folder_of_model, write_index, write_manifest
from .shards import Encoding, Pool, default_workers, open_pool


@dataclass
class Report:
    """What a run of [`update_index`] did.

    Args:
        images: images in the index after the run.
        encoded: images that the model encoded in this run.
        reused: images of the scanned sources that had been encoded before.
        dropped: images that were in the index before and no longer are.
        skipped: names of images that could not be read, with the reason.
        unlisted: names of folders that could not be listed, and of damaged shards, with the reason.
        kept: images that are as they were in the index, because their folder could not be listed, their disk is not
            mounted or their file could not be reached.
        seconds: duration of the run.
        missing: sources that are gone, if the model has moved: then only its place was updated.
    """

    images: int = 0
    encoded: int = 0
    reused: int = 0
    dropped: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    kept: int = 0
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ListedImage:
    """What a source says about an image now, no matter when it was encoded."""

    source: str
    id: str
    path: str | None
    captions: list[str]
    split: str


@dataclass(frozen=True)
class _Plan:
    """What a run will do.

    Args:
        target: folder of the index.
        existing: the index before the run, if there is one.
        manifest: manifest of the index after the run.
        sources_to_scan: sources whose images are listed and encoded.
        sources_kept: sources whose images stay in the index as they are.
        overwrite: whether to use nothing of the existing index.
        missing: with an index whose model has moved: its sources that are gone, so that only the model can be updated.
    """

    target: Path
    existing: ImageIndex | None
    manifest: Manifest
    sources_to_scan: list[str]
    sources_kept: list[str]
    overwrite: bool
    missing: list[str] = field(default_factory=list)

    @property
    def shards(self) -> Path:
        """Folder of finished embeddings."""
        return self.target.with_name(f".{self.target.name}.shards")

    def pool(self) -> Pool:
        """All embeddings that exist at this moment."""
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
    """Build an index or update it. Several processes of `accelerate launch` share the work.

    Args:
        folder: folder of the index.
        sources: folders, caption files, shards and datasets, see `walk_source`. Images of other sources stay
            in the index. By default all sources of the index are scanned again.
        model: folder or Hub name of the model; by default the one that built the index. If that has moved, its new
            place. If the images have moved, too, nothing but the model's place is updated.
        remove: sources whose images are dropped from the index.
        overwrite: whether to rebuild the index from scratch, with any model; the old index stays until the new one is
            ready.
        columns: column names in caption files and datasets.
        dtype: number format of the embeddings: `float32` (default), or `float16`, which takes half the space.
        neighbours: kind of search: `exact`, `approximate`, or `auto` (default): approximate if there are many images
            and FAISS is installed.
        batch_size: images per forward pass.
        num_workers: threads that read images; by default one per core.
        progress: whether to show a progress bar.

    Raises:
        ModelError: there is no such model, or another one built the index.
        UsageError: a model or a source is missing, or `dtype` is not that of the index.
        DataError: a source cannot be read, or has no images. Single unreadable images are in `Report.skipped` instead.

    Example:
        >>> update_index("photos.index", ["~/Pictures"], "my-clip/export").encoded  # doctest: +SKIP
        8000
    """
    start = time.perf_counter()
    with ends_with_lost_processes(lambda: "run the same command again: finished embeddings are kept"):
        processes = _processes()
        plan = _make_plan(Path(folder).expanduser(), list(sources), model, list(remove), overwrite, dtype, neighbours)
        if plan.existing is not None and plan.missing:
            return _point_at_model(plan, plan.existing, processes)
        with _locked(plan, processes):
            encoding = Encoding(plan.manifest, plan.pool(), plan.shards, batch_size, num_workers or default_workers())
            problems: list[Problem] = []
            listed = _encode_share(encoding, plan.sources_to_scan, columns, processes, progress, problems.append)
            report, unreachable = gather_reports(encoding)
            if processes.is_main_process:
                _add_problems(plan, report, problems)
                _merge(plan, listed, report, unreachable)
        if processes.is_main_process:
            discard_folder(plan.shards)
    report.seconds = time.perf_counter() - start
    return report


# --- checks before the long work ------------------------------------------------------------------------------------


def _processes() -> PartialState:
    """This process among those that a launcher started, or alone."""
    launch = read_launch()
    launch.check_processes()
    # Without cpu=True, Accelerate does not connect the processes of a machine without a GPU.
    on_cpu = launch.on_cpu or not torch.accelerator.is_available()
    processes = join_processes(on_cpu)
    launch.check_joined(processes.num_processes)
    return processes


def _make_plan(
    target: Path,
    sources: Sequence[str | os.PathLike],
    model: str | os.PathLike | None,
    remove: Sequence[str | os.PathLike],
    overwrite: bool,
    dtype: str | None,
    neighbours: str | None,
) -> _Plan:
    """Check the arguments of [`update_index`] and decide what to do."""
    check_name(target)
    recover_folder(target)
    existing = ImageIndex.open(target, verify=True) if target.exists() else None
    scan, kept = _choose_sources(existing, sources, remove)
    manifest = _describe_index(target, existing, model, dtype, neighbours)
    if existing is not None and not overwrite:
        _check_same_kind(target, existing, manifest, dtype)
        manifest = replace(manifest, dtype=existing.manifest.dtype)
        if not sources and not remove and manifest.model != existing.model:
            gone = [source for source in scan if is_gone(source)]
            if gone:
                return _Plan(target, existing, manifest, [], scan, False, gone)
    return _Plan(target, existing, manifest, scan, [] if overwrite else kept, overwrite)


def _choose_sources(
    existing: ImageIndex | None, sources: Sequence[str | os.PathLike], remove: Sequence[str | os.PathLike]
) -> tuple[list[str], list[str]]:
    """Sources to scan, and sources whose images stay in the index as they are."""
    known = existing.manifest.sources if existing else []
    removed = []
    for name in [os.fspath(source) for source in remove]:
        whole = name_of(os.path.abspath(os.path.expanduser(name)))
        found = next((source for source in (name, whole) if source in known), None)
        if found is None:
            raise UsageError(f"--remove {name}: not a source of this index, which has: {', '.join(known) or 'none'}")
        removed.append(found)
    remaining = [name for name in known if name not in removed]
    scan = list(dict.fromkeys(resolve_source(source) for source in sources))
    if not scan and not removed:
        scan = remaining
    if not scan and not remaining:
        raise UsageError("no source to index: name a folder, a caption file, shards or a dataset")
    return scan, [name for name in remaining if name not in scan]


def _describe_index(
    target: Path,
    existing: ImageIndex | None,
    model: str | os.PathLike | None,
    dtype: str | None,
    neighbours: str | None,
) -> Manifest:
    """Manifest of the new index, without the fields that depend on its images."""
    if model is None and existing is None:
        raise UsageError(f"{target}: no index here; make one with: miniclip index MODEL SOURCE -o {target}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    name = os.fspath(model) if model is not None else existing.model if existing else ""
    if os.path.isdir(os.path.expanduser(name)):
        name = os.path.abspath(os.path.expanduser(name))
    folder = model_folder(name) if model is not None or existing is None else folder_of_model(existing)
    values = MiniClipConfig.get_config_dict(folder)[0]
    if values.get("model_type") != MiniClipConfig.model_type:
        raise ModelError(f"{name}: a model of type {values.get('model_type')!r}, not one that MiniCLIP exported")
    files = describe_files(folder)
    unchanged = existing is not None and (existing.model, existing.manifest.files) == (name, files)
    hash_of_model = existing.manifest.fingerprint if existing and unchanged else fingerprint(folder)
    neighbours = neighbours or (existing.manifest.neighbours if existing else "auto")
    uses_approximate_search(neighbours, 0)  # raises its errors now instead of after the long work
    dim = MiniClipConfig.from_pretrained(folder).projection_dim
    return Manifest(name, hash_of_model, dim, dtype or "float32", files=files, neighbours=neighbours)


def _check_same_kind(target: Path, existing: ImageIndex, manifest: Manifest, dtype: str | None) -> None:
    """Raise an error, with the command that rebuilds the index, if new embeddings do not fit the existing ones."""
    sources = existing.manifest.sources
    rebuild = shlex.join(["miniclip", "index", manifest.model, *sources, "-o", str(target), "--overwrite"])
    if existing.manifest.fingerprint != manifest.fingerprint:
        raise ModelError(
            f"{target} was built by {existing.model} with other weights than {manifest.model} has now, so their "
            f"embeddings are not comparable; rebuild the index: {rebuild}"
        )
    if dtype not in (None, existing.manifest.dtype):
        raise UsageError(
            f"{target} holds {existing.manifest.dtype}, not {dtype}; rebuild the index: {rebuild} --dtype {dtype}"
        )


def _point_at_model(plan: _Plan, existing: ImageIndex, processes: PartialState) -> Report:
    """Write only the new place of the model, which has the same fingerprint, into the index."""
    with _locked(plan, processes):
        if processes.is_main_process:
            moved = replace(existing.manifest, model=plan.manifest.model, files=plan.manifest.files)
            try:
                write_manifest(plan.target, moved)
            except OSError as error:
                raise MiniClipError(f"{plan.target} cannot be written: {error.strerror or error}") from error
    if processes.is_main_process and set(os.listdir(plan.shards)) <= {"lock"}:
        discard_folder(plan.shards)
    return Report(images=len(existing), reused=len(existing), missing=plan.missing)


@contextmanager
def _locked(plan: _Plan, processes: PartialState) -> Iterator[None]:
    """Within the block, no other run can write this index. The lock ends with the process."""
    from huggingface_hub.utils import WeakFileLock

    plan.shards.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if processes.is_main_process:
            try:
                stack.enter_context(WeakFileLock(plan.shards / "lock", timeout=0.1))
            except TimeoutError:
                raise MiniClipError(f"{plan.target} is being written by another run; wait until it ends") from None
        processes.wait_for_everyone()
        yield


# --- encode and merge -----------------------------------------------------------------------------------------------


def _encode_share(
    encoding: Encoding,
    sources: list[str],
    columns: ColumnNames,
    processes: PartialState,
    progress: bool,
    on_problem: OnProblem,
) -> list[ListedImage]:
    """Encode this process's share of the new images. Returns all images that the sources list."""
    listed: list[ListedImage] = []
    walked = walk_sources(sources, columns, on_problem) if sources else iter(())
    is_known = all(map(is_listed_at_once, sources))
    images = list(walked) if is_known else walked

    def new_items() -> Iterator[Item]:
        units = _units([item for _, item in images], processes.num_processes) if isinstance(images, list) else count()
        for unit, (source, item) in zip(units, images, strict=False):
            listed.append(ListedImage(source, item.id, item.path, item.captions, item.split))
            if unit % processes.num_processes == processes.process_index and encoding.pool.find(item) is None:
                yield item

    shows_progress = progress and processes.is_main_process
    if is_known:
        items = list(new_items())
        encoding.run(items, len(items), shows_progress)
    else:
        encoding.run(new_items(), None, shows_progress)
    return listed


def _units(items: list[Item], processes: int) -> Iterator[int]:
    """The unit of work that each image belongs to: its shard, if each process gets at least one, or the image itself.

    So not every process reads every shard.
    """
    shards = {shard: number for number, shard in enumerate(dict.fromkeys(item.shard for item in items if item.shard))}
    for number, item in enumerate(items):
        yield shards[item.shard] if item.shard and len(shards) >= processes else number


def gather_reports(encoding: Encoding) -> tuple[Report, set[str]]:
    """Wait for all processes and combine their reports, and the names of images whose files could not be reached."""
    parts = gather_object([(encoding.encoded, encoding.skipped, encoding.unreachable)])
    skipped = {name: reason for _, some, _ in parts for name, reason in some.items()}
    unreachable = {name for *_, names in parts for name in names}
    return Report(encoded=sum(encoded for encoded, *_ in parts), skipped=skipped), unreachable


def _add_problems(plan: _Plan, report: Report, problems: list[Problem]) -> None:
    """Add what the walk through the sources left out to a report, and print it."""
    known = plan.existing.entries["id"].to_pylist() if plan.existing and problems else []
    for problem in problems:
        inside = os.path.join(problem.file, "")
        if problem.kind == "dangling" and any(name.startswith(inside) for name in known):
            report.unlisted[problem.file] = problem.text  # it led to a folder of images, perhaps on another disk
            print(printable(f"skipped: {problem}"), file=sys.stderr)
        elif problem.kind in WARNINGS:
            print(printable(f"warning: {problem}"), file=sys.stderr)
        else:
            is_inside = problem.image is not None and problem.image != problem.file
            name = f"{problem.file}/{problem.image}" if is_inside else problem.file
            is_unlisted = problem.kind == "unlisted" or problem.kind in SHARD_PROBLEMS
            (report.unlisted if is_unlisted else report.skipped)[name] = problem.text
            print(printable(f"skipped: {problem}"), file=sys.stderr)


def _add_unmounted(plan: _Plan, report: Report, new: list[ListedImage]) -> None:
    """Add folders to a report whose images are gone because their disk is not mounted, and print them."""
    if plan.existing is None:
        return
    found = {image.id for image in new}
    columns = (plan.existing.entries[name].to_pylist() for name in ("source", "id", "path"))
    rows = zip(*columns, strict=True)
    gone = [path for source, name, path in rows if path and name not in found and source in plan.sources_to_scan]
    for folder in unmounted_folders(gone, (plan.target / MANIFEST).stat().st_mtime):
        report.unlisted[folder] = "empty, though images were indexed in it; delete this folder if its disk is gone"
        print(printable(f"skipped: {folder}: {report.unlisted[folder]}"), file=sys.stderr)


def unmounted_folders(missing: Iterable[str], indexed: float) -> list[str]:
    """Folders that are mount points without their disk, as far as missing files show.

    Such a folder is empty and has not changed since the files were seen. Deleting files changes their folder.

    Args:
        missing: paths of files that are gone, as written by [`name_of`][modeling_miniclip.utils.names.name_of].
        indexed: time when they were still there, in seconds since 1970.
    """
    found = set()
    for folder in {os.path.dirname(path_of(path)) for path in missing}:
        while not os.path.isdir(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        with suppress(OSError):  # a folder that cannot be listed is named already
            if os.stat(folder).st_mtime < indexed and all(map(is_hidden, os.listdir(folder))):
                found.add(name_of(folder))
    return sorted(found)


def _merge(plan: _Plan, listed: list[ListedImage], report: Report, unreachable: set[str]) -> None:
    """Write the index: first the images of sources that were not scanned, then the listed ones; complete `report`."""
    pool = plan.pool()
    new = [image for image in listed if image.id not in report.skipped]
    if lost := [image.id for image in new if image.id not in pool.by_id]:
        raise MiniClipError(
            f"{len(lost)} of {len(new)} images are not in {plan.shards}, the first {lost[0]}: all processes must see "
            "this folder on a shared file system; run the same command again there"
        )
    _add_unmounted(plan, report, new)
    kept_rows = _kept_rows(plan, new, report, unreachable)
    places = [*((0, row) for row in kept_rows), *(pool.by_id[image.id] for image in new)]
    if not places:
        raise DataError(
            f"none of the {len(listed)} images can be read; the first: {next(iter(report.skipped.items()))}"
        )
    part_of, row_of = np.array(places, dtype=np.int64).reshape(-1, 2).T
    offsets = np.cumsum([0, *(len(part) for part in pool.parts)])
    entries = pa.concat_tables([part.read_entries() for part in pool.parts]).take(pa.array(offsets[part_of] + row_of))
    entries = _update_columns(entries, len(kept_rows), new)
    sources = [*plan.sources_kept, *plan.sources_to_scan]
    manifest = replace(plan.manifest, sources=sources, skipped=report.skipped | report.unlisted)
    embeddings = gather_blocks([part.embeddings for part in pool.parts], part_of, row_of)
    write_index(plan.target, manifest, entries, embeddings)
    ids = set(entries["id"].to_pylist())
    old_ids = plan.existing.entries["id"].to_pylist() if plan.existing else []
    report.images, report.reused = len(places), len(new) - report.encoded
    report.dropped = sum(name not in ids for name in old_ids)


def _kept_rows(plan: _Plan, new: list[ListedImage], report: Report, unreachable: set[str]) -> list[int]:
    """Rows of the existing index that stay, unless listed again; those that could not be reached are counted.

    These are the images of sources that were not scanned, those whose folder or file could not be reached, and those
    of sources of which not a single image can be read.

    Raises:
        DataError: everything is overwritten, and images could not be reached.
    """
    if plan.existing is None:
        return []
    folders = tuple(os.path.join(name, "") for name in report.unlisted)
    new_ids, alive = {image.id for image in new}, {image.source for image in new}
    rows = []
    pairs = zip(*(plan.existing.entries[name].to_pylist() for name in ("source", "id")), strict=True)
    for row, (source, name) in enumerate(pairs):
        if name in new_ids:
            continue
        if source in plan.sources_kept:
            rows.append(row)
        elif source in plan.sources_to_scan and (
            name in unreachable or name.startswith(folders) or source not in alive
        ):
            rows.append(row)
            report.kept += 1
    if plan.overwrite and report.kept:
        raise DataError(
            f"{report.kept} images of {plan.target} are in folders or files that cannot be read: "
            f"{describe_skipped(report.skipped, len(rows), report.unlisted)}; they would be lost, so nothing was "
            "overwritten"
        )
    return rows


def _update_columns(entries: pa.Table, kept: int, new: list[ListedImage]) -> pa.Table:
    """Replace what sources may change without changing the image, in all rows after the first `kept` ones."""
    for name in ("source", "path", "captions", "split"):
        old = entries[name].slice(0, kept).combine_chunks()
        now = pa.array([getattr(image, name) for image in new], type=entries.schema.field(name).type)
        values = pa.chunked_array([old, now] if kept else [now])
        entries = entries.set_column(entries.schema.get_field_index(name), entries.schema.field(name), values)
    return entries
