"""What an update of an index will do, checked before the long work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...clips.exported import export_folder
from ...configuration_miniclip import MiniClipConfig
from ...data.find_images import is_gone, resolve_source
from ...errors import ModelError, UsageError
from ...inference.encode import check_truncate_dim
from ...utils.files import is_same_file, recover_folder
from ...utils.names import check_name, name_of, path_of
from ..approximate import uses_approximate_search
from ..embeddings_file import DTYPES
from ..fingerprints import describe_files, fingerprint
from ..index import ImageIndex, Manifest, folder_of_model, rebuild_command
from .pool import Pool, open_pool


@dataclass(frozen=True)
class Plan:
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

    @property
    def listed(self) -> Path:
        """Folder of the list of all images of the scanned sources."""
        return self.shards / "listed"

    def pool(self) -> Pool:
        """All embeddings that exist at this moment."""
        return open_pool(None if self.overwrite else self.existing, self.shards, self.manifest)


def make_plan(
    target: Path,
    sources: Sequence[str | os.PathLike],
    model: str | os.PathLike | None,
    remove: Sequence[str | os.PathLike],
    overwrite: bool,
    dtype: str | None,
    neighbours: str | None,
    truncate_dim: int | None,
    reduced: bool | None,
    verify: bool,
) -> Plan:
    """Check the arguments of `update_index` and decide what to do.

    Args:
        target: folder of the index.
        sources, model, remove, overwrite, dtype, neighbours, truncate_dim, reduced: as in `update_index`.
        verify: whether to compare an existing index with its checksums.

    Raises:
        ModelError, UsageError, DataError: as in `update_index`.
    """
    check_name(target)
    recover_folder(target)
    existing = ImageIndex.open(target, verify) if target.exists() else None
    scan, kept = _choose_sources(existing, sources, remove)
    manifest = replace(
        _describe_index(target, existing, model, dtype, neighbours, truncate_dim), reduced=bool(reduced)
    )
    if existing is not None and not overwrite:
        _check_same_kind(target, existing, manifest, dtype, truncate_dim, reduced)
        old = existing.manifest
        manifest = replace(manifest, dtype=old.dtype, dim=old.dim, reduced=old.reduced)
        if not sources and not remove and manifest.model != existing.model:
            gone = [source for source in scan if is_gone(source)]
            if gone:
                return Plan(target, existing, manifest, [], scan, False, gone)
    return Plan(target, existing, manifest, scan, [] if overwrite else kept, overwrite)


def _choose_sources(
    existing: ImageIndex | None, sources: Sequence[str | os.PathLike], remove: Sequence[str | os.PathLike]
) -> tuple[list[str], list[str]]:
    """Sources to scan, and sources whose images stay in the index as they are."""
    known = existing.manifest.sources if existing else []

    def known_name(source: str) -> str:
        """The name that a source has in the index; its own if it is new."""
        return next((name for name in known if is_same_file(path_of(name), path_of(source))), source)

    removed = []
    for name in [os.fspath(source) for source in remove]:
        whole = name_of(os.path.abspath(os.path.expanduser(name)))
        found = next((source for source in (name, known_name(whole)) if source in known), None)
        if found is None:
            raise UsageError(f"--remove {name}: not a source of this index, which has: {', '.join(known) or 'none'}")
        removed.append(found)
    remaining = [name for name in known if name not in removed]
    scan = list(dict.fromkeys(known_name(resolve_source(source)) for source in sources))
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
    truncate_dim: int | None,
) -> Manifest:
    """Manifest of the new index, without the fields that depend on its images."""
    if model is None and existing is None:
        raise UsageError(f"{target}: no index here; make one with: miniclip index MODEL SOURCE -o {target}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    name = os.fspath(model) if model is not None else existing.model if existing else ""
    if os.path.isdir(os.path.expanduser(name)):
        name = os.path.abspath(os.path.expanduser(name))
    folder = export_folder(name) if model is not None or existing is None else folder_of_model(existing)
    values = MiniClipConfig.get_config_dict(folder)[0]
    if values.get("model_type") != MiniClipConfig.model_type:
        raise ModelError(f"{name}: a model of type {values.get('model_type')!r}; expected an export, or another CLIP")
    files = describe_files(folder)
    unchanged = existing is not None and (existing.model, existing.manifest.files) == (name, files)
    hash_of_model = existing.manifest.fingerprint if existing and unchanged else fingerprint(folder)
    neighbours = neighbours or (existing.manifest.neighbours if existing else "auto")
    uses_approximate_search(neighbours, 0)  # raises its errors now instead of after the long work
    dim = MiniClipConfig.from_pretrained(folder).projection_dim
    check_truncate_dim(truncate_dim, dim)
    return Manifest(name, hash_of_model, truncate_dim or dim, dtype or "float32", files=files, neighbours=neighbours)


def _check_same_kind(
    target: Path,
    existing: ImageIndex,
    manifest: Manifest,
    dtype: str | None,
    truncate_dim: int | None,
    reduced: bool | None,
) -> None:
    """Raise an error, with the command that rebuilds the index, if new embeddings do not fit the existing ones."""
    rebuild = rebuild_command(existing, manifest.model, manifest.dim, dtype, truncate_dim, reduced)
    if existing.manifest.fingerprint != manifest.fingerprint:
        raise ModelError(
            f"{target} was built by {existing.model} with other weights than {manifest.model} has now, so their "
            f"embeddings are not comparable; rebuild the index: {rebuild}"
        )
    if dtype not in (None, existing.manifest.dtype):
        raise UsageError(f"{target} holds {existing.manifest.dtype}, not {dtype}; rebuild the index: {rebuild}")
    if truncate_dim not in (None, existing.manifest.dim):
        raise UsageError(
            f"{target} holds {existing.manifest.dim} dimensions, not {truncate_dim}; rebuild the index: {rebuild}"
        )
    if reduced not in (None, existing.manifest.reduced):
        size = "reduced" if existing.manifest.reduced else "full"
        raise UsageError(f"{target} was built from JPEGs at {size} size; rebuild the index: {rebuild}")
