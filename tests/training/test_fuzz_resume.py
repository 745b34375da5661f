"""Any changes to data and flags between start and resumption: an error that names one, or none if nothing changed."""

import csv
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import DatasetDict, Image
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.training import setup
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.resuming.resume_rules import PLACES, RESUME_RULES
from tests.helpers.fuzzing import CAPTIONS, cases, fuzz, result_or_error
from tests.training.test_fuzz_recipes import HINTS, values_of

NAMES = ("a.jpg", "b b.jpg", "sub/a.jpg", "ä.jpg", "e.JPG", "f.png", "g.jpg", "h.jpg")
FLAGS = sorted(set(HINTS) - {*PLACES, "resume_from_checkpoint", "output_dir"})


@dataclass
class Data:
    """Captioned images as a folder has them.

    Args:
        captions: captions of each image, in the order of the file.
        images: content of each image file.
        splits: names by split; None for a random split.
        folder: name of the folder.
        quoting: how the CSV file is quoted.
    """

    captions: dict[str, list[str]]
    images: dict[str, bytes]
    splits: dict[str, list[str]] | None
    folder: str = "data"
    quoting: int = csv.QUOTE_MINIMAL

    def write(self, root: Path) -> Path:
        """Write the folder; all files have the same time."""
        shutil.rmtree(root / self.folder, ignore_errors=True)
        for name, content in self.images.items():
            path = root / self.folder / "Images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with (root / self.folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(name, text) for name, texts in self.captions.items() for text in texts]
            csv.writer(file, quoting=csv.QUOTE_ALL if self.quoting else csv.QUOTE_MINIMAL).writerows(
                [("image", "caption"), *rows]
            )
        for split, names in (self.splits or {}).items():
            (root / self.folder / f"{split}.txt").write_text("\n".join(names), encoding="utf-8")
        for path in (root / self.folder).rglob("*"):
            os.utime(path, (1, 1))
        return root / self.folder


@st.composite
def data_sets(draw: Any) -> Data:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=4, max_size=6, unique=True))
    captions = {name: draw(st.lists(CAPTIONS, min_size=1, max_size=3)) for name in names}
    images = {name: draw(st.binary(min_size=1, max_size=4)) for name in names}
    parts = {"train": names[:2], "validation": names[2:3], "test": names[3:]}
    return Data(captions, images, parts if draw(st.booleans()) else None)


def edit(data: Data, kind: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """Change a data set in one way, some of which do not matter."""
    names = list(data.captions)
    name = draw(st.sampled_from(names))
    if kind == "new image":
        new = draw(st.sampled_from([other for other in NAMES if other not in data.captions]))
        data.captions[new], data.images[new] = ["new"], b"new"
        if data.splits is not None:
            data.splits[draw(st.sampled_from(sorted(data.splits)))].append(new)
    elif kind == "no image" and len(names) > 3:
        if data.splits is None or any(name in part and len(part) > 1 for part in data.splits.values()):
            del data.captions[name], data.images[name]
            data.splits = data.splits and {s: [n for n in part if n != name] for s, part in data.splits.items()}
    elif kind == "other caption":
        texts = data.captions[name]
        texts[draw(st.integers(0, len(texts) - 1))] = draw(CAPTIONS)
    elif kind == "more captions":
        data.captions[name].append(draw(CAPTIONS))
    elif kind == "order of captions":
        data.captions[name].reverse()
    elif kind == "other picture":
        data.images[name] = draw(st.binary(min_size=1, max_size=4))
    elif kind == "other split" and data.splits is not None:
        one, other = draw(st.permutations(sorted(data.splits)))[:2]
        if len(data.splits[one]) > 1:
            data.splits[other].append(data.splits[one].pop())
    elif kind == "order of images":
        data.captions = dict(reversed(data.captions.items()))
        data.splits = data.splits and {split: part[::-1] for split, part in data.splits.items()}
    elif kind == "other folder":
        data.folder = "moved"
    elif kind == "quotes":
        data.quoting = csv.QUOTE_ALL


EDITS = ("new image", "no image", "other caption", "more captions", "order of captions", "other picture",
         "other split", "order of images", "other folder", "quotes")  # fmt: skip


def contents(splits: DatasetDict) -> dict[str, list[tuple[str, list[str], bytes]]]:
    """What a run reads: the rows of both splits."""
    return {
        name: [
            (row["image_id"], row["captions"], Path(row["image"]["path"]).read_bytes())
            for row in splits[name].cast_column("image", Image(decode=False))
        ]
        for name in ("train", "validation")
    }


MAIN: Any = SimpleNamespace(is_main_process=True)  # in place of an accelerator


def resume(arguments: TrainingArguments, splits: DatasetDict) -> None:
    """The checks of a resumed run before it creates a model."""
    checkpoint = setup.prepare_output_dir(arguments)
    assert checkpoint is not None
    setup.fingerprint_data(splits, checkpoint, arguments, MAIN)


@cases(32, 2000)
def test_every_change_is_found_and_nothing_else(tmp_path: Path, record_property: Any, count: int) -> None:
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)

    def load(data: Data, arguments: TrainingArguments) -> DatasetDict:
        return setup.load_splits(replace(arguments, dataset=[str(data.write(tmp_path))]))

    @fuzz(count, record_property)
    @given(
        data=data_sets(),
        kinds=st.lists(st.sampled_from(EDITS), max_size=2),
        changed=st.lists(st.sampled_from(FLAGS), max_size=2),
        draw=st.data(),
    )
    def check(data: Data, kinds: list[str], changed: list[str], draw: Any) -> None:
        start = TrainingArguments(dataset=["any"], output_dir=str(tmp_path / "out"), validation_fraction=0.4)
        before = load(data, start)
        expected = contents(before)
        fingerprint = setup.fingerprint_data(before, None, start, MAIN)
        assert fingerprint is not None
        fingerprint.save(checkpoint)
        for kind in kinds:
            edit(data, kind, draw.draw)
        after = load(data, start)
        changes = {name: draw.draw(values_of(HINTS[name])) for name in changed}
        arguments = replace(start, resume_from_checkpoint="latest", **changes)
        _, message = result_or_error(resume, arguments, after)
        fixed = [f for f in RESUME_RULES["fixed"] if getattr(arguments, f) != getattr(start, f)]
        found = contents(after)
        names = {
            name
            for split in expected
            for one in (expected[split], found[split])
            for name, *_ in one
            if expected[split] != found[split]
        }
        if fixed:
            assert all(f"--{name} " in message for name in fixed)
        elif names:
            assert "the data changed" in message and any(repr(name) in message for name in names)
        else:
            assert message == ""

    check()
