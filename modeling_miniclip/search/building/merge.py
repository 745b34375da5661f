"""The end of an update: which images are in the new index, and writing it, block by block."""

import os
import sys
import warnings
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from accelerate import PartialState

from ...clips.exported import export_folder
from ...data.all_images import Listing, digest_of_name
from ...data.listing import is_hidden
from ...data.skipped import describe_skipped
from ...errors import DataError, MiniClipError, printable
from ...inference.encode import encode_texts
from ...inference.loading import load_tower
from ...utils.names import name_of, path_of
from ..embeddings_file import gather_blocks
from ..index import MANIFEST, ROW_GROUP, ImageIndex, Manifest, write_index
from ..unrelated_texts import CHECKSUM, TEXTS
from .plan import Plan
from .pool import MISSING, Entries, Lookup, Pool, as_digests

FROM_LISTING = ("source", "path", "captions", "split")  # what may change without the image


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


def unmounted_folders(missing: Iterable[str], indexed: float) -> list[str]:
    """Folders that are mount points without their disk, as far as missing files show.

    Such a folder is empty and has not changed since the files were seen. Deleting files changes their folder.

    Args:
        missing: folders of files that are gone.
        indexed: time when they were still there, in seconds since 1970.
    """
    found = set()
    for folder in missing:
        while not os.path.isdir(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        with suppress(OSError):  # a folder that cannot be listed is named already
            if os.stat(folder).st_mtime < indexed and all(map(is_hidden, os.listdir(folder))):
                found.add(name_of(folder))
    return sorted(found)


def merge(plan: Plan, listing: Listing, report: Report, unreachable: set[str]) -> None:
    """Write the index: first the images of sources that were not scanned, then the listed ones; complete `report`.

    Args:
        plan: what the run does.
        listing: all images of the scanned sources.
        report: what was encoded and skipped.
        unreachable: names of images whose files could not be reached.

    Raises:
        MiniClipError: embeddings are not where all processes should have written them, or the disk is full.
        DataError: no image can be read, or images would be lost.
    """
    pool = plan.pool()
    skipped = Lookup(as_digests(map(digest_of_name, report.skipped)))
    new = listing.rows[skipped.find(listing.digests[listing.rows]) == MISSING]
    rows = pool.rows_of_names(listing.digests[new])
    if len(lost := new[rows == MISSING]):
        first = next(listing.batches(lost[:1], ["id"]))["id"][0].as_py()
        raise MiniClipError(
            f"{len(lost)} of {len(new)} images are not in {plan.shards}, the first {first}: all processes must see "
            "this folder on a shared file system; run the same command again there"
        )
    kept_rows = np.zeros(0, np.int64)
    if plan.existing is not None:
        images = Lookup(listing.digests[new])
        _add_unmounted(plan, plan.existing, report, images)
        alive = {listing.sources[number] for number in np.unique(listing.column("source", new)).tolist()}
        kept_rows = _kept_rows(plan, plan.existing, report, images, alive, unreachable)
    rows = np.concatenate([kept_rows, rows])
    if not len(rows):
        raise DataError(
            f"none of the {len(listing.rows)} images can be read; the first: {next(iter(report.skipped.items()))}"
        )
    part_of, row_of = pool.places(rows)
    manifest = replace(
        plan.manifest,
        sources=[*plan.sources_kept, *plan.sources_to_scan],
        skipped=report.skipped | report.unlisted,
    )

    def release() -> None:
        for part in pool.parts if plan.existing is None else [*pool.parts, plan.existing]:
            part.close()

    embeddings = gather_blocks([part.embeddings for part in pool.parts], part_of, row_of)
    captions = unrelated_captions(manifest, plan.existing)
    write_index(plan.target, manifest, _entries(pool, part_of, row_of, listing, new), embeddings, release, captions)
    report.images, report.reused = len(rows), len(new) - report.encoded


def unrelated_captions(manifest: Manifest, existing: ImageIndex | None = None) -> np.ndarray:
    """`[captions, dim]` float32 embeddings of the unrelated captions.

    Args:
        manifest: manifest of the index that they are for.
        existing: an index that may have them.

    Raises:
        MiniClipError: the model's embeddings of texts are not numbers.
    """
    known = None if existing is None else existing.unrelated
    if existing is not None and known is not None and known.texts == CHECKSUM:
        if (existing.manifest.fingerprint, existing.manifest.dim) == (manifest.fingerprint, manifest.dim):
            return known.captions
    model, processor = load_tower(export_folder(manifest.model), "text")
    model = model.to(PartialState().device)
    with warnings.catch_warnings(action="ignore"):  # about truncated captions, which are not the user's
        captions: np.ndarray = encode_texts(model, TEXTS, processor, progress=False, truncate_dim=manifest.dim).numpy()
    if not np.isfinite(captions).all():
        raise MiniClipError(f"the embeddings of texts by {manifest.model} are not numbers (NaN): train it again")
    return captions


def _entries(
    pool: Pool, part_of: np.ndarray, row_of: np.ndarray, listing: Listing, new: np.ndarray
) -> Iterator[pa.Table]:
    """Entries of the new index in blocks; the last ones, of the listed images, as their sources describe them now."""
    entries, kept = Entries(pool.parts), len(part_of) - len(new)
    for start in range(0, len(part_of), ROW_GROUP):
        stop = min(start + ROW_GROUP, len(part_of))
        table = entries.take(part_of[start:stop], row_of[start:stop])
        before = max(0, min(kept, stop) - start)  # entries that stay as they are
        listed = new[start + before - kept : stop - kept] if stop > kept else new[:0]
        if len(listed):
            now = next(listing.batches(listed, FROM_LISTING, ROW_GROUP))
            sources = pa.array([listing.sources[number] for number in now["source"].to_pylist()], pa.string())
            for name in FROM_LISTING:
                values = sources if name == "source" else now[name]
                column = pa.chunked_array([table[name].combine_chunks().slice(0, before), values])
                table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        yield table


def _add_unmounted(plan: Plan, existing: ImageIndex, report: Report, images: Lookup) -> None:
    """Add folders to a report whose images are gone because their disk is not mounted, and print them."""
    gone = set()
    for batch in existing.batches(["source", "id", "path"]):
        is_gone = images.find(as_digests(map(digest_of_name, batch["id"].to_pylist()))) == MISSING
        for source, path, missing in zip(batch["source"].to_pylist(), batch["path"].to_pylist(), is_gone, strict=True):
            if missing and path and source in plan.sources_to_scan:
                gone.add(os.path.dirname(path_of(path)))
    for folder in unmounted_folders(gone, (plan.target / MANIFEST).stat().st_mtime):
        report.unlisted[folder] = "empty, though images were indexed in it; delete this folder if its disk is gone"
        print(printable(f"skipped: {folder}: {report.unlisted[folder]}"), file=sys.stderr)


def _kept_rows(
    plan: Plan, existing: ImageIndex, report: Report, images: Lookup, alive: set[str], unreachable: set[str]
) -> np.ndarray:
    """`[n]` int64, rows of the existing index that stay, unless listed again; the others are counted as dropped.

    These are the images of sources that were not scanned, those whose folder or file could not be reached, and those
    of sources of which not a single image can be read; the last two kinds are counted as kept.

    Args:
        plan, report: as in [`merge`].
        existing: the existing index.
        images: the listed images that can be read.
        alive: their sources.
        unreachable: names of images whose files could not be reached.

    Raises:
        DataError: everything is overwritten, and images could not be reached.
    """
    folders = tuple(os.path.join(name, "") for name in report.unlisted)
    kept, row = array("q"), 0
    for batch in existing.batches(["source", "id"]):
        ids = batch["id"].to_pylist()
        is_new = images.find(as_digests(map(digest_of_name, ids))) != MISSING
        for source, name, listed in zip(batch["source"].to_pylist(), ids, is_new.tolist(), strict=True):
            if not listed:
                is_lost = name in unreachable or name.startswith(folders) or source not in alive
                if source in plan.sources_kept:
                    kept.append(row)
                elif source in plan.sources_to_scan and is_lost:
                    kept.append(row)
                    report.kept += 1
                else:
                    report.dropped += 1
            row += 1
    if plan.overwrite and report.kept:
        raise DataError(
            f"{report.kept} images of {plan.target} are in folders or files that cannot be read: "
            f"{describe_skipped(report.skipped, len(kept), report.unlisted)}; they would be lost, so nothing was "
            "overwritten"
        )
    return np.frombuffer(kept, np.int64)
