"""Any folder is indexed without a loss; a damaged index answers as before, or an error names its folder."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.data import picture_formats
from modeling_miniclip.errors import DataError
from modeling_miniclip.search import index as image_index
from modeling_miniclip.search.approximate import FILE as NEIGHBOURS
from modeling_miniclip.search.index import EMBEDDINGS, ENTRIES, MANIFEST, SCHEMA, ImageIndex, Manifest, write_index
from modeling_miniclip.search.unrelated import FILE as UNRELATED
from modeling_miniclip.search.update import update_index
from modeling_miniclip.utils.names import path_of
from tests.helpers.fuzzing import cases, damaged, fuzz, result_or_error
from tests.helpers.listing import unlistable
from tests.helpers.trees import Tree, trees

ROWS, DIM = 12, 8
NAMES = [f"/photos/{i}.jpg" for i in range(ROWS)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "photos.index"
    columns: dict[str, list[Any]] = {name: [None] * ROWS for name in SCHEMA.names}
    columns |= {"id": NAMES, "path": NAMES, "size": [1] * ROWS, "mtime": [1] * ROWS, "thumbnail": [b"jpeg"] * ROWS}
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    vectors = np.eye(ROWS, DIM, dtype=np.float32) + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    neighbours = "approximate" if find_spec("faiss") else "exact"
    manifest = Manifest("model", "f" * 64, DIM, request.param, neighbours=neighbours)
    write_index(folder, manifest, [entries], [vectors], captions=np.eye(4, DIM, dtype=np.float32))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "photos.index"))


def use(folder: Path) -> tuple[list[str], list[float], list[bytes | None], dict[str, Any], list[float | None]]:
    """Use every part of an index."""
    index = ImageIndex.open(folder)
    found = index.search(np.ones(DIM), 5)
    for match in found:
        assert index.entry(match.index)["id"] == match.name
    thumbnails = [index.thumbnail(match.index) for match in found]
    rows = index.read_entries().to_pydict()
    chances = [match.chance for match in index.search(np.ones(DIM), 5, cutoff=1)]
    return [match.name for match in found], [match.score for match in found], thumbnails, rows, chances


@cases(16, 3000)
def test_damaged_index_answers_correctly_or_fails(whole: Path, copy: Path, record_property: Any, count: int) -> None:
    expected = use(whole)
    assert len(expected[0]) == 5 and set(expected[0]) <= set(NAMES) and set(expected[2]) == {b"jpeg"}
    assert len(expected[4]) == 5
    names = sorted(path.name for path in whole.iterdir())
    assert {MANIFEST, ENTRIES, EMBEDDINGS, UNRELATED} <= set(names)
    assert find_spec("faiss") is None or NEIGHBOURS in names

    @fuzz(count, record_property)
    @given(name=st.sampled_from(names), data=st.data())
    def check(name: str, data: Any) -> None:
        (copy / name).write_bytes(data.draw(damaged(st.just((whole / name).read_bytes())), label="content"))
        found, message = result_or_error(use, copy)
        shutil.copy(whole / name, copy / name)
        assert str(copy) in message if found is None else found == expected

    check()


@pytest.mark.parametrize("name", [MANIFEST, ENTRIES, EMBEDDINGS, UNRELATED])
def test_each_flipped_bit_is_detected_or_harmless(whole: Path, copy: Path, name: str, record_property: Any) -> None:
    content = (whole / name).read_bytes()
    expected, detected = use(whole), 0
    places = range(0, len(content), max(1, len(content) // 60))
    record_property("cases", len(places))
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (copy / name).write_bytes(flipped)
        found, error = result_or_error(use, copy)
        assert str(copy) in error if found is None else found == expected
        detected += found is None
    assert detected == len(places) if name != MANIFEST else detected > 0.8 * len(places)  # white space is harmless


@cases(16, 1500)
def test_large_index_is_verified_on_request(
    whole: Path, copy: Path, record_property: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_index, "VERIFIED", 0)

    @fuzz(count, record_property)
    @given(name=st.sampled_from([ENTRIES, EMBEDDINGS, UNRELATED]), data=st.data())
    def check(name: str, data: Any) -> None:
        content = data.draw(damaged(st.just((whole / name).read_bytes())), label="content")
        (copy / name).write_bytes(content)
        found, message = result_or_error(use, copy)
        if content != (whole / name).read_bytes():
            with pytest.raises(DataError, match=f"{name} does not match its checksum"):
                ImageIndex.open(copy, verify=True)
        shutil.copy(whole / name, copy / name)
        assert str(copy) in message if found is None else len(found[0]) <= 5

    check()


def test_pages_of_large_index_are_verified_when_read(whole: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_index, "VERIFIED", 0)
    content = bytearray((whole / ENTRIES).read_bytes())
    place = content.index(b"jpeg")
    content[place] ^= 1
    (copy / ENTRIES).write_bytes(content)
    index = ImageIndex.open(copy)
    assert index.search(np.ones(DIM), 1)
    with pytest.raises(DataError, match="photos.index: .*CRC"):
        index.thumbnail(0)


# --- sources --------------------------------------------------------------------------------------------------------


@cases(24, 600)
def test_nothing_is_lost_from_any_folder(
    tmp_path: Path, tiny_export: Path, record_property: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(picture_formats, "import_module", missing)  # the extra `formats` is not installed
    numbers = iter(range(10**9))

    @fuzz(count, record_property)
    @given(tree=trees())
    def check(tree: Tree) -> None:
        root, index = tmp_path / f"{(number := next(numbers))}", tmp_path / f"{number}.index"
        tree.write(root)
        report = update_index(index, [root], tiny_export, progress=False)
        named = {os.fsencode(path_of(name)) for name in ImageIndex.open(index).entries["id"].to_pylist()}
        found = {os.path.relpath(os.path.realpath(name), os.fsencode(root)) for name in named}
        good = tree.readable(root)
        assert found == good and len(named) == len(good)
        skipped = {os.path.realpath(os.fsencode(path_of(name))) for name in report.skipped}
        assert {os.path.relpath(name, os.fsencode(root)) for name in skipped} == tree.bad
        with pytest.MonkeyPatch.context() as patch:
            unlistable(patch, *(Path(os.fsdecode(os.path.join(os.fsencode(root), name))) for name in tree.closed))
            again = update_index(index, progress=False)
        assert again.images == len(good) and again.dropped == 0
        closed = {name for name in tree.closed if tree.visible(name)}
        assert bool(again.unlisted) == bool(closed)
        shutil.rmtree(root)

    check()
