"""Find what changed between the start of a run and its resumption, each difference with its first example."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import DatasetDict

from ...errors import DataError, ModelError, UsageError
from ..command_line.arguments import TrainingArguments
from .fingerprint import Fingerprint
from .fingerprint_rows import SPLITS
from .resume_rules import changed_flags, describe_flags


def check_flags(saved: Fingerprint, arguments: TrainingArguments) -> None:
    """Check the flags that a run cannot change.

    Raises:
        UsageError: a flag has another value than in the checkpoint; names all such flags with both values.
    """
    if changed := changed_flags(saved.flags, arguments, "fixed"):
        raise UsageError(
            f"--resume_from_checkpoint: a run cannot change {describe_flags(changed)}: resume with the original flags "
            f"(--recipe {arguments.output_dir}/arguments.yaml), or {_start_again(arguments)}"
        )


def check_data(saved: Fingerprint, now: Fingerprint, splits: DatasetDict, arguments: TrainingArguments) -> None:
    """Check that the rows are those of the checkpoint.

    Args:
        saved: fingerprint in the checkpoint.
        now: fingerprint of `splits`.
        splits: rows that this run would train on.
        arguments: flags of the run.

    Raises:
        DataError: images, captions, splits or sizes of shards changed; names each kind of difference with its first
            example.
    """
    differences = changed_rows(saved, now, splits) or changed_columns(saved.related, now.related)
    if not differences and saved.order != now.order:
        differences = ["its shards or datasets have other sizes, on which the order of the images depends"]
    if saved.zero_shot != now.zero_shot:
        differences.append("--zero_shot_dataset has other images or classes")
    if saved.retention != now.retention:
        differences.append("--retention_dataset has other images or captions")
    if differences:
        raise DataError(f"--resume_from_checkpoint: the data {_changed(differences, saved, arguments)}")


def check_model(saved: Fingerprint, now: Fingerprint, arguments: TrainingArguments) -> None:
    """Check that model, vocabulary, preprocessing and augmentation are those of the checkpoint.

    Raises:
        ModelError: one of them changed; names each with its first difference.
    """
    differences = [*changed_settings(saved.settings, now.settings), *changed_pieces(saved.vocabulary, now.vocabulary)]
    if differences:
        raise ModelError(
            f"--resume_from_checkpoint: the model or preprocessing {_changed(differences, saved, arguments)}"
        )


def _changed(differences: list[str], saved: Fingerprint, arguments: TrainingArguments) -> str:
    flags = changed_flags(saved.flags, arguments, "compared")
    because = f" (changed flags: {describe_flags(flags)})" if flags else ""
    return (
        f"changed since the run started: {'; '.join(differences)}{because}. "
        f"Restore what was there, or {_start_again(arguments)}"
    )


def _start_again(arguments: TrainingArguments) -> str:
    return (
        "start a new run with another --output_dir (with --model_name_or_path "
        f"{arguments.output_dir}/export it continues from this run's model)"
    )


# --- rows -----------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    split: str
    number: int  # within its split
    image: int
    captions: list[int]


def changed_rows(saved: Fingerprint, now: Fingerprint, splits: DatasetDict) -> list[str]:
    """Each kind of difference between two tables of rows, in words; empty if they are the same.

    A changed file of an image that could not be decoded before is a repair, and no difference.

    Args:
        saved, now: fingerprints with the same way to compare images.
        splits: rows of `now`, for the words.
    """
    if saved.rows.equals(now.rows):
        return []
    tables = saved.rows.table(), now.rows.table()
    before, after = map(_rows_by_image, tables)
    found: list[str] = []
    for split in SPLITS:
        new = [name for name, row in after.items() if row.split == split and name not in before]
        gone = [name for name, row in before.items() if row.split == split and name not in after]
        found += _count(new, f"image {{}} is new in {split}", f"images are new in {split}")
        found += _count(gone, f"image {{}} is missing from {split}", f"images are missing from {split}")
        other = next(name for name in SPLITS if name != split)
        moved = [n for n, row in before.items() if row.split == split and n in after and after[n].split == other]
        found += _count(moved, f"image {{}} was in {split}, is in {other}", f"images were in {split}, are in {other}")
    both = [name for name in after if name in before]
    for split in SPLITS:
        here = [name for name in both if after[name].split == split]
        found += _changed_captions(split, before, after, here, splits)
        repaired = set(saved.undecodable.get(split, ()))
        files = [n for n in here if before[n].image != after[n].image and n not in repaired]
        found += _count(files, f"the file of image {{}} in {split} changed", f"image files in {split} changed")
    return found or [*_changed_order(*tables)]


def changed_columns(saved: dict[str, int] | None, now: dict[str, int] | None) -> list[str]:
    """Each column of groups or wrong captions that changed, in words; none if those of before are not known."""
    if saved is None or now is None:
        return []
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return [f"the column {name} changed" for name in changed]


def _rows_by_image(table: pa.Table) -> dict[str, _Row]:
    columns = (table.column(name).to_pylist() for name in ("split", "image_id", "image", "captions"))
    in_split: Counter[str] = Counter()
    of_name: Counter[str] = Counter()
    rows = {}
    for split, name, image, captions in zip(*columns, strict=True):
        of_name[name] += 1
        key = name if of_name[name] == 1 else f"{name} ({of_name[name]})"  # a source may repeat an id
        rows[key] = _Row(split, in_split[split], image, captions)
        in_split[split] += 1
    return rows


def _count(names: list[str], one: str, several: str) -> list[str]:
    if not names:
        return []
    return [one.format(repr(names[0])) if len(names) == 1 else f"{len(names)} {several}, the first: {names[0]!r}"]


def _changed_captions(
    split: str, before: dict[str, _Row], after: dict[str, _Row], names: list[str], splits: DatasetDict
) -> list[str]:
    changed = [name for name in names if before[name].captions != after[name].captions]
    if not changed:
        return []
    name = changed[0]
    old, new = before[name].captions, after[name].captions
    if len(old) != len(new):
        example = f"{name!r} had {len(old)}, has {len(new)}"
    elif sorted(old) == sorted(new):
        example = f"those of {name!r} are in another order"
    else:
        place = next(i for i in range(len(new)) if old[i] != new[i])
        text = splits[split].select_columns(["captions"])[after[name].number]["captions"][place]
        example = f"caption {place + 1} of {name!r} is now {text!r}"
    return [
        f"the captions of {len(changed)} {'image' if len(changed) == 1 else 'images'} in {split} changed: {example}"
    ]


def _changed_order(saved: pa.Table, now: pa.Table) -> Iterator[str]:
    old, new = (
        list(zip(*(t.column(n).to_pylist() for n in ("split", "image_id")), strict=True)) for t in (saved, now)
    )
    for split in SPLITS:
        one, other = ([name for part, name in rows if part == split] for rows in (old, new))
        if one != other:
            row = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            names = (repr(names[row]) if row < len(names) else "none" for names in (one, other))
            yield "the images of {} are in another order: row {} was {}, is {}".format(split, row + 1, *names)


# --- settings -------------------------------------------------------------------------------------------------------


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The first difference of each part (`tokenizer`, `image_processor`), in words.

    A setting that only one of the two has counts if it has a value: newer libraries add settings that are off.
    """
    found: dict[str, str] = {}
    for name in [*saved, *(name for name in now if name not in saved)]:
        old, new = saved.get(name), now.get(name)
        if old != new:
            found.setdefault(name.partition(".")[0], f"{name} was {_shown(old)}, is {_shown(new)}")
    return list(found.values())


def changed_pieces(saved: dict[str, int], now: dict[str, int]) -> list[str]:
    """How many numbers of a vocabulary mean another piece of text, and the first of them, in words."""
    old, new = ({number: piece for piece, number in vocabulary.items()} for vocabulary in (saved, now))
    changed = sorted(number for number in old.keys() | new.keys() if old.get(number) != new.get(number))
    if not changed:
        return []
    first = changed[0]
    return [
        f"{len(changed)} of {len(old)} pieces of the vocabulary changed: piece {first} was {_shown(old.get(first))}, "
        f"is {_shown(new.get(first))}"
    ]


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)
