"""How well results fit: compared with unrelated captions, in the index, the command and Python."""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest

from benchmarks.cutoff import RULES, judge, strictest
from modeling_miniclip import (
    ImageIndex,
    MiniClipModel,
    UsageError,
    encode_images,
    encode_texts,
    find_matches,
    update_index,
)
from modeling_miniclip.cli import cli
from modeling_miniclip.search import unrelated
from modeling_miniclip.search.building import merge
from modeling_miniclip.search.embeddings_file import CodedEmbeddings, Embeddings
from modeling_miniclip.search.unrelated import AUTO, FILE, UnrelatedCaptions, cutoff_of, percent
from modeling_miniclip.search.unrelated_texts import TEXTS


def unit(rng: np.random.Generator, rows: int, dim: int, common: float = 0.0) -> np.ndarray:
    """Random directions, with something in common."""
    vectors = rng.normal(size=(rows, dim)) + common
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_texts_are_different_short_captions() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 256
    assert all(4 <= len(text.split()) <= 15 and text == text.strip() for text in TEXTS)


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_chances_worked_by_hand() -> None:
    found = UnrelatedCaptions(np.eye(10, dtype=np.float32), np.arange(10, dtype=np.float32), np.eye(10))
    # 5 of 10 captions reach 5, 4 of them 5.5, 2 of them 8; above 8, the chance is 1/e after each distance of 9 - 8
    fits = np.array([-1, 0, 5, 5.5, 8, 9, 10], np.float32)
    expected = [1, 1, 0.5, 0.4, 0.2, 0.2 / math.e, 0.2 / math.e**2]
    assert found.chance_of(fits).tolist() == pytest.approx(expected, rel=1e-5)


def reference_fit(image: int, query: np.ndarray, images: np.ndarray, captions: np.ndarray) -> float:
    """The fit of an image, computed number by number."""
    score = float(images[image] @ query)
    of_image = [float(images[image] @ caption) for caption in captions]
    of_query = [float(other @ query) for other in images]
    of_all = [float(other @ caption) for other in images for caption in captions]
    compared = [(score - fmean(others)) / pstdev(others) for others in (of_all, of_image, of_query)]
    return fmean(compared[:2] if len(images) < unrelated.LEAST_IMAGES else compared)


@pytest.mark.parametrize("count", [unrelated.LEAST_IMAGES - 1, unrelated.LEAST_IMAGES])
def test_fits_are_deviations_from_three_means(count: int) -> None:
    rng = np.random.default_rng(0)
    images, captions, queries = unit(rng, count, 6, 0.3), unit(rng, 9, 6), unit(rng, 3, 6)
    found = UnrelatedCaptions.compare(captions, images)
    fits = found.fits(images[[4, 7]], queries)
    expected = [[reference_fit(image, query, images, captions) for query in queries] for image in (4, 7)]
    np.testing.assert_allclose(fits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_best_fits_are_those_of_all_images(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows, captions = unit(rng, 61, 6), unit(rng, 12, 6)
    embeddings: Embeddings = CodedEmbeddings.from_rows(rows) if dtype == "int8" else rows.astype(dtype)
    monkeypatch.setattr(unrelated, "IMAGES_AT_ONCE", 7)  # the last block has 5
    found = UnrelatedCaptions.compare(captions, embeddings)
    whole = np.asarray(embeddings[:], np.float32)
    expected = [max(reference_fit(i, caption, whole, captions) for i in range(61)) for caption in captions]
    np.testing.assert_allclose(found.best, sorted(expected), rtol=1e-3, atol=1e-3)


def test_unrelated_queries_have_the_chances_that_they_say() -> None:
    rng = np.random.default_rng(2)
    images, captions = unit(rng, 500, 32, 0.4), unit(rng, 256, 32, 0.2)
    found = UnrelatedCaptions.compare(captions, images)

    def first(query: np.ndarray) -> float:
        best = int((images @ query).argmax())
        return float(found.chances(images[[best]], query)[0])

    chances = np.array([first(query) for query in unit(rng, 300, 32, 0.2)])
    for share in (0.05, 0.2, 0.5):  # two standard deviations of what 300 queries and 256 captions show of a half: 0.09
        assert abs((chances <= share).mean() - share) < 0.12
    noisy = images[:50] + 0.3 * unit(rng, 50, 32)
    right = np.array([first(query / np.linalg.norm(query)) for query in noisy])
    assert (right < 0.02).all()


@pytest.mark.parametrize(
    ("chance", "text"),
    [(1.0, "100 %"), (0.123, "12 %"), (0.0996, "10 %"), (0.04, "4 %"), (0.0034, "0.3 %"), (1e-5, "0.001 %"),
     (1e-9, "<0.001 %"), (0.0, "<0.001 %")],
)  # fmt: skip
def test_chances_are_written_with_few_digits(chance: float, text: str) -> None:
    assert percent(chance) == text


@pytest.mark.parametrize(("value", "cutoff"), [("auto", AUTO), ("0.05", 0.05), (0, 0.0), (1, 1.0)])
def test_cutoffs_are_shares_or_auto(value: Any, cutoff: float) -> None:
    assert cutoff_of(value) == cutoff


@pytest.mark.parametrize("value", ["often", "-0.1", 1.5, "nan", ""])
def test_other_cutoffs_are_errors(value: Any) -> None:
    with pytest.raises(UsageError, match="expected auto, or a number from 0 to 1"):
        cutoff_of(value)


# --- an index -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> MiniClipModel:
    """The model that built `tiny_index`."""
    return MiniClipModel.from_pretrained(tiny_export)


@pytest.fixture
def query(model: MiniClipModel) -> np.ndarray:
    """A text, embedded."""
    return encode_texts(model, ["a red dog"], progress=False)[0].numpy()


def test_index_knows_what_unrelated_captions_score(tiny_index: Path, model: MiniClipModel, query: np.ndarray) -> None:
    index = ImageIndex.open(tiny_index)
    captions = encode_texts(model, TEXTS, progress=False).numpy()
    expected = UnrelatedCaptions.compare(captions, index.embeddings)
    assert index.unrelated is not None
    np.testing.assert_allclose(index.unrelated.captions, captions, atol=1e-5)
    found = index.search(query, 6, cutoff=1)
    rows = [match.index for match in found]
    chances = expected.chances(index.embeddings[rows], query)
    assert [match.chance for match in found] == pytest.approx(chances.tolist(), abs=1e-2)
    assert [(m.name, m.score) for m in found] == [(m.name, m.score) for m in index.search(query, 6)]
    assert all(match.chance is None for match in index.search(query, 6))


def test_cutoff_leaves_out_larger_chances(tiny_index: Path, query: np.ndarray) -> None:
    index = ImageIndex.open(tiny_index)
    found = index.search(query, 6, cutoff=1)
    middle = sorted(match.chance for match in found if match.chance is not None)[2]
    for cutoff in (0, middle, 1):
        kept = [match for match in found if match.chance is not None and match.chance <= cutoff]
        assert index.search(query, 6, cutoff=cutoff) == kept
    assert index.search(query, 6, cutoff="auto") == index.search(query, 6, cutoff=AUTO)


def test_truncated_index_compares_short_captions(tiny_index: Path, query: np.ndarray) -> None:
    index = ImageIndex.open(tiny_index)
    assert index.unrelated is not None
    short = index.truncate(4)
    captions = index.unrelated.captions[:, :4] / np.linalg.norm(index.unrelated.captions[:, :4], axis=1, keepdims=True)
    expected = UnrelatedCaptions.compare(captions, np.asarray(short.embeddings))
    found = short.search(query[:4], 3, cutoff=1)
    unit_query = query[:4] / np.linalg.norm(query[:4])
    chances = expected.chances(short.embeddings[[match.index for match in found]], unit_query)
    assert [match.chance for match in found] == pytest.approx(chances.tolist(), abs=1e-2)


def test_older_index_gets_them_at_the_next_update(
    tiny_index: Path, tiny_export: Path, tmp_path: Path, query: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    (tmp_path / "index" / FILE).unlink()
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    del manifest["checksums"][FILE], manifest["sha256"]
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    assert cli(["search", str(tmp_path / "index"), "a red dog"]) == 0
    assert "%" not in capsys.readouterr().out
    assert cli(["search", str(tmp_path / "index"), "a red dog", "--cutoff", "auto"]) == 2
    assert f"update it: miniclip index {tiny_export} -o {tmp_path / 'index'}" in capsys.readouterr().err
    assert update_index(tmp_path / "index", progress=False).encoded == 0
    new, old = ImageIndex.open(tmp_path / "index"), ImageIndex.open(tiny_index)
    assert [match.chance for match in new.search(query, 6, cutoff=1)] == pytest.approx(
        [match.chance for match in old.search(query, 6, cutoff=1)], abs=1e-2
    )


def test_update_encodes_captions_only_if_they_changed(
    tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = merge.encode_texts

    def recording(model: Any, texts: list[str], *arguments: Any, **options: Any) -> Any:
        encoded.append(len(texts))
        return encode(model, texts, *arguments, **options)

    shutil.copytree(tiny_index, tmp_path / "index")
    monkeypatch.setattr(merge, "encode_texts", recording)
    update_index(tmp_path / "index", progress=False)
    assert not encoded
    monkeypatch.setattr(merge, "CHECKSUM", "other texts")
    update_index(tmp_path / "index", progress=False)
    assert encoded == [256]


# --- the command and Python -----------------------------------------------------------------------------------------


def test_command_shows_chances_and_marks_large_ones(
    tiny_index: Path, query: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ImageIndex.open(tiny_index).search(query, 6, cutoff=1)
    assert cli(["search", str(tiny_index), "a red dog", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["matches"]
    assert [match["chance"] for match in printed] == pytest.approx([m.chance for m in found], abs=1e-2)
    assert cli(["search", str(tiny_index), "a red dog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, match in zip(lines[1:7], printed, strict=True):
        chance = float(match["chance"])
        assert percent(chance) in line and ("?" in line) == (chance > AUTO)
    assert lines[7].startswith("%: how often an unrelated caption") and lines[8].startswith("6 of 6 images; ")
    assert cli(["search", str(tiny_index), "a red dog", "--cutoff", "0"]) == 0
    assert capsys.readouterr().out.startswith("nothing fits: unrelated captions score as high (--cutoff 0; 0 of 6 ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a dog", "--cutoff", "often"], "cutoff 'often': expected auto, or a number from 0 to 1"),
        (["--image", "{photo}", "--cutoff", "auto"], "leave out --cutoff or --image"),
    ],
)
def test_bad_cutoffs_give_one_line_errors(
    flags: list[str], message: str, tiny_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tiny_index.parent / "photos" / "a.png"
    assert cli(["search", str(tiny_index), *(flag.format(photo=photo) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_find_matches_has_the_chances_of_an_index(
    tiny_index: Path, model: MiniClipModel, query: np.ndarray, tmp_path: Path
) -> None:
    index = ImageIndex.open(tiny_index)
    names, embeddings = index.entries["id"].to_pylist(), np.asarray(index.embeddings)
    found = find_matches(model, embeddings, "a red dog", names, n=6, cutoff=1)
    expected = index.search(query, 6, cutoff=1)
    assert [match.name for match in found] == [match.name for match in expected]
    assert [match.chance for match in found] == pytest.approx([match.chance for match in expected], abs=1e-2)
    assert find_matches(model, embeddings, "a red dog", names, cutoff=0, draw=tmp_path / "found.png") == []
    assert not (tmp_path / "found.png").exists()
    with pytest.raises(UsageError, match="leave it out for an image"):
        find_matches(model, encode_images(model, names[:1], progress=False), Path(names[0]), names[:1], cutoff=1)


# --- the benchmark --------------------------------------------------------------------------------------------------


def test_benchmark_judges_first_results_like_an_index() -> None:
    rng = np.random.default_rng(3)
    images, texts, captions = unit(rng, 80, 6, 0.3), unit(rng, 160, 6), unit(rng, 12, 6)
    image_of, present = np.repeat(np.arange(80), 2), np.arange(0, 80, 4).repeat(3)[:60] + np.tile([0, 1, 2], 20)
    judged = {(rule, kind): chances for rule, kind, chances in judge(images, texts, image_of, captions, present)}
    assert {rule: sum(len(judged[rule, kind]) for kind in ("right", "wrong", "absent")) for rule in RULES} == (
        dict.fromkeys(RULES, 160)
    )
    assert len(judged["three", "absent"]) == 40 and len(judged["three", "unrelated"]) == 6
    found = UnrelatedCaptions.compare(captions, images[present])
    absent = texts[np.isin(image_of, present, invert=True)]
    best = (images[present] @ absent.T).argmax(axis=0)
    expected = [float(found.chances(images[present][[row]], text)[0]) for row, text in zip(best, absent, strict=True)]
    assert judged["three", "absent"].tolist() == pytest.approx(expected, abs=1e-4)


def test_strictest_cutoff_keeps_95_of_100() -> None:
    chances = np.random.default_rng(4).permutation(100) / 100
    assert strictest(chances) == 0.94 and (chances <= strictest(chances)).sum() == 95
