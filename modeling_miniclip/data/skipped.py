"""One report of what was skipped, for every command that goes on without some of its images."""

from collections import Counter
from collections.abc import Mapping

from .picture_formats import FORMATS
from .shards.shard_patterns import SHARD_ENDINGS

NAMED = 3  # images or folders that are named; all of them are named where they are found


def describe_skipped(skipped: Mapping[str, str], total: int, folders: Mapping[str, str] | None = None) -> str:
    """What was skipped, as a sentence without its end; "" if nothing was.

    Args:
        skipped: names of images that could not be read, with the reason.
        total: number of all images.
        folders: names of folders that could not be listed, and of damaged shards, with the reason.

    Examples:
        >>> describe_skipped({"b.heic": "HEIC, a format that is not read here: ..."}, 9)
        '1 of 9 images could not be read: b.heic'
    """
    parts = []
    if skipped:
        parts.append(f"{len(skipped)} of {total} images could not be read: {_first(skipped)}")
    counts = Counter(each for reason in skipped.values() for each in FORMATS if each.reason in reason)
    parts += [f"{count} of them {each.name} ({each.hint})" for each, count in counts.most_common()]
    shards = {name: reason for name, reason in (folders or {}).items() if name.lower().endswith(SHARD_ENDINGS)}
    listed = {name: reason for name, reason in (folders or {}).items() if name not in shards}
    for names, what in ((listed, "folder{} could not be listed"), (shards, "shard{} could not be read to the end")):
        if names:
            parts.append(f"{len(names)} {what.format('' if len(names) == 1 else 's')}: {_first(names)}")
    return "; ".join(parts)


def _first(names: Mapping[str, str]) -> str:
    return ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
