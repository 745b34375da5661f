"""Images that are the same under several names."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from modeling_miniclip import load_captions
from modeling_miniclip.data.tables import image_copies, image_places
from modeling_miniclip.data.tables.image_copies import find_copies
from tests.helpers.shards import write_tar

# 1 and 4 are equal, and so are 0 and 5; 2 is as long as these, 3 and 6 are alone.
CONTENTS = [b"five.", b"pixel", b"lexip", b"alone.", b"pixel", b"five.", b"longest"]
COPIES = {0: 0, 5: 0, 1: 1, 4: 1}


def in_files(folder: Path) -> Dataset:
    for i, content in enumerate(CONTENTS):
        (folder / f"{i}.png").write_bytes(content)
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,text {i}\n" for i in range(7)))
    return load_captions(folder / "captions.csv", validation_fraction=None)["train"]


def in_archive(folder: Path) -> Dataset:
    members = [(f"{i}.{e}", c) for i, content in enumerate(CONTENTS) for e, c in (("png", content), ("txt", b"a"))]
    return load_captions(write_tar(folder / "0.tar", members), validation_fraction=None)["train"]


def of_contents(split: Dataset) -> dict[int, int]:
    """`COPIES` for rows in another order."""
    number = [int(Path(name).stem) for name in split["image_id"]]
    rows = {each: [row for row, i in enumerate(number) if COPIES.get(i) == each] for each in (0, 1)}
    return {row: min(several) for several in rows.values() for row in several}


@pytest.mark.parametrize("write", [in_files, in_archive])
def test_images_of_equal_bytes_are_copies(write, tmp_path: Path) -> None:
    split = write(tmp_path)
    assert len(split) == len(CONTENTS)
    assert find_copies(split) == of_contents(split)
    assert find_copies(split, most_read=5) == of_contents(split)  # five images are as long as another one
    assert find_copies(split, most_read=4) is None


def test_what_is_not_opened_is_not_known(tmp_path: Path) -> None:
    images = [{"bytes": content, "path": None} for content in CONTENTS]
    pq.write_table(pa.table({"image": images, "caption": list("abcdefg")}), tmp_path / "0.parquet")
    assert find_copies(load_captions(tmp_path / "0.parquet", validation_fraction=None)["train"]) is None


def test_an_image_that_is_missing_is_no_copy(tmp_path: Path) -> None:
    split = in_files(tmp_path)
    (tmp_path / "4.png").unlink()
    assert find_copies(split) == {row: one for row, one in of_contents(split).items() if split["image_id"][row] in
                                  ("0.png", "5.png")}  # fmt: skip


def test_result_is_kept_until_an_image_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    split, kept = in_files(tmp_path / "data"), tmp_path / "kept"
    expected = of_contents(split)
    assert find_copies(split, cache_dir=kept) == expected
    assert not kept.exists(), "another change might have the same time"
    monkeypatch.setattr(image_places, "SETTLED", -1)
    assert find_copies(split, cache_dir=kept) == expected and len(list(kept.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(image_copies, "read_encoded", None)
        assert find_copies(split, cache_dir=kept) == expected
    time.sleep(0.02)  # some ticks of the system's clock
    (tmp_path / "data" / "4.png").write_bytes(b"lexip")
    equal = [split["image_id"].index(f"{i}.png") for i in (2, 4)]
    others = {row: one for row, one in expected.items() if split["image_id"][row] in ("0.png", "5.png")}
    assert find_copies(split, cache_dir=kept) == others | dict.fromkeys(equal, min(equal))
