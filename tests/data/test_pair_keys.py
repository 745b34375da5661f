"""Which captions also belong to other images: keys of rows, through collation, and how many there are."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image

from modeling_miniclip import load_captions
from modeling_miniclip.data.loading.collation import Collator, join_pieces
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.pair_keys import NO_KEY, count_shared, keys_of_row, pair_key, same_text
from tests.helpers.towers import tiny_processor

CAPTIONS = [["A cat.", "one"], ["a  cat", "two"], ["two", "three"], ["four"], ["five"]]
GROUPS = [None, None, None, "mug", "mug"]


def test_equal_captions_differ_in_case_space_or_full_stop() -> None:
    assert same_text(" A  Cat\tsits. ") == same_text("a cat sits") != same_text("a cat sits!")


def test_kinds_of_keys_never_meet_ids_or_each_other() -> None:
    keys = {pair_key(kind, "5") for kind in ("caption", "group", "image")}
    assert len(keys) == 3 and all(2**62 <= key < 2**63 for key in keys)
    assert pair_key("caption", "5") in keys  # in every process


def share(image: list[int], text: list[int]) -> bool:
    return bool(set(image) & set(text) - {NO_KEY})


def test_rows_share_captions_groups_and_bytes_but_not_through_others() -> None:
    rows = [keys_of_row(c, range(len(c)), group=g) for c, g in zip(CAPTIONS, GROUPS, strict=True)]
    found = {
        (i, j): [share(a.image, text) for text in b.texts] for i, a in enumerate(rows) for j, b in enumerate(rows)
    }
    assert found[0, 1] == [True, False] and found[1, 0] == [True, False]
    assert found[1, 2] == [True, False] and found[2, 1] == [False, True]
    assert found[0, 2] == found[2, 0] == [False, False]  # only through the second
    assert found[3, 4] == found[4, 3] == [True] and found[0, 3] == [False]
    one, other = (keys_of_row([text], [0], content=b"pixels") for text in ("a", "b"))
    assert share(one.image, other.texts[0])


def test_wrong_caption_is_shared_only_with_images_that_have_it() -> None:
    keys = keys_of_row(["a"], [0], ["two"], "mug", b"pixels")
    two, same_group = keys_of_row(CAPTIONS[1], [0]), keys_of_row(["b"], [0], group="mug")
    assert share(two.image, keys.texts[1]) and not share(same_group.image, keys.texts[1])
    assert share(same_group.image, keys.texts[0]) and not share(keys.image, keys.texts[1])


def split_of(captions: list[list[str]], images: list[bytes], **columns: Any) -> Dataset:
    values = [{"bytes": content, "path": None} for content in images]
    names = [f"{i}.png" for i in range(len(images))]
    rows = Dataset.from_dict({"image": values, "image_id": names, "captions": captions, **columns})
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_shared_captions_are_counted_by_hand(groups: list[str | None] | None, copies: bool) -> None:
    images = [b"one", b"two", b"three", b"four", b"two" if copies else b"six"]
    found = count_shared(split_of(CAPTIONS, images, **({"group": groups} if groups else {})))
    # "a cat" and "two" belong to two images each, and so do the captions of the group. Images 1 and 4 may be equal:
    # then "a cat", "two" and "five" belong to both.
    assert (found.images, found.captions) == (5, 8)
    assert (
        found.shared == {(False, False): 4, (False, True): 5, (True, False): 6, (True, True): 6}[bool(groups), copies]
    )
    by_group, by_copy = 2 * bool(groups), 3 * copies
    assert (found.by_caption, found.by_group, found.by_copy) == (4, by_group, by_copy)
    assert found.copies == ({1: 1, 4: 1} if copies else {})
    line = found.describe(3, 1)
    # 3 of 5 images: a pair of images is among them with probability 6/20, a caption is drawn with 5/8
    expected = (4 + by_group + by_copy) * 6 / 20 * 5 / 8
    assert line is not None and f"about {expected:.3g} in a batch of 3" in line
    assert ("3 by equal images" in line) == copies


def test_data_without_shared_captions_says_nothing() -> None:
    found = count_shared(split_of([["a"], ["b"]], [b"1", b"2"]))
    assert found.describe(2, None) is None and not found.may_occur
    assert count_shared(split_of([["a"], ["b"]], [b"1", b"2"]), most_read=1).may_occur, "two images of one size"


def test_rows_of_a_split_carry_their_keys(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    lines = [f'{name},"{text}",{group or ""}'
             for name, texts, group in zip(names, CAPTIONS, GROUPS, strict=True) for text in texts]  # fmt: skip
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,group", *lines]), encoding="utf-8")
    split = load_captions(tmp_path / "captions.csv", validation_fraction=None)["train"]
    processor = tiny_processor()
    rows = CaptionRows(split, processor, finds_pairs=True)
    order = [split["image_id"].index(name) for name in names]
    whole = Collator(processor.tokenizer)(rows.__getitems__([(0, i) for i in order]))
    pieces = [Collator(processor.tokenizer)(rows.__getitems__([(0, i)])) for i in order]
    for batch in (whole, join_pieces(pieces, 5, processor.tokenizer)):
        owners = [order.index(i) for i in batch["text_image_id"].tolist()]
        pairs = {(i, owners[j]) for i, image in enumerate(batch["image_keys"].tolist())
                 for j, text in enumerate(batch["text_keys"].tolist()) if share(image, text)}  # fmt: skip
        same = {(i, i) for i in range(5)}
        assert pairs == same | {(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3), (0, 4), (4, 0)}
        assert batch["image_keys"].dtype == torch.int64
    assert "keys" not in CaptionRows(split, processor)[0, 0]
    # What was found before the first step is not looked for again.
    known = CaptionRows(split, processor, finds_pairs=True, copies={order[0]: order[0], order[4]: order[0]})
    batch = Collator(processor.tokenizer)(known.__getitems__([(0, i) for i in order]))
    found = [share(batch["image_keys"][i].tolist(), batch["text_keys"][j].tolist()) for i, j in ((0, -1), (4, 0))]
    assert found == [True, True]
