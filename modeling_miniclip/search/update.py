"""`update_index`: build an index or update it. One or several processes encode only new and changed images.

Finished embeddings go at once to `.NAME.shards` next to the index `NAME` (see `shards.py`), so an interrupted run or a
lost process costs only its unfinished shard. At the end everything is merged into one index, which replaces the old
one in a single step.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data.all_images import DEFAULT_COLUMNS, Listing, list_images
from ..data.columns import ColumnNames
from ..data.find_images import ALONE, WARNINGS
from ..data.problems import SHARD_PROBLEMS
from ..data.source_kinds import Sources, each_source
from ..errors import MiniClipError, Problem, printable
from ..training.command_line.launch import read_launch
from ..training.processes.heartbeat import ends_with_lost_processes, join_processes
from ..utils.files import discard_folder
from ..utils.processes import usable_cpus
from .building.merge import Report, merge
from .building.plan import Plan, make_plan
from .building.pool import Pool
from .building.shards import Encoding
from .index import ImageIndex, write_manifest

NEW = "new.npy"  # rows of the listed images that are to be encoded


def update_index(
    folder: str | os.PathLike,
    sources: Sources = (),
    model: str | os.PathLike | None = None,
    *,
    remove: Sources = (),
    overwrite: bool = False,
    columns: ColumnNames = DEFAULT_COLUMNS,
    dtype: str | None = None,
    neighbours: str | None = None,
    truncate_dim: int | None = None,
    reduced: bool | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Build an index or update it. Several processes of `accelerate launch` share the work.

    Args:
        folder: folder of the index.
        sources: folder of images, caption file, shards or dataset, or several. Images of other sources stay in the
            index. By default all sources of the index are scanned again.
        model: folder or Hub name of an export, or any CLIP that `from_clip` takes, which is converted once and kept;
            by default the one that built the index. If that has moved, its new place. If the images have moved, too,
            nothing but the model's place is updated.
        remove: one or several sources whose images are dropped from the index.
        overwrite: whether to rebuild the index from scratch, with any model; the old index stays until the new one is
            ready.
        columns: column names in caption files and datasets.
        dtype: number format of the embeddings: `float32` (default), `float16` (half the space) or `int8` (a quarter).
        neighbours: kind of search: `exact`, `approximate`, or `auto` (default): approximate if there are many images
            and FAISS is installed.
        truncate_dim: number of dimensions of the embeddings to keep, the first ones, normalised again; by default all.
        reduced: whether to decode large JPEGs at reduced size, as `encode_images`; by default as the index is, or not.
        batch_size: images per forward pass.
        num_workers: threads that read images; by default one per core.
        progress: whether to show a progress bar.

    Returns:
        [`Report`]: how many images were encoded, kept and dropped, and which could not be read.

    Raises:
        ModelError: there is no such model, or another one built the index.
        UsageError: a model or a source is missing, or `dtype`, `truncate_dim` or `reduced` is not that of the index.
        DataError: a source cannot be read, or has no images. Single unreadable images are in `Report.skipped` instead.

    Examples:
        >>> update_index("photos.index", ["~/Pictures"], "my-clip/export").encoded  # doctest: +SKIP
        8000
    """
    start = time.perf_counter()
    with ends_with_lost_processes(lambda: "run the same command again: finished embeddings are kept"):
        processes = _processes()
        plan = make_plan(
            Path(folder).expanduser(), each_source(sources), model, each_source(remove), overwrite, dtype, neighbours,
            truncate_dim, reduced, verify=processes.is_main_process,
        )  # fmt: skip
        if plan.existing is not None and plan.missing:
            return _point_at_model(plan, plan.existing, processes)
        with _locked(plan, processes):
            report = _carry_out(plan, processes, columns, batch_size, num_workers, progress)
        if processes.is_main_process:
            discard_folder(plan.shards)
    report.seconds = time.perf_counter() - start
    return report


def _carry_out(
    plan: Plan,
    processes: PartialState,
    columns: ColumnNames,
    batch_size: int,
    num_workers: int | None,
    progress: bool,
) -> Report:
    """Encode the images that have no embeddings yet, and write the index; arguments as in [`update_index`]."""
    pool = plan.pool()
    _on_main(processes, partial(list_new_images, plan, pool, columns, progress))
    listing = Listing(plan.listed)
    encoding = Encoding(plan.manifest, pool, plan.shards, batch_size, num_workers or usable_cpus())
    _encode_share(encoding, plan, listing, processes, progress)
    report, unreachable = gather_reports(encoding)
    del encoding, pool  # the merge opens all finished embeddings
    if processes.is_main_process:
        _add_problems(plan, report, listing.problems)
        merge(plan, listing, report, unreachable)
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


def _point_at_model(plan: Plan, existing: ImageIndex, processes: PartialState) -> Report:
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
def _locked(plan: Plan, processes: PartialState) -> Iterator[None]:
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


# --- list and encode ------------------------------------------------------------------------------------------------


def _on_main(processes: PartialState, function: Callable[[], object]) -> None:
    """Call a function in the main process. Its error is raised in all of them."""
    error: MiniClipError | None = None
    if processes.is_main_process:
        try:
            function()
        except MiniClipError as raised:
            error = raised
    error = gather_object([error])[0]
    if error is not None:
        raise error


def list_new_images(plan: Plan, pool: Pool, columns: ColumnNames, progress: bool) -> None:
    """List all images of the sources, and which of them are new or have changed."""
    shutil.rmtree(plan.listed, ignore_errors=True)
    try:
        listing = list_images(plan.sources_to_scan, plan.listed, columns, progress)
        is_known = pool.unchanged(listing.digests[listing.rows], listing.states[listing.rows])
        np.save(plan.listed / NEW, listing.rows[~is_known])
    except OSError as error:
        raise MiniClipError(
            f"{plan.listed} cannot be written: {error.strerror or error}; free some space, then run again"
        ) from error


def share_of(listing: Listing, new: np.ndarray, number: int, processes: int) -> np.ndarray:
    """The part of new images that one of several processes encodes.

    It is whole shards, if each process gets at least one, so that no two processes read the same one. Otherwise it is
    one of equal parts of all rows.

    Args:
        listing: all images.
        new: rows of the new ones.
        number: number of the process.
        processes: number of processes.
    """
    shards = listing.column("shard", new)
    several = np.unique(shards[shards != ALONE])
    if len(several) < processes:
        return np.array_split(new, processes)[number]
    unit = np.where(shards == ALONE, np.arange(len(new)), several.searchsorted(shards))
    return new[unit % processes == number]


def _encode_share(encoding: Encoding, plan: Plan, listing: Listing, processes: PartialState, progress: bool) -> None:
    """Encode this process's share of the new images."""
    rows = share_of(listing, np.load(plan.listed / NEW), processes.process_index, processes.num_processes)
    encoding.run(listing.items(rows), len(rows), progress and processes.is_main_process)


def gather_reports(encoding: Encoding) -> tuple[Report, set[str]]:
    """Wait for all processes and combine their reports, and the names of images whose files could not be reached."""
    parts = gather_object([(encoding.encoded, encoding.skipped, encoding.unreachable)])
    skipped = {name: reason for _, some, _ in parts for name, reason in some.items()}
    unreachable = {name for *_, names in parts for name in names}
    return Report(encoded=sum(encoded for encoded, *_ in parts), skipped=skipped), unreachable


def _add_problems(plan: Plan, report: Report, problems: list[Problem]) -> None:
    """Add what the list of the sources left out to a report, and print it."""
    for problem in problems:
        inside = os.path.join(problem.file, "")
        if problem.kind == "dangling" and _holds_images(plan.existing, inside):
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


def _holds_images(index: ImageIndex | None, folder: str) -> bool:
    batches = index.batches(["id"]) if index is not None else ()
    return any(name.startswith(folder) for batch in batches for name in batch["id"].to_pylist())
