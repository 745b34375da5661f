"""Short embeddings and embeddings of 8 bits: how they are coded, stored, searched and updated."""

import importlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from modeling_miniclip import ImageIndex, MiniClipModel, UsageError, encode_images, encode_texts, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.search.approximate import ApproximateNeighbours, build_neighbours
from modeling_miniclip.search.duplicates import find_duplicates
from modeling_miniclip.search.embeddings_file import (
    CodedEmbeddings,
    gather_blocks,
    map_embeddings,
    truncate_rows,
    write_embeddings,
)
from modeling_miniclip.search.exact import Neighbours
from modeling_miniclip.search.query import Query, search_index
from tests.helpers.indexes import write_model, write_picture, write_pictures
from tests.helpers.runs import ROOT
from tests.search.test_nearest import by_sorting, unit

NAMES = "a.png b.png c.png"


def rows_of(count: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit(unit(rng.standard_normal(dim)) + 0.4 * rng.standard_normal((count, dim))).astype(np.float32)


# --- 8 bits per number ----------------------------------------------------------------------------------------------


def test_codes_and_scales_worked_by_hand() -> None:
    coded = CodedEmbeddings.from_rows(np.array([[0.6, -0.8], [0, 1], [0, 0]], np.float32))
    assert coded.codes.tolist() == [[95, -127], [0, 127], [0, 0]]  # 0.6 / 0.8 * 127 = 95.25
    assert (coded.codes.dtype, coded.dtype, coded.shape, len(coded)) == (np.int8, np.int8, (3, 2), 3)
    np.testing.assert_allclose(coded.scales[:2], [1 / 158.600126, 1 / 127], rtol=1e-6)  # sqrt(95**2 + 127**2)
    np.testing.assert_allclose(coded[:], [[0.598991, -0.800756], [0, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(coded.products(np.array([0.6, -0.8], np.float32)), [1, -0.8, 0], atol=2e-6)


def test_decoded_rows_are_like_an_array() -> None:
    rows = rows_of(9)
    coded = CodedEmbeddings.from_rows(rows)
    whole = np.asarray(coded)
    assert whole.dtype == np.float32 and np.asarray(coded, dtype=np.float64).dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(whole, rows, atol=np.abs(rows).max() / 127)
    for some in (4, slice(2, 5), np.array([7, 0, 7]), [1, 2], slice(0, 0)):
        assert coded[some].dtype == np.float32
        np.testing.assert_array_equal(coded[some], whole[some])


def test_rows_that_are_coded_again_do_not_change() -> None:
    for dim in (1, 2, 64, 300):
        coded = CodedEmbeddings.from_rows(rows_of(500, dim, seed=dim))
        again = CodedEmbeddings.from_rows(coded[:])
        np.testing.assert_array_equal(again.codes, coded.codes)
        np.testing.assert_array_equal(again.scales, coded.scales)


@pytest.mark.parametrize("share", [None, 0.0, 0.02, 0.9])
def test_search_equals_sorting_all_decoded_products(share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_miniclip.search.embeddings_file.DECODED", 700)
    exact, query = rows_of(3000), rows_of(1)[0]
    coded, rng = CodedEmbeddings.from_rows(exact), np.random.default_rng(1)
    rows = None if share is None else np.flatnonzero(rng.random(3000) < share)
    scores, found = Neighbours(coded).search(query, 25, rows)
    products = coded[:].astype(np.float64) @ query
    wanted = by_sorting(products, np.arange(3000) if rows is None else rows, 25)
    np.testing.assert_allclose(scores, products[wanted], atol=1e-6)
    assert found.tolist() == wanted and len(found) == (0 if share == 0.0 else 25)
    np.testing.assert_allclose(scores, (exact @ query)[wanted], atol=5e-3)


@pytest.mark.skipif(find_spec("faiss") is None, reason="no FAISS: pip install faiss-cpu")
def test_approximate_search_compares_candidates_again(tmp_path: Path) -> None:
    coded, query = CodedEmbeddings.from_rows(rows_of(3000)), rows_of(1)[0]
    build_neighbours(coded, tmp_path / "neighbours")
    everything = ApproximateNeighbours(coded, tmp_path / "neighbours", probes=1000)
    scores, found = everything.search(query, 10)
    assert found.tolist() == Neighbours(coded).search(query, 10)[1].tolist()
    np.testing.assert_allclose(scores, coded[found] @ query, atol=1e-6)


def test_file_has_aligned_codes_and_scales(tmp_path: Path) -> None:
    rows = rows_of(5, 3)
    write_embeddings(tmp_path / "e", 5, 3, "int8", [rows[:2], rows[2:2], rows[2:]])
    read, coded = load_file(tmp_path / "e"), CodedEmbeddings.from_rows(rows)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
        "scales": (np.float32, (5,)), "embeddings": (np.int8, (5, 3))
    }  # fmt: skip
    np.testing.assert_array_equal(read["embeddings"], coded.codes)
    np.testing.assert_array_equal(read["scales"], coded.scales)
    mapped = map_embeddings(tmp_path / "e")
    assert isinstance(mapped, CodedEmbeddings) and isinstance(mapped.codes, np.memmap)
    np.testing.assert_array_equal(mapped[:], coded[:])
    (block,) = gather_blocks([mapped, mapped], np.array([1, 0, 1]), np.array([4, 0, 2]))
    np.testing.assert_array_equal(block, coded[[4, 0, 2]])


def test_damaged_files_and_wrong_rows_are_errors(tmp_path: Path) -> None:
    rows = rows_of(5, 3)
    write_embeddings(tmp_path / "e", 5, 3, "int8", [rows])
    content = (tmp_path / "e").read_bytes()
    for damaged in (content[:-1], content + b"\0", content.replace(b'"scales"', b'"scalez"')):
        (tmp_path / "e").write_bytes(damaged)
        with pytest.raises(ValueError, match="is truncated"):
            map_embeddings(tmp_path / "e")
    with pytest.raises(ValueError, match="16 bytes of scales instead of 20"):
        write_embeddings(tmp_path / "e", 5, 3, "int8", [rows[:4]])
    with pytest.raises(ValueError, match="24 bytes of embeddings instead of 60"):
        write_embeddings(tmp_path / "e", 5, 3, "float32", [rows[:2]])
    with pytest.raises(ValueError, match="15 bytes of embeddings instead of 20"):
        write_embeddings(tmp_path / "e", 5, 4, "int8", [rows])


def test_index_of_8_bits_is_searched_and_updated(tmp_path: Path, tiny_export: Path) -> None:
    paths = write_pictures(tmp_path / "photos", NAMES)
    model = MiniClipModel.from_pretrained(tiny_export)
    expected = encode_images(model, paths, progress=False).numpy()
    update_index(tmp_path / "index", [tmp_path / "photos"], tiny_export, dtype="int8", progress=False)
    before = ImageIndex.open(tmp_path / "index")
    assert isinstance(before.embeddings, CodedEmbeddings) and before.manifest.dtype == "int8"
    np.testing.assert_allclose(before.embeddings, expected, atol=np.abs(expected).max() / 127)
    for row in expected:
        order = np.argsort(-(before.embeddings[:] @ row), kind="stable")
        assert [match.index for match in before.search(row, 3)] == order.tolist()
    codes, scales = np.array(before.embeddings.codes), np.array(before.embeddings.scales)

    write_picture(tmp_path / "photos" / "z.png", seed=9)
    assert update_index(tmp_path / "index", progress=False).encoded == 1
    after = ImageIndex.open(tmp_path / "index", verify=True)
    assert isinstance(after.embeddings, CodedEmbeddings) and len(after) == 4
    np.testing.assert_array_equal(after.embeddings.codes[:3], codes)
    np.testing.assert_array_equal(after.embeddings.scales[:3], scales)
    with pytest.raises(UsageError, match="holds int8, not float16; .* --overwrite --dtype float16$"):
        update_index(tmp_path / "index", dtype="float16", progress=False)

    table = pq.read_table(after.to_parquet(tmp_path / "index.parquet"))
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), after.embeddings[:])
    Image.open(tmp_path / "photos" / "z.png").save(tmp_path / "photos" / "z.bmp")
    update_index(tmp_path / "index", progress=False)
    groups = find_duplicates(ImageIndex.open(tmp_path / "index"), 1.0)
    assert any({3, 4} <= set(group.rows) for group in groups)


# --- fewer numbers --------------------------------------------------------------------------------------------------


def test_first_numbers_are_normalised_again() -> None:
    rows = np.array([[0.6, 0, 0.8], [0.48, 0.64, 0.6], [0, 0, 1]], np.float16)
    short = truncate_rows(rows, 2)
    assert short.dtype == np.float32
    np.testing.assert_allclose(short, [[1, 0], [0.6, 0.8], [0, 0]], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_index_of_short_embeddings(tmp_path: Path, tiny_export: Path, dtype: str) -> None:
    paths = write_pictures(tmp_path / "photos", NAMES)
    model = MiniClipModel.from_pretrained(tiny_export)
    expected = encode_images(model, paths, progress=False, truncate_dim=5).numpy()
    folder, source = tmp_path / "index", tmp_path / "photos"
    update_index(folder, [source], tiny_export, dtype=dtype, truncate_dim=5, progress=False)
    index = ImageIndex.open(folder)
    assert (index.manifest.dim, index.embeddings.shape) == (5, (3, 5))
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-5 if dtype == "float32" else 1 / 127)

    text = encode_texts(model, ["a red dog"], progress=False, truncate_dim=5)[0].numpy()
    _, found = search_index(folder, Query("a red dog"), 3)
    assert [match.index for match in found] == np.argsort(-(index.embeddings[:] @ text)).tolist()
    with pytest.raises(UsageError, match=r"got shape \(16,\); embed it with truncate_dim=5"):
        index.search(np.ones(16))

    write_picture(source / "z.png", seed=9)
    assert update_index(folder, progress=False).encoded == 1  # keeps the length
    assert update_index(folder, truncate_dim=5, progress=False).encoded == 0
    assert ImageIndex.open(folder).embeddings.shape == (4, 5)
    end = "--overwrite" + ("" if dtype == "float32" else " --dtype int8") + " --truncate_dim 6"
    with pytest.raises(UsageError, match=f"holds 5 dimensions, not 6; rebuild the index: .* {end}$"):
        update_index(folder, truncate_dim=6, progress=False)
    assert update_index(folder, truncate_dim=6, overwrite=True, progress=False).encoded == 4
    assert ImageIndex.open(folder).embeddings.shape == (4, 6)


@pytest.mark.parametrize("dim", [0, 17])
def test_wrong_length_is_found_before_the_sources_are_read(tmp_path: Path, tiny_export: Path, dim: int) -> None:
    write_pictures(tmp_path / "photos", "a.png")
    with pytest.raises(UsageError, match=f"truncate_dim {dim}: expected a number from 1 to 16"):
        update_index(tmp_path / "index", [tmp_path / "photos"], tiny_export, truncate_dim=dim, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_command_that_rebuilds_keeps_format_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "photos", "a.png")
    folder, export = tmp_path / "index", write_model(tmp_path / "export")
    update_index(folder, [tmp_path / "photos"], export, dtype="int8", truncate_dim=5, progress=False)
    write_model(tmp_path / "export", seed=1)
    assert cli(["search", str(folder), "dog", "--truncate_dim", "3"]) == 1
    fix = capsys.readouterr().err.partition("rebuild the index: miniclip ")[2].split()
    assert fix[-5:] == ["--overwrite", "--dtype", "int8", "--truncate_dim", "5"]
    assert cli(fix) == 0
    assert ImageIndex.open(folder).manifest.dtype == "int8" and ImageIndex.open(folder).manifest.dim == 5


def test_index_is_searched_by_its_first_dimensions(
    tiny_index: Path, tiny_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ImageIndex.open(tiny_index)
    short = index.truncate(4)
    expected = truncate_rows(index.embeddings[:], 4)
    np.testing.assert_allclose(short.embeddings, expected)
    assert short.manifest.dim == 4 and index.embeddings.shape == (6, 16)
    model = MiniClipModel.from_pretrained(tiny_export)
    text = encode_texts(model, ["a red dog"], progress=False, truncate_dim=4)[0]
    _, found = search_index(tiny_index, Query("a red dog"), 6, truncate_dim=4)
    assert [match.index for match in found] == [match.index for match in short.search(text, 6)]
    assert [match.index for match in found] == np.argsort(-(expected @ text.numpy())).tolist()
    np.testing.assert_allclose(index.truncate(16).embeddings, index.embeddings, atol=1e-6)
    assert cli(["search", str(tiny_index), "a red dog", "-k", "1", "--truncate_dim", "4"]) == 0
    assert Path(found[0].name).name in capsys.readouterr().out
    assert cli(["search", str(tiny_index), "a red dog", "--truncate_dim", "17"]) == 2
    assert "truncate_dim 17: expected a number from 1 to 16" in capsys.readouterr().err


# --- the benchmark --------------------------------------------------------------------------------------------------


def test_benchmark_scores_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("short_embeddings")
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    for dtype in ("float32", "float16", "int8"):
        assert benchmark.figures_of(images, texts, torch.tensor([0, 1]), dtype)["rsum"] == 600
        assert benchmark.figures_of(images, texts, torch.tensor([1, 0]), dtype)["text_to_image_R@1"] == 0
        assert benchmark.stored(images, dtype).tolist() == [pytest.approx([1, 0]), pytest.approx([0.8, 0.6], abs=4e-3)]
    figures = {
        f"32 {dtype}": {"rsum": rsum, "text_to_image_R@10": 60.0}
        for dtype, rsum in (("float32", 300.0), ("float16", 299.7), ("int8", 299.5))
    }
    page = benchmark.table([{"model": "matryoshka", "seed": 0, "figures": figures}])
    assert "\n| 32 | 128 | 36 | 300.0 / 60.0 | 299.5 / 60.0 |  |  |  |\n" in page and "over one seed" in page
    assert "changes rsum by at most 0.3 in any run" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6 and {row.count("|") for row in rows} == {9}
