"""Which shards a pattern stands for: `shards/{00000..00999}.tar`, `shards/*.tar`, or a folder of shards."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...errors import DataError, Problem
from ...utils.names import is_utf8, name_of, slashed
from ..listing import is_hidden
from ..readers.recognise import TAR_ENDINGS
from ..splits import SPLIT_ALIASES, SPLITS, split_of_name
from ..tables.table_cache import stat_of
from .remote_files import is_url
from .remote_shards import current_cache

SHARD_ENDINGS = (*TAR_ENDINGS, ".parquet")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_pattern(source: str) -> bool:
    """Whether a source stands for several shards by its name, not as a folder."""
    return not os.path.exists(source) and bool(RANGE.search(source) or CHOICE.search(source) or glob.has_magic(source))


def split_of_shard(path: str) -> str | None:
    """The split that a shard's name says (`train-00000.tar`, `coco_val.parquet`), or else its folder's name."""
    *_, folder, name = ("", "", *slashed(path).split("/"))
    word = folder.lower().rstrip("0123456789")
    return split_of_name(name) or (split_of_name(word) if SPLIT_ALIASES.get(word, word) in SPLITS else None)


def expand_braces(pattern: str) -> Iterator[str]:
    """All names that the braces of a pattern stand for, as in a shell.

    Examples:
        >>> list(expand_braces("{a,b}/{08..10}.tar"))[:3]
        ['a/08.tar', 'a/09.tar', 'a/10.tar']
    """
    match = min(
        (m for m in (RANGE.search(pattern), CHOICE.search(pattern)) if m), key=lambda m: m.start(), default=None
    )
    if match is None:
        yield pattern
        return
    if match.re is RANGE:
        first, last = match[1], match[2]
        has_zeros = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if has_zeros else 0
        step = 1 if int(last) >= int(first) else -1
        parts: Iterable[str] = (f"{i:0{width}d}" for i in range(int(first), int(last) + step, step))
    else:
        parts = match[1].split(",")
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def shard_kind(source: str) -> str | None:
    """`tar` or `parquet` for a pattern, a URL or a folder of shards of this kind; None for anything else.

    Raises:
        DataError: a pattern matches nothing, or other files.
    """
    if os.path.isdir(source):
        shards = shards_of_folder(source)
    elif is_url(source) or is_pattern(source):
        shards = expand_shards(source)
    else:
        return None
    other = next((shard for shard in shards if not shard.lower().endswith(SHARD_ENDINGS)), None)
    if other is not None:
        text = (
            f"{other} is neither a tar archive nor a Parquet file, the only files that URLs and patterns may stand for"
        )
        raise DataError(Problem("unusable", text, source))
    kinds = {"parquet" if shard.lower().endswith(".parquet") else "tar" for shard in shards}
    return "tar" if "tar" in kinds else next(iter(kinds), None)


def expand_shards(pattern: str, kind: str | None = None) -> list[str]:
    """Paths or URLs of the shards that a pattern stands for: braces in their order, matches of `*` sorted.

    Args:
        pattern: path or URL; with `{00000..00999}` or `{a,b}`, all of which must exist, and `*`, `?`, `[...]`; or a
            folder of shards.
        kind: `tar` or `parquet` for only these shards. (Next to an archive, img2dataset writes a table about it.)

    Raises:
        DataError: nothing matches, a shard of a range is missing, or a name cannot be part of a URL.
    """
    if os.path.isdir(pattern):
        shards = shards_of_folder(pattern)
    elif os.path.exists(pattern):
        shards = [pattern]
    else:
        shards = _expand(pattern)
    shards = [shard if is_url(shard) else slashed(shard) for shard in shards]
    if kind is not None and len(shards) > 1:
        shards = [shard for shard in shards if shard.lower().endswith(".parquet") == (kind == "parquet")]
    bad = next((shard for shard in shards if not is_utf8(shard) or "::" in shard), None)
    if bad is not None:
        text = "its path is not UTF-8, or contains '::'; rename the file or folder"
        raise DataError(Problem("unusable", text, name_of(bad)))
    return shards


def _expand(pattern: str) -> list[str]:
    names = list(expand_braces(pattern)) if is_url(pattern) or is_pattern(pattern) else [pattern]
    if names == [pattern] and not glob.has_magic(pattern):
        return names  # whoever opens it reports that it is missing
    shards, missing = [], []
    for name in names:
        found = _matches(name)
        shards += found
        if not found:
            missing.append(name)
    if not shards:
        raise DataError(Problem("unusable", "no file matches; check the folder and the pattern", pattern))
    if missing:
        text = f"{len(missing)} of {len(names)} shards are missing, first {missing[0]}; narrow the range, or use *"
        raise DataError(Problem("unusable", text, pattern))
    return list(dict.fromkeys(shards))


def short_names(shards: Sequence[str]) -> list[str]:
    """Names of shards in the names of their rows: those of their files or, where these repeat, with their folders."""
    names = [shard.rpartition("/")[2] for shard in shards]
    if len(set(names)) == len(names):
        return names
    start = len(os.path.commonprefix([f"{shard.rpartition('/')[0]}/" for shard in shards]).rpartition("/")[0]) + 1
    return [shard[start:] for shard in shards]


def inputs_of_shards(shards: Iterable[str]) -> Iterator[Any]:
    """What identifies shards in the key of a table: names, sizes and times; a missing one counts too."""
    shards = list(shards)
    remote = [shard for shard in shards if is_url(shard)]
    yield from zip(remote, map(str, current_cache().versions(remote)), strict=True)
    for shard in shards:
        if is_url(shard):
            continue
        try:
            yield stat_of(shard)
        except OSError:
            yield shard


def shards_of_folder(folder: str) -> list[str]:
    """Paths of the shards in a folder and its subfolders, sorted; empty if it holds none."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [
            os.path.join(path, name) for name in files if name.lower().endswith(SHARD_ENDINGS) and not is_hidden(name)
        ]
    return sorted(found)


def _matches(name: str) -> list[str]:
    if not is_url(name):
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        shown = [path for path in found if not is_hidden(os.path.basename(path))]
        return [path for each in shown for path in (shards_of_folder(each) if os.path.isdir(each) else [each])]
    if not glob.has_magic(name.partition("://")[2]):
        return [name]  # it is looked for when it is fetched
    return current_cache().matches(name)
