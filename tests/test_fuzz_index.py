"""Damaged index files: the images that were found before, or an error that names the folder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.image_index import EMBEDDINGS, ENTRIES, MANIFEST, SCHEMA, ImageIndex, Manifest, write_index
from tests.fuzzing import cases, damaged, fuzz, result_or_error

ROWS, DIM = 12, 8
NAMES = [f"/photos/{i}.jpg" for i in range(ROWS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "photos.index"
    columns: dict[str, list[Any]] = {name: [None] * ROWS for name in SCHEMA.names}
    columns |= {"id": NAMES, "path": NAMES, "size": [1] * ROWS, "mtime": [1] * ROWS, "thumbnail": [b"jpeg"] * ROWS}
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    vectors = np.eye(ROWS, DIM, dtype=np.float32) + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_index(folder, Manifest("model", "f" * 64, DIM), entries, [vectors])
    return folder


def use(folder: Path) -> tuple[list[str], list[float]]:
    """Everything that one does with an index."""
    index = ImageIndex.open(folder)
    found = index.search(np.ones(DIM), 5)
    for match in found:
        assert index.entry(match.index)["id"] == match.name
        index.thumbnail(match.index)
    return [match.name for match in found], [match.score for match in found]


@cases(60, 3000)
def test_damaged_index_files_give_images_of_the_index_or_are_told(
    whole: Path, tmp_path: Path, record_property: Any, count: int
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "photos.index"))
    names, _ = use(whole)
    assert len(names) == 5 and set(names) <= set(NAMES)

    @fuzz(count, record_property)
    @given(name=st.sampled_from([MANIFEST, ENTRIES, EMBEDDINGS]), data=st.data())
    def check(name: str, data: Any) -> None:
        (folder / name).write_bytes(data.draw(damaged(st.just((whole / name).read_bytes())), label="content"))
        found, told = result_or_error(use, folder)
        shutil.copy(whole / name, folder / name)
        assert str(folder) in told if found is None else len(found[0]) <= 5

    check()
