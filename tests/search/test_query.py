"""Searching an index: queries, filters, table, JSON, results page and duplicates."""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from modeling_miniclip import (
    EntryFilter,
    ImageIndex,
    MiniClipModel,
    UsageError,
    encode_images,
    encode_texts,
    update_index,
)
from modeling_miniclip.cli import cli
from modeling_miniclip.inference import encode
from modeling_miniclip.inference.loading import load_tower
from modeling_miniclip.search.exact import Match
from modeling_miniclip.search.formatting import cut, display_width
from modeling_miniclip.search.index import SCHEMA, Manifest, write_index
from modeling_miniclip.search.page.results_page import write_results_page
from modeling_miniclip.search.query import FEW_TEXTS, Query, embed_queries
from modeling_miniclip.search.unrelated import AUTO
from tests.helpers.browsers import browser_page
from tests.helpers.indexes import write_model, write_pictures


@pytest.fixture(scope="session")
def home(tiny_index: Path) -> Path:
    """A read-only folder with `photos` and their `index`."""
    return tiny_index.parent


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> MiniClipModel:
    """The model that built the index."""
    return MiniClipModel.from_pretrained(tiny_export)


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_tower_embeds_like_the_whole_model(
    home: Path, tiny_export: Path, model: MiniClipModel, side: Literal["image", "text"]
) -> None:
    tower, processor = load_tower(tiny_export, side)
    encode, what = {"image": (encode_images, [home / "photos" / "a.png"]), "text": (encode_texts, ["a dog"])}[side]
    whole = encode(model, what, progress=False)
    assert (encode(tower, what, processor, progress=False) == whole).all()
    other = {"image": "text_model.", "text": "vision_model."}[side]
    assert not [name for name, _ in tower.named_parameters() if name.startswith(other)]
    assert not any(parameter.is_meta for parameter in tower.parameters())
    assert not any(buffer.is_meta for buffer in tower.buffers())


def test_an_indexed_image_finds_itself_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c.png", "sub/e.png"):
        assert cli(["search", str(home / "index"), "--image", str(home / "photos" / name), "-k", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[1].split()[:2] == ["1", "1.000"] and lines[1].split()[3] == name.split("/")[-1] or name in lines[1]
        )
        assert len(lines) == 4 and lines[3].startswith("2 of 6 images; imports")


def test_json_has_the_sorted_inner_products(
    home: Path, model: MiniClipModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["search", str(home / "index"), "a red dog", "--json", "-k", "4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    index = ImageIndex.open(home / "index")
    scores = index.embeddings @ encode_texts(model, ["a red dog"], progress=False)[0].numpy()
    order = np.argsort(-scores)[:4]
    assert [match["id"] for match in printed["matches"]] == [index.entry(int(i))["id"] for i in order]
    assert [match["score"] for match in printed["matches"]] == pytest.approx(scores[order].tolist(), abs=2e-6)
    assert [match["rank"] for match in printed["matches"]] == [1, 2, 3, 4]
    assert set(printed["seconds"]) == {"imports", "load", "search"} and printed["query"]["words"] == "a red dog"


def test_query_weights_words_image_and_texts_to_avoid(home: Path, model: MiniClipModel) -> None:
    index, picture = ImageIndex.open(home / "index"), home / "photos" / "b.png"
    red, not_blue = encode_texts(model, ["red", "blue"], progress=False).numpy()
    like = encode_images(model, [picture], progress=False).numpy()[0]
    expected = {
        Query("red"): red,
        Query(image=picture): like,
        Query("red", picture): 0.5 * red + 0.5 * like,
        Query("red", picture, 0.25): 0.75 * red + 0.25 * like,
        Query("red", without=("blue",)): red - 0.5 * not_blue,
        Query(image=picture, without=("blue",)): like - 0.5 * not_blue,
    }
    found = embed_queries(index, list(expected))
    for row, (query, vector) in zip(found, expected.items(), strict=True):
        np.testing.assert_allclose(row, vector / np.linalg.norm(vector), atol=1e-5, err_msg=str(query))
    np.testing.assert_allclose(embed_queries(index, [Query("red", picture)])[0], found[2], atol=1e-5)
    with pytest.raises(UsageError, match="cancel out"):
        embed_queries(index, [Query("red", without=("red", "red"))])


def test_one_thread_embeds_a_few_texts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, used = encode.encode_texts, list[int]()
    monkeypatch.setattr(
        encode, "encode_texts", lambda *args, **kw: (used.append(torch.get_num_threads()), plain(*args, **kw))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for count in (1, FEW_TEXTS, FEW_TEXTS + 1):
            embed_queries(ImageIndex.open(home / "index"), [Query(f"red {number}") for number in range(count)])
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert used == [1, 1, 3]


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        ([], "nothing to search for", 2),
        (["dog", "-k", "0"], "-k 0: expected at least 1 image", 2),
        (["dog", "--image_weight", "1.5"], "--image_weight 1.5: expected a number between 0", 2),
        (["dog", "--image", "no.png"], "no.png", 1),
        (["dog", "--since", "yesterday"], "'yesterday' is not a date: expected 2024", 2),
        (["dog", "--folder", "/nowhere"], "passes the filter folder '/nowhere'; choose", 2),
        (["dog", "--html", "/nowhere/x.html"], "--html /nowhere/x.html: the folder /nowhere does not exist", 2),
    ],
)
def test_bad_queries_give_one_line_errors(
    home: Path, argv: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["search", str(home / "index"), *argv]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_search_rejects_a_model_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "photos", "a.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], write_model(tmp_path / "export"), progress=False)
    write_model(tmp_path / "export", seed=1)
    assert cli(["search", str(tmp_path / "index"), "dog"]) == 1
    assert f"rebuild the index: miniclip index {tmp_path}/export {tmp_path}/photos -o" in capsys.readouterr().err


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def entries() -> pa.Table:
    rows = [
        ("/p/a.jpg", datetime(2023, 12, 31, 23, 59, 59), ["A dog, running."], "train"),
        ("/p/sub/b.jpg", datetime(2024, 1, 1), ["two dogs", "snow and a Dog"], "train"),
        ("/p/subway/c.jpg", datetime(2024, 2, 29, 12), [], "validation"),
        ("/p/sub/x/d.jpg", datetime(2024, 3, 1), ["ein Mädchen", "hotdog"], ""),
        ("set/train/000001", None, ["dog"], "train"),
    ]
    names = ("id", "date", "captions", "split")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=SCHEMA)


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"folder": "/p/sub"}, [1, 3]),
        ({"folder": "/p/sub/"}, [1, 3]),
        ({"folder": "set"}, [4]),
        ({"since": "2024"}, [1, 2, 3]),
        ({"until": "2023"}, [0]),
        ({"since": "2024-02", "until": "2024-02"}, [2]),
        ({"until": "2024-02-29"}, [0, 1, 2]),
        ({"until": "2024-02-29T11:59"}, [0, 1]),
        ({"caption_contains": "dog"}, [0, 1, 4]),
        ({"caption_contains": "DOG snow"}, [1]),
        ({"caption_contains": "mädchen"}, [3]),
        ({"caption_contains": "do."}, []),
        ({"split": "train", "caption_contains": "dog"}, [0, 1, 4]),
        ({"split": "validation"}, [2]),
    ],
)
def test_filter_passes_entries_meeting_all_conditions(entries: pa.Table, conditions: dict, rows: list[int]) -> None:
    assert EntryFilter(**conditions).rows(entries).tolist() == rows
    assert bool(EntryFilter(**conditions)) == bool(conditions)


def test_filtered_search_ranks_only_passing_images(home: Path) -> None:
    index = ImageIndex.open(home / "index")
    query = index.embeddings[0]
    inside = [match.name for match in index.search(query, 10, EntryFilter(folder=str(home / "photos" / "sub")))]
    everything = [match.name for match in index.search(query, 10)]
    assert inside == [name for name in everything if "/sub/" in name] and len(inside) == 2
    assert [match.index for match in index.search(query, 3, np.array([2, 4]))] in ([2, 4], [4, 2])


# --- table and page -------------------------------------------------------------------------------------------------


def test_table_aligns_wide_characters() -> None:
    assert (display_width("abc"), display_width("犬と雪"), display_width("e\u0301")) == (3, 6, 1)
    assert cut("犬と雪だ", 5) == "犬と…" and cut("abc", 3) == "abc"


class Page(HTMLParser):
    """Tags with their attributes, and all text, of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_results_page_is_self_contained_and_escaped(tmp_path: Path, tiny_export: Path) -> None:
    evil = '<img src=x onerror="alert(1)">.png'
    write_pictures(tmp_path / "photos", "a.png gone.png")
    (tmp_path / "photos" / "a.png").rename(tmp_path / "photos" / evil)
    quoted = evil.replace('"', '""')
    (tmp_path / "photos" / "captions.csv").write_text(
        f'image,caption\n"{quoted}","<script>alert(2)</script> & ""x"""\n'
    )
    update_index(tmp_path / "index", [tmp_path / "photos"], tiny_export, progress=False)
    (tmp_path / "photos" / "gone.png").unlink()
    page = tmp_path / "found.html"
    flags = ["--html", str(page), "--absolute_paths"]
    assert cli(["search", str(tmp_path / "index"), '<u>"dogs"</u>', *flags]) == 0
    found = Page(page.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "u"}
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 1 and set(images[0]) == {"alt", "src", "loading"}
    with Image.open(io.BytesIO(base64.b64decode(str(images[0]["src"]).removeprefix("data:image/jpeg;base64,")))) as im:
        assert im.size == (44, 40)
    assert '<u>"dogs"</u>' in found.text and '<script>alert(2)</script> & "x"' in found.text and evil in found.text
    assert "missing or unreadable" in found.text
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == [(tmp_path / "photos" / evil).as_uri()]
    assert not re.findall(r"https?://", page.read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.html", "index", "photos"]


@pytest.mark.parametrize("source", ["photos", "photos/captions.csv", "captions.csv"])
def test_results_page_does_not_say_where_files_are(source: str, tmp_path: Path, tiny_export: Path) -> None:
    write_pictures(tmp_path / "photos", "a.png sea/b.png")
    rows = {"photos": "", "captions.csv": "photos/"}.get(source, "")
    text = f"image,caption\n{rows}a.png,a cat\n{rows}sea/b.png,a boat\n"
    if source != "photos":
        (tmp_path / source).write_text(text)
    update_index(tmp_path / "index", [tmp_path / source], tiny_export, progress=False)
    page = tmp_path / "found.html"
    assert cli(["search", str(tmp_path / "index"), "a boat", "--html", str(page)]) == 0
    content = page.read_text(encoding="utf-8")
    assert str(tmp_path) not in content and str(tiny_export.parent) not in content and "file:" not in content
    found = Page(content)
    assert not [tag for tag, _ in found.tags if tag == "a"] and f"{rows}sea/b.png" in found.text
    assert "found with" in found.text and "how often an unrelated caption scores as high" in found.text
    assert cli(["search", str(tmp_path / "index"), "a boat", "--html", str(page), "--absolute_paths"]) == 0
    content = page.read_text(encoding="utf-8")
    assert str(tmp_path / "photos" / "sea" / "b.png") in content and str(tiny_export) in content


def test_results_page_dims_what_does_not_fit(home: Path, tmp_path: Path) -> None:
    index = ImageIndex.open(home / "index")
    write_results_page(tmp_path / "found.html", index, "a boat", [Match("a", 0.5, 0, 1e-9), Match("b", 0.5, 1, 1.0)])
    found = Page((tmp_path / "found.html").read_text(encoding="utf-8"))
    assert [attributes["class"] for tag, attributes in found.tags if tag == "figure"] == ["", "weak"]
    assert "0.500, <0.001 %" in found.text and "0.500, 100 % ?" in found.text
    write_results_page(tmp_path / "found.html", index, "a boat", [])
    assert "Nothing fits" in (tmp_path / "found.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "brightest"), [("light", 255), ("dark", 80)])
def test_results_page_fits_a_phone_in_both_themes(home: Path, tmp_path: Path, scheme: str, brightest: int) -> None:
    index = ImageIndex.open(home / "index")
    chances = (1e-9, AUTO / 8, AUTO / 2, AUTO, (AUTO + 1) / 2, 1.0)
    matches = [replace(m, chance=c) for m, c in zip(index.search(index.embeddings[0], 6), chances, strict=True)]
    write_results_page(tmp_path / "found.html", index, "a dog with averylongname" * 4, matches)
    with browser_page(360, 700) as page:
        page.emulate_media(color_scheme=scheme)
        page.goto((tmp_path / "found.html").as_uri())
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert brightest - 80 <= max(map(int, re.findall(r"\d+", ground)[:3])) <= brightest
        opacity = "() => [...document.querySelectorAll('figure img')].map(image => getComputedStyle(image).opacity)"
        assert page.evaluate(opacity) == ["1"] * 4 + ["0.5"] * 2
        page.screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)


# --- export and duplicates ------------------------------------------------------------------------------------------


def write_vectors(folder: Path, vectors: np.ndarray, hashes: Sequence[str], splits: list[str]) -> ImageIndex:
    """An index of the given embeddings, without images."""
    rows = [
        {"id": f"/p/{i}.jpg", "hash": content, "split": split}
        for i, (content, split) in enumerate(zip(hashes, splits, strict=True))
    ]
    manifest = Manifest("model", "0" * 32, vectors.shape[1])
    return write_index(folder, manifest, [pa.Table.from_pylist(rows, schema=SCHEMA)], [vectors.astype(np.float32)])


def test_datasets_reads_the_parquet_export(home: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    index = ImageIndex.open(home / "index")
    table = Dataset.from_parquet(str(index.to_parquet(tmp_path / "e.parquet")), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.array(table["embedding"], dtype=np.float32), index.embeddings)
    assert table["id"][:] == index.entries["id"].to_pylist()


def test_duplicates_are_grouped_by_bytes_and_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modeling_miniclip.search import duplicates

    monkeypatch.setattr(duplicates, "BLOCK", 2)  # so that pairs are within and across blocks
    angles = np.deg2rad([0, 90, 3, 180, 6, 90, 270])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    index = write_vectors(tmp_path / "index", vectors, "abcdebf", ["train"] * 3 + ["", "validation", "train", "train"])
    groups = duplicates.find_duplicates(index, threshold=float(np.cos(np.deg2rad(4))))
    # 1 and 5 have the same bytes; 0 is 3 degrees from 2, and 2 from 4; 0 and 4 are linked by 2 alone
    assert [(group.rows, group.exact) for group in groups] == [([1, 5], True), ([0, 2, 4], False)]
    assert [group.similarity for group in groups] == pytest.approx([1, np.cos(np.deg2rad(3))], abs=1e-6)
    across = duplicates.find_duplicates(index, float(np.cos(np.deg2rad(4))), across_splits=True)
    assert [group.rows for group in across] == [[0, 2, 4]]
    assert duplicates.find_duplicates(index, threshold=1.0)[0].rows == [1, 5]
    assert cli(["duplicates", str(tmp_path / "index"), "--threshold", "0.9975"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "identical" and lines[1:3] == ["  /p/1.jpg  (train)", "  /p/5.jpg  (train)"]
    assert lines[-1] == (
        "2 groups among 7 images: 1 identical, 1 near-identical (cosine 0.9975 or more), 3 superfluous images; "
        "1 across splits"
    )
    assert cli(["duplicates", str(tmp_path / "index"), "--threshold", "0.9975", "--json"]) == 0
    assert [len(group["images"]) for group in json.loads(capsys.readouterr().out)] == [2, 3]
    with pytest.raises(UsageError, match="threshold 0: expected a cosine"):
        duplicates.find_duplicates(index, threshold=0)


def test_default_threshold_allows_few_wrong_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_miniclip.search import duplicates

    # The cosine t of two random directions of 6 dimensions has the density (1 - t^2)^1.5, up to a factor.
    count = 1_000
    cosines = np.linspace(-1, 1, 200_001)
    density = np.maximum(1 - cosines**2, 0) ** 1.5
    pairs_per_image = (count - 1) / 2 * np.cumsum(density[::-1])[::-1] / density.sum()
    expected = float(cosines[np.searchsorted(-pairs_per_image, -1e-3)])
    vectors = np.random.default_rng(0).normal(size=(count, 6))
    vectors[-100:] = vectors[:100] + 1e-3  # copies, which must not change much
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = write_vectors(tmp_path / "index", vectors, [str(i) for i in range(count)], [""] * count)
    found = duplicates.default_threshold(index)
    # within a factor of 2 of the distance; the threshold for ten times as many wrong pairs is a factor of 2.5 away
    assert 0.5 < (1 - found) / (1 - expected) < 2
    assert len(duplicates.find_duplicates(index)) == 100
    monkeypatch.setattr(duplicates, "SAMPLE", 200)
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    assert duplicates.default_threshold(index) == pytest.approx(found, abs=0.2 * (1 - found))
    few = write_vectors(tmp_path / "few", vectors[:21], [str(i) for i in range(21)], [""] * 21)
    assert duplicates.default_threshold(few) == 0.95
