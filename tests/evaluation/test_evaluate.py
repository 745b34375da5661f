"""`miniclip eval`: metrics, saved queries, failure page, baseline, class folders and errors."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from modeling_miniclip import MiniClipModel, encode_images, encode_texts, export, retrieval_metrics
from modeling_miniclip.cli import cli
from modeling_miniclip.errors import DataError, UsageError
from modeling_miniclip.evaluation import metrics
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import EvalSet, load_eval_set
from modeling_miniclip.evaluation.evaluate import FILES, evaluate_model, format_report, score_model
from modeling_miniclip.evaluation.metrics import DIRECTIONS, named_intervals, rank_keys, resampled_recalls
from modeling_miniclip.evaluation.zero_shot import zero_shot_accuracy
from modeling_miniclip.processing_miniclip import PIL_BACKEND
from tests.helpers.listing import unlistable
from tests.helpers.shards import write_tar
from tests.helpers.towers import CAPTIONS, PIXELS, tiny_model, tiny_processor
from tests.utils.test_html import Reader, of

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too'"


# --- ranks in blocks ------------------------------------------------------------------------------------------------


def brute_force(queries: torch.Tensor, keys: torch.Tensor, query_id: Any, key_id: Any) -> list[int]:
    """Reference: ranks in loops."""
    similarity = (queries @ keys.t()).tolist()
    found = []
    for row, wanted in zip(similarity, query_id.tolist(), strict=True):
        best = max(value for value, key in zip(row, key_id.tolist(), strict=True) if key == wanted)
        found.append(1 + sum(value >= best for value, key in zip(row, key_id.tolist(), strict=True) if key != wanted))
    return found


def small_integers(rows: int, seed: int) -> torch.Tensor:
    """Vectors whose products are exact in float32, with many ties."""
    return torch.randint(-2, 3, (rows, 4), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (64, 7), (1024, 4096)])
def test_ranks_and_results_do_not_depend_on_blocks(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", blocks[0])
    monkeypatch.setattr(metrics, "KEY_BLOCK", blocks[1])
    queries, keys = small_integers(23, 0), small_integers(31, 1)
    key_id = torch.randint(0, 9, (31,), generator=torch.Generator().manual_seed(2))  # unsorted
    query_id = key_id[torch.arange(23)]
    found = rank_keys(queries, keys, query_id, key_id, top=6)
    assert found.rank.tolist() == brute_force(queries, keys, query_id, key_id)
    similarity = queries @ keys.t()
    assert torch.equal(found.scores, similarity.sort(dim=1, descending=True).values[:, :6])
    assert torch.equal(found.scores, similarity.gather(1, found.indices))
    assert all(len(set(row)) == 6 for row in found.indices.tolist())
    right = query_id[:, None] == key_id[None]
    assert torch.equal(found.right_score, similarity.masked_fill(~right, -torch.inf).amax(dim=1))


@pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (64, 7), (1024, 4096)])
def test_ranks_by_several_ids_do_not_depend_on_blocks(
    blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK", blocks[0])
    monkeypatch.setattr(metrics, "KEY_BLOCK", blocks[1])
    monkeypatch.setattr(metrics, "PAIRS_OF", 2)
    queries, keys = small_integers(23, 0), small_integers(31, 1)
    generator = torch.Generator().manual_seed(2)
    key_id = torch.randint(-1, 12, (31, 3), generator=generator)  # -1 is none
    query_id = torch.randint(-1, 12, (23, 2), generator=generator)
    query_id[:, 0] = key_id.amax(dim=1)[torch.arange(23)].clamp(min=0)
    key_id[torch.arange(23), 0] = query_id[:, 0]
    found = rank_keys(queries, keys, query_id, key_id, top=6)
    similarity = queries @ keys.t()
    for i, row in enumerate(similarity.tolist()):
        right = [bool(set(query_id[i].tolist()) & set(ids) - {-1}) for ids in key_id.tolist()]
        best = max(value for value, is_right in zip(row, right, strict=True) if is_right)
        wrong = [value for value, is_right in zip(row, right, strict=True) if not is_right]
        assert found.rank[i] == 1 + sum(value >= best for value in wrong)
        assert found.right_score[i] == best
    assert torch.equal(found.scores, similarity.sort(dim=1, descending=True).values[:, :6])


def test_nan_embeddings_rank_last_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KEY_BLOCK", 2)
    nothing = torch.full((5, 3), torch.nan)
    for ids in (torch.arange(5), torch.arange(5)[:, None]):
        assert rank_keys(nothing, nothing, ids, ids).rank.tolist() == [5] * 5


def test_top_above_the_key_count_returns_all() -> None:
    found = rank_keys(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3), top=10)
    assert found.indices.sort(dim=1).values.tolist() == [[0, 1, 2]] * 3


class Largest(TorchFunctionMode):
    """Records the number of elements of the largest tensor that a torch function returns."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_full_similarity_matrix_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 16)
    monkeypatch.setattr(metrics, "KEY_BLOCK", 32)
    monkeypatch.setattr(metrics, "PAIRS_OF", 8)
    embeds, group = torch.randn(400, 2), torch.arange(400)
    with Largest() as largest:
        rank_keys(embeds, embeds, group, group, top=5)
        for several in (group[:, None].repeat(1, 2), torch.zeros(400, 2, dtype=torch.long)):  # few or all pairs
            rank_keys(embeds, embeds, several, several, top=5)
    assert 16 * 32 <= largest.elements <= 400 * 5


# --- the bootstrap of a difference ----------------------------------------------------------------------------------


def test_two_models_share_the_bootstrap_samples() -> None:
    image_of = {"text_to_image": torch.arange(40) // 2, "image_to_text": torch.arange(20)}
    generator = torch.Generator().manual_seed(0)
    rank_of = {name: torch.randint(1, 20, (len(rows),), generator=generator) for name, rows in image_of.items()}
    # The models differ in one image, so their difference varies little, though each recall varies much.
    other = {name: rank.clone() for name, rank in rank_of.items()}
    other["image_to_text"][3], rank_of["image_to_text"][3] = 99, 1
    ours = resampled_recalls(rank_of, image_of, 20)
    theirs = resampled_recalls(other, image_of, 20)
    assert torch.equal(ours, resampled_recalls(rank_of, image_of, 20))
    names = [f"t{k}" for k in (1, 5, 10)] + [f"i{k}" for k in (1, 5, 10)]
    spans = named_intervals(names, ours - theirs, None)
    assert list(spans) == names
    assert spans["t1"] == spans["t5"] == spans["t10"] == (0, 0)
    # In 95 % of samples of 20 the image is drawn 0 to 3 times, Binomial(20, 1/20), worth 5 points each.
    assert spans["i1"] == spans["i5"] == pytest.approx((0, 15))


# --- sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Three classes with 3, 2 and 2 pictures."""
    for name, colours in (("red_thing", ["red"] * 3), ("sky", ["blue"] * 2), ("wood", ["brown"] * 2)):
        (tmp_path / "things" / name).mkdir(parents=True)
        for i, colour in enumerate(colours):
            Image.new("RGB", (PIXELS + i, PIXELS), colour).save(tmp_path / "things" / name / f"{i}.png")
    (tmp_path / "things" / "wood" / "notes.md").write_text("not an image")
    return tmp_path / "things"


def test_class_folders_are_a_classification_set(class_folders: Path) -> None:
    data = load_eval_set(str(class_folders))
    assert (data.split, data.texts, data.at) == ("all", ["red thing", "sky", "wood"], (1,))
    assert data.image_ids[2:4] == ["red_thing/2.png", "sky/0.png"]
    assert data.image_group.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_class_folders_may_be_inside_split_folders(class_folders: Path) -> None:
    top = class_folders.with_name("split")
    for name in ("train", "val"):
        (top / name).mkdir(parents=True)
        for folder in class_folders.iterdir():
            (top / name / folder.name).symlink_to(folder)
    (top / "val" / "sky").unlink()
    assert load_eval_set(str(top), "train").texts == ["red thing", "sky", "wood"]
    assert (load_eval_set(str(top)).split, load_eval_set(str(top)).texts) == ("validation", ["red thing", "wood"])
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        load_eval_set(str(top), "test")


def test_all_images_of_all_splits_can_be_measured(class_folders: Path, captioned_folder: Path) -> None:
    def images(source: Path, split: str | None = None, **options: object) -> tuple[str, list[str]]:
        data = load_eval_set(str(source), split, **options)
        assert len(data.texts) == len(data.text_group) and len(data.images) == len(data.image_group)
        return data.split, data.image_ids

    everything = [f"{i}.png" for i in range(4)]
    assert images(captioned_folder, "all") == images(captioned_folder / "captions.csv", "all") == ("all", everything)
    assert load_eval_set(str(captioned_folder), "all").text_group.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    for split, names in {"test": "2.png\n1.png\n", "train": "0.png\n", "validation": "3.png\n"}.items():
        (captioned_folder / f"{split}.txt").write_text(names)
    assert images(captioned_folder, "all") == ("all", ["0.png", "3.png", "2.png", "1.png"])
    assert images(captioned_folder) == ("test", ["2.png", "1.png"])
    with pytest.raises(UsageError, match="must be between 0 and 1, not 1; --split all measures all images"):
        load_eval_set(str(captioned_folder), validation_fraction=1)
    assert len(images(class_folders, "all")[1]) == 7
    split = class_folders.with_name("split")
    for name, which in (("train", ("sky", "wood")), ("test", ("wood", "red_thing"))):
        (split / name).mkdir(parents=True)
        for folder in which:
            (split / name / folder).symlink_to(class_folders / folder)
    data = load_eval_set(str(split), "all")
    assert (data.split, data.texts) == ("all", ["red thing", "sky", "wood"])
    assert data.image_group.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2] and data.image_ids[0] == "test/red_thing/0.png"
    assert len(set(data.image_ids)) == 9


def test_images_of_a_group_show_the_same_thing(captioned_folder: Path) -> None:
    assert load_eval_set(str(captioned_folder), "all").subjects is None
    rows = "0.png,a,x\n1.png,b,\n2.png,c,y\n3.png,d,x\n"
    (captioned_folder / "captions.csv").write_text(f"image,caption,group\n{rows}")
    data = load_eval_set(str(captioned_folder), "all")
    assert data.subjects is not None
    assert data.subjects.unique(return_inverse=True)[1].tolist() == [1, 0, 2, 1]  # an image without one is alone
    reduced = data.without({1: "broken", 2: "broken"}).subjects
    assert reduced is not None and reduced.tolist() == data.subjects[[0, 3]].tolist()
    for split, names in {"train": "2.png\n", "validation": "1.png\n", "test": "3.png\n0.png\n"}.items():
        (captioned_folder / f"{split}.txt").write_text(names)
    chosen = load_eval_set(str(captioned_folder), "test").subjects
    assert chosen is not None and len(chosen) == 2 and chosen[0] == chosen[1]


def test_a_folder_with_only_a_test_split_is_measured(captioned_folder: Path) -> None:
    (captioned_folder / "captions.csv").rename(captioned_folder / "test.csv")
    for split in (None, "test", "all"):
        data = load_eval_set(str(captioned_folder), split)
        assert (data.split, len(data.image_ids)) == (split or "test", 4)


def test_a_set_in_shards_is_that_of_its_files(captioned_folder: Path) -> None:
    files = load_eval_set(str(captioned_folder), "all")
    members = [(name, (captioned_folder / "Images" / name).read_bytes()) for name in files.image_ids]
    for name, i in zip(files.image_ids, range(4), strict=True):
        texts = [files.texts[row] for row in (files.text_group == i).nonzero().flatten()]
        members.append((name.replace("png", "txt"), "\n".join(texts).encode()))
    write_tar(captioned_folder / "test-0.tar", members)
    shards = load_eval_set(str(captioned_folder / "*.tar"), "all")
    assert (shards.texts, shards.text_group.tolist()) == (files.texts, files.text_group.tolist())
    for i in range(4):
        assert shards.open(i).tobytes() == files.open(i).tobytes()


def test_class_names_can_come_from_a_file(class_folders: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"red_thing": "apple", "sky": "heaven", "wood": "tree", "more": "unused"}))
    assert load_eval_set(str(class_folders), class_names=words).texts == ["apple", "heaven", "tree"]
    words.write_text(json.dumps({"red_thing": "apple"}))
    with pytest.raises(DataError, match="2 folders have no name in it, the first is 'sky'"):
        load_eval_set(str(class_folders), class_names=words)


def test_bad_sets_are_rejected(class_folders: Path, captioned_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--split test, but its folders are red_thing, sky, wood"):
        load_eval_set(str(class_folders), "test")
    (class_folders / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        load_eval_set(str(class_folders))
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        load_eval_set(str(captioned_folder), "test")
    with pytest.raises(UsageError, match="is not a folder of class folders"):
        load_eval_set(str(captioned_folder), class_names="words.json")
    with pytest.raises(DataError, match="no captions found; expected .* at least two folders"):
        (tmp_path / "one" / "Images").mkdir(parents=True)
        load_eval_set(str(tmp_path / "one"))


# --- odd files ------------------------------------------------------------------------------------------------------


def test_files_that_are_no_pictures_are_passed_over(class_folders: Path) -> None:
    before = load_eval_set(str(class_folders)).image_ids
    for name in ("sky/._0.png", "sky/notes.pdf", "sky/.DS_Store", "wood/Thumbs.db", "__MACOSX/sky/._0.png"):
        (class_folders / name).parent.mkdir(parents=True, exist_ok=True)
        (class_folders / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    data = load_eval_set(str(class_folders))
    assert data.image_ids == before and data.texts == ["red thing", "sky", "wood"] and not data.skipped


@pytest.mark.parametrize("dataset", ["class_folders", "captioned_folder"])
def test_broken_picture_is_named_and_left_out(
    models: Path, request: pytest.FixtureRequest, tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(dataset)
    argv = ["eval", str(models / "mine"), str(folder), "--templates", "{}", "--json"]
    if dataset == "captioned_folder":
        for split, names in {"test": "0.png\n1.png\n", "train": "2.png\n", "validation": "3.png\n"}.items():
            (folder / f"{split}.txt").write_text(names)
    assert cli(argv) == 0
    whole = json.loads(capsys.readouterr().out)
    broken = folder / ("sky/zz.png" if dataset == "class_folders" else "Images/00.png")
    content = next(folder.rglob("*.png")).read_bytes()
    broken.write_bytes(content[:60])
    if dataset == "captioned_folder":
        with (folder / "captions.csv").open("a") as file:
            file.write("99,00.png,a broken picture\n")
        (folder / "test.txt").write_text("00.png\n0.png\n1.png\n")
    assert cli([*argv, "--output_dir", str(tmp_path / "out"), "--baseline", str(models / "clip")]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    name = "sky/zz.png" if dataset == "class_folders" else "00.png"
    assert report["metrics"] == whole["metrics"] and report["images"] == whole["images"]
    assert report["texts"] == whole["texts"] and list(report["skipped"]) == [name]
    assert f"1 of {whole['images'] + 1} images could not be read: {name}" in printed.err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    rows = pq.read_table(tmp_path / "out" / "queries.parquet").to_pylist()
    assert name not in {row["image_id"] for row in rows} and "a broken picture" not in {row["query"] for row in rows}


def test_set_of_broken_pictures_is_an_error(models: Path, class_folders: Path) -> None:
    for path in class_folders.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 7 images can be read; .*0.png"):
        evaluate_model(str(models / "mine"), load_eval_set(str(class_folders)), templates="{}")


def test_skipped_formats_and_folders_are_reported(
    class_folders: Path, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    (class_folders / "sky" / "c.nef").write_bytes(b"II*\0")
    (class_folders / "wood" / "deep").mkdir()
    unlistable(monkeypatch, class_folders / "wood" / "deep")
    data = load_eval_set(str(class_folders))
    assert list(data.skipped) == [str(class_folders / "sky" / "c.nef")]
    assert list(data.unlisted) == [str(class_folders / "wood" / "deep")]
    report = evaluate_model(str(models / "mine"), data, templates="{}")
    assert report["warning"].startswith("1 of 8 images could not be read") and "1 folder could" in report["warning"]
    unlistable(monkeypatch, class_folders / "sky")
    with pytest.raises(DataError, match="sky: cannot be read: Permission denied"):
        load_eval_set(str(class_folders))


def test_class_folders_take_names_that_are_not_utf8(models: Path, class_folders: Path, tmp_path: Path) -> None:
    (class_folders / "sky" / "0.png").rename(class_folders / "sky" / os.fsdecode(b"caf\xe9.png"))
    data = load_eval_set(str(class_folders))
    assert r"sky/caf\xe9.png" in data.image_ids
    evaluate_model(str(models / "mine"), data, output_dir=tmp_path / "out", templates="{}")
    (class_folders / "wood").rename(class_folders / os.fsdecode(b"b\xe4ume"))
    with pytest.raises(DataError, match=r"the class folder b\\xe4ume is not UTF-8; rename it"):
        load_eval_set(str(class_folders))
    (tmp_path / "names.json").write_text(json.dumps({r"b\xe4ume": "trees", "red_thing": "apple", "sky": "sky"}))
    assert "trees" in load_eval_set(str(class_folders), class_names=tmp_path / "names.json").texts


def test_linked_folders_in_a_class_are_read(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    Image.new("RGB", (PIXELS, PIXELS)).save(tmp_path / "more" / "x.png")
    (class_folders / "sky" / "album").symlink_to(tmp_path / "more")
    assert "sky/album/x.png" in load_eval_set(str(class_folders)).image_ids


# --- whole evaluations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine`, an export; `clip`, a CLIP of transformers; `text`, a text tower. All tiny, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    export(tiny_model(), tiny_processor(), folder / "mine")
    tiny_model().text_model.save_pretrained(folder / "text")
    tokenizer = tiny_processor().tokenizer
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12,
                     "eos_token_id": tokenizer.sep_token_id, "bos_token_id": 0, "pad_token_id": 0},
        vision_config={**tower, "image_size": PIXELS, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPProcessor(tiny_processor().image_processor, tokenizer).save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """Six pictures with captions and file names that contain markup."""
    folder = tmp_path / "hostile"
    (folder / "Images").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, colour in enumerate(("red", "green", "blue", "white", "gray", "pink")):
            name = f'<img src=x onerror="a()">{i}.png'
            Image.new("RGB", (40, 30 + i), colour).save(folder / "Images" / name)
            writer.writerows([[name, f"{HOSTILE} {colour} {CAPTIONS[i % 4][0]}"], [name, CAPTIONS[i % 4][1]]])
    (folder / "train.txt").write_text("".join(f'<img src=x onerror="a()">{i}.png\n' for i in range(6)))
    return folder


def test_metrics_match_the_package_and_queries_are_saved(models: Path, captioned_folder: Path, tmp_path: Path) -> None:
    data = load_eval_set(str(captioned_folder), "train")
    report = evaluate_model(str(models / "mine"), data, output_dir=tmp_path / "out")
    model = MiniClipModel.from_pretrained(models / "mine")
    images = encode_images(model, data.images, progress=False)
    texts = encode_texts(model, data.texts, progress=False)
    assert report["metrics"] == retrieval_metrics(images, texts, data.text_group)
    assert all(low <= report["metrics"][name] <= high for name, (low, high) in report["intervals"].items())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"] == report["metrics"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    rows = pq.read_table(tmp_path / "out" / "queries.parquet").to_pylist()
    assert len(rows) == len(data.texts) + len(data.image_ids)
    assert "shared" not in report and not {"baseline_rank", "shared_rank"} & set(rows[0])
    for direction in data.directions:
        ranks = [row["rank"] for row in rows if row["direction"] == direction]
        assert 100 * sum(rank == 1 for rank in ranks) / len(ranks) == pytest.approx(
            report["metrics"][f"{direction}_R@1"]
        )
    for row, text, owner in zip(rows, data.texts, data.text_group.tolist(), strict=False):
        scores = [result["score"] for result in row["results"]]
        assert (row["query"], row["image_id"]) == (text, data.image_ids[owner]) and row["right"] == row["image_id"]
        assert scores == sorted(scores, reverse=True)
        assert [result["answer"] == row["right"] for result in row["results"]] == [
            result["is_right"] for result in row["results"]
        ]
        assert row["rank"] > len(scores) or row["results"][row["rank"] - 1]["is_right"]


def test_transformers_clip_as_baseline(
    models: Path, captioned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, clip, out = str(models / "mine"), str(models / "clip"), tmp_path / "out"
    argv = [mine, str(captioned_folder), "--split", "train", "--baseline", clip, f"--output_dir={out}", "--json"]
    assert cli(["eval", *argv]) == 0
    report = json.loads(capsys.readouterr().out)
    data = load_eval_set(str(captioned_folder), "train")
    other, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip, **PIL_BACKEND)
    with torch.no_grad():
        pixels = processor(images=[data.open(i) for i in range(len(data.images))], return_tensors="pt")
        images = normalize(other.get_image_features(**pixels).pooler_output, dim=-1)
        words = processor(text=data.texts, return_tensors="pt", padding=True, truncation=True, max_length=12)
        texts = normalize(other.get_text_features(**words).pooler_output, dim=-1)
    expected = retrieval_metrics(images, texts, data.text_group)
    assert report["baseline_metrics"] == pytest.approx(expected)
    for name, value in report["difference"].items():
        assert value == pytest.approx(report["metrics"][name] - expected[name])
        low, high = report["difference_intervals"][name]
        assert low <= value <= high
    rows = pq.read_table(out / "queries.parquet").to_pylist()
    assert {row["baseline_rank"] for row in rows} <= set(range(1, 1 + len(data.texts)))
    found = [row["baseline_rank"] == 1 for row in rows if row["direction"] == "image_to_text"]
    assert 100 * sum(found) / len(found) == pytest.approx(expected["image_to_text_R@1"])
    table = format_report(report).splitlines()
    assert "difference" in table[1] and table[2].startswith("text to image R@1")


def test_model_does_not_differ_from_itself(models: Path, captioned_folder: Path) -> None:
    data = load_eval_set(str(captioned_folder), "train")
    report = evaluate_model(str(models / "clip"), data, baseline=str(models / "clip"))
    assert set(report["difference"].values()) == {0.0}
    assert set(report["difference_intervals"].values()) == {(0.0, 0.0)}


def test_classification_equals_zero_shot_accuracy(models: Path, class_folders: Path, tmp_path: Path) -> None:
    data = load_eval_set(str(class_folders))
    report = evaluate_model(str(models / "mine"), data, output_dir=tmp_path / "out", templates="photo")
    model = MiniClipModel.from_pretrained(models / "mine")
    labels = data.image_group.tolist()
    expected = zero_shot_accuracy(model, data.images, labels, data.texts, "photo", top_k=(1,), progress=False)
    assert report["metrics"] == expected and set(report["intervals"]) == {"top-1"}
    rows = pq.read_table(tmp_path / "out" / "queries.parquet").to_pylist()
    assert [row["right"] for row in rows] == [data.texts[label] for label in labels]
    assert [len(row["results"]) for row in rows] == [3] * 7


def test_failure_page_shows_failures_and_escapes_names(models: Path, hostile_folder: Path, tmp_path: Path) -> None:
    data = load_eval_set(str(hostile_folder), "train")
    report = evaluate_model(str(models / "mine"), data, output_dir=tmp_path / "out")
    reader = Reader((tmp_path / "out" / "failures.html").read_text(encoding="utf-8"))
    text = "".join(reader.texts)
    assert not of("script", reader) and reader.open == []
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in of("img", reader))  # type: ignore
    queries = pq.read_table(tmp_path / "out" / "queries.parquet").to_pylist()
    failed = [row for row in queries if row["shared_rank"] > 1]  # some of the captions are equal
    worst = max((row for row in failed if row["direction"] == "text_to_image"), key=lambda row: row["shared_rank"])
    assert worst["query"] in text and f"right, rank {worst['rank']}" in text
    assert HOSTILE in text and data.image_ids[0] in text
    assert f"{report['metrics']['rsum']:.1f}" in text
    rights = [figure for figure in of("figure", reader) if figure["class"] == "right"]
    assert len(rights) >= len(of("section", reader)) > 0  # each query is shown with its right answer


@pytest.mark.parametrize("absolute_paths", [False, True])
def test_pages_say_where_files_are_only_if_wanted(
    absolute_paths: bool, models: Path, hostile_folder: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = ["image,true_caption,false_caption"]
    for colour, other in (("black", "white"), ("white", "black")):  # the test needs two images
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
        rows.append(f"{colour}.png,a {colour} wall,a {other} wall")
    pairs.write_text("\n".join(rows) + "\n")
    data = load_eval_set(str(hostile_folder), "train")
    data = replace(data, image_ids=[str(hostile_folder / "Images" / name) for name in data.image_ids])
    mine = str(models / "mine")
    evaluate_model(
        mine, data, mine, tmp_path / "out", order_test=str(pairs), image_dir=tmp_path, absolute_paths=absolute_paths
    )
    for name in ("failures.html", "order_test.html"):
        page = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert (str(tmp_path) in page or str(models) in page) == absolute_paths, name
        assert "mine" in page and "hostile" in page
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["model"] == mine


# --- texts that belong to several images ----------------------------------------------------------------------------

# Similarities of three images (rows) and five texts, of images 0, 0, 1, 2 and 2.
SIMILARITY = torch.tensor([[0.9, 0.2, 0.6, 0.1, 0.4], [0.3, 0.8, 0.5, 0.4, 0.2], [0.0, 0.3, 0.1, 0.7, 0.1]])


@pytest.mark.parametrize(
    ("equal_captions", "groups", "marks", "texts", "by_text", "by_image"),
    [
        (False, None, {}, 0, [1, 3, 2, 1, 3], [1, 2, 1]),
        (True, None, {}, 2, [1, 3, 1, 1, 3], [1, 2, 1]),  # texts 0 and 2 belong to images 0 and 1
        (False, [7, 5, 5], {}, 3, [1, 3, 2, 1, 2], [1, 2, 1]),  # texts 2, 3 and 4 to images 1 and 2
        (True, [7, 5, 5], {}, 4, [1, 3, 1, 1, 2], [1, 2, 1]),  # but text 0 not to image 2
        (False, None, {0: "x", 2: "x"}, 4, [1, 2, 2, 1, 1], [1, 2, 1]),  # texts 0, 1, 3 and 4 to images 0 and 2
    ],
    ids=["none", "captions", "groups", "both", "bytes"],
)
def test_shared_texts_worked_by_hand(
    equal_captions: bool,
    groups: list[int] | None,
    marks: dict[int, str],
    texts: int,
    by_text: list[int],
    by_image: list[int],
) -> None:
    data = EvalSet(
        name="data",
        split="test",
        images=["0.png", "1.png", "2.png"],
        image_ids=["0.png", "1.png", "2.png"],
        texts=["a cat", "a dog", "A  cat." if equal_captions else "a bird", "a boat", "a ship"],
        image_group=torch.arange(3),
        text_group=torch.tensor([0, 0, 1, 2, 2]),
        directions=DIRECTIONS,
        at=(1,),
        subjects=None if groups is None else torch.tensor(groups),
    ).with_shared(marks)
    scores = score_model(torch.eye(5), SIMILARITY, data)
    usual = {name: ranking.rank.tolist() for name, ranking in scores.rankings.items()}
    assert usual == {"text_to_image": [1, 3, 2, 1, 3], "image_to_text": [1, 2, 1]}
    if not texts:
        assert data.shared is None and scores.shared is None
        return
    assert data.shared is not None and data.shared.texts == texts and scores.shared is not None
    found = {name: ranking.rank.tolist() for name, ranking in scores.shared.rankings.items()}
    assert found == {"text_to_image": by_text, "image_to_text": by_image}
    assert scores.shared.metrics["text_to_image_R@1"] == pytest.approx(20 * by_text.count(1))


def rank_in(results: list[dict[str, Any]], kinds: tuple[str, ...]) -> int:
    """Rank of the best right answer among all answers; those of some kinds are right."""
    best = max(result["score"] for result in results if any(result[kind] for kind in kinds))
    return 1 + sum(result["score"] >= best for result in results if not any(result[kind] for kind in kinds))


def test_shared_captions_are_reported_next_to_usual_recall(
    models: Path, captioned_folder: Path, tmp_path: Path
) -> None:
    with (captioned_folder / "captions.csv").open("a") as file:
        file.write("9,3.png,A red dog runs over the green grass.\n")
    mine, clip, out = str(models / "mine"), str(models / "clip"), tmp_path / "out"
    data = load_eval_set(str(captioned_folder), "all")
    report = evaluate_model(mine, data, baseline=clip, output_dir=out)
    shared = report["shared"]
    assert shared["texts"] == 2 and len(data.texts) == 10
    usual = evaluate_model(mine, load_eval_set(str(captioned_folder), "all"))
    assert usual["metrics"] == report["metrics"] and usual["shared"]["metrics"] == shared["metrics"]
    for name, value in shared["metrics"].items():
        assert value <= report["metrics"][name] if "median" in name else value >= report["metrics"][name]
    for name, value in shared["difference"].items():
        assert value == pytest.approx(shared["metrics"][name] - shared["baseline_metrics"][name])
        assert shared["difference_intervals"][name][0] <= value <= shared["difference_intervals"][name][1]
    rows = pq.read_table(out / "queries.parquet").to_pylist()
    for row in rows:  # each has all answers
        assert row["rank"] == rank_in(row["results"], ("is_right",))
        assert row["shared_rank"] == rank_in(row["results"], ("is_right", "is_shared"))
        assert row["baseline_shared_rank"] <= row["baseline_rank"]
    both = {"A red dog runs over the green grass.": "0.png", "a red dog runs over the green grass": "3.png"}
    found = {(row["query"], result["answer"]) for row in rows for result in row["results"] if result["is_shared"]}
    assert found == set(both.items()) | {(image, text) for text, image in both.items()}
    for direction in data.directions:
        first = [row["shared_rank"] == 1 for row in rows if row["direction"] == direction]
        assert shared["metrics"][f"{direction}_R@1"] == pytest.approx(100 * sum(first) / len(first))
    head, *lines = format_report(report).splitlines()[1:]
    names = [f"{name}{more}" for name in (mine, clip, "difference") for more in ("", ", shared")]
    assert all(name in head for name in names)
    assert any("2 of 10 texts belong to several images" in line for line in lines)
    page = (out / "failures.html").read_text(encoding="utf-8")
    assert "difference, shared" in page and "Shared: an image also counts as right" in page


def test_copies_of_an_image_share_their_captions(models: Path, captioned_folder: Path) -> None:
    pictures = captioned_folder / "Images"
    (pictures / "3.png").write_bytes((pictures / "0.png").read_bytes())
    report = evaluate_model(str(models / "mine"), load_eval_set(str(captioned_folder), "all"))
    assert report["shared"]["texts"] == 4  # those of both
    assert report["shared"]["metrics"]["rsum"] >= report["metrics"]["rsum"]


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["nowhere", "{data}"], "MODEL nowhere", 1),
        (["{models}", "{data}"], "this folder has no config.json", 1),
        (["open_clip:ViT-B-32", "{data}"], "expected open_clip:ARCHITECTURE/CHECKPOINT", 2),
        (["{mine}", "{data}", "--baseline", "{text}"], "does not embed images and texts", 1),
        (["{mine}", "{data}", "--output_dir", "{data}"], "there is already something else", 2),
        (["{mine}", "{data}", "--batch_size", "0"], "--batch_size must be at least 1", 2),
        (["{mine}", "nothing.csv"], "nothing.csv: no such file", 1),
    ],
)
def test_errors_are_one_line(
    argv: list[str], message: str, code: int, models: Path, captioned_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"models": models, "mine": models / "mine", "text": models / "text", "data": captioned_folder}
    assert cli(["eval", *(word.format(**names) for word in argv)]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_outside_images_are_evaluated_if_allowed(
    models: Path, captioned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (captioned_folder / "captions.csv").read_text().splitlines()
    images = [row["image"] for row in csv.DictReader(lines)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in set(images):
        (captioned_folder / "Images" / name).rename(elsewhere / name)
    with (tmp_path / "outside.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([str(elsewhere / row["image"]), row["caption"]] for row in csv.DictReader(lines))
    (tmp_path / "pictures").mkdir()
    argv = ["eval", str(models / "mine"), str(tmp_path / "outside.csv"), "--split=train", "--json",
            f"--image_dir={tmp_path / 'pictures'}", "--validation_fraction=0.2"]  # fmt: skip
    assert cli(argv) == 1
    assert "--allow_outside_images" in capsys.readouterr().err
    assert cli([*argv, "--allow_outside_images"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["rsum"] > 0


def test_old_results_are_replaced_but_not_other_files(models: Path, captioned_folder: Path, tmp_path: Path) -> None:
    data = load_eval_set(str(captioned_folder), "train")
    for _ in range(2):
        evaluate_model(str(models / "clip"), data, output_dir=tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="there is already something else"):
        evaluate_model(str(models / "clip"), data, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_long_texts_are_truncated_for_clip(models: Path) -> None:
    encoder = open_encoder(str(models / "clip"), "MODEL")
    embeds = encoder.encode_texts(["a dog " * 100, "a dog"], 2, False)
    assert embeds.shape == (2, 8) and embeds.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_first_dimensions_of_both_models_are_measured(tiny_export: Path, models: Path, captioned_folder: Path) -> None:
    data, clip = load_eval_set(str(captioned_folder), "all"), str(models / "clip")
    report = evaluate_model(str(tiny_export), data, baseline=clip, truncate_dim=3)
    assert report["truncate_dim"] == 3
    assert format_report(report).splitlines()[0].endswith(" texts, the first 3 dimensions")
    for name, source in (("metrics", str(tiny_export)), ("baseline_metrics", clip)):
        encoder = open_encoder(source, "MODEL")
        images = encoder.encode_images([data.open(i) for i in range(4)], 4, False)
        texts = encoder.encode_texts(data.texts, 16, False)
        short = [normalize(rows[:, :3], dim=-1) for rows in (images, texts)]
        assert report[name] == pytest.approx(retrieval_metrics(*short, data.text_group))
    with pytest.raises(UsageError, match="--baseline .*clip: --truncate_dim 9: expected a number from 1 to 8"):
        evaluate_model(str(tiny_export), data, baseline=clip, truncate_dim=9)
