"""The order test: pairs of captions, who wins, intervals, files of benchmarks, and the report."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_miniclip.cli import cli
from modeling_miniclip.errors import DataError
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import evaluate_model
from modeling_miniclip.evaluation.order_pairs import OrderPairs, read_pairs, swapped_pairs
from modeling_miniclip.evaluation.order_test import PairScores, order_report, score_pairs, write_pairs


class TableEncoder:
    """Embeds texts by a table, and images as they are."""

    def __init__(self, texts: dict[str, list[float]]):
        self.texts = texts

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> torch.Tensor:
        return torch.tensor([self.texts[text] for text in texts])

    def encode_images(self, images: Any, batch_size: int, progress: bool) -> torch.Tensor:
        return torch.stack([torch.tensor(image.getpixel((0, 0))).float() for image in images])


def test_wins_by_hand() -> None:
    nan = float("nan")
    scores = PairScores(
        right=torch.tensor([[0.9, 0.1], [0.2, 0.2], [0.1, 0.3], [nan, 0.1], [0.5, 0.4]]),
        wrong=torch.tensor([[0.1, 0.9], [0.3, 0.1], [0.1, 0.3], [0.4, nan], [0.5, 0.5]]),
    )
    assert scores.wins().tolist() == [[1, 0], [0.5, 1], [0, 0], [0, 0], [1, 0.5]]
    pairs = OrderPairs("test", ["a", "b", "c"])
    for image, kind in ((0, "nouns"), (0, "nouns"), (1, "relations"), (2, "nouns"), (2, "relations")):
        pairs.add(image, "true", "false", kind)
    kinds = order_report(pairs, scores)["kinds"]
    assert list(kinds) == ["nouns", "relations", "all"]
    assert [kinds["nouns"][name] for name in ("pairs", "right_image", "wrong_image", "difference")] == [
        3, 50, pytest.approx(100 / 3), pytest.approx(50 / 3)]  # fmt: skip
    assert [kinds["all"][name] for name in ("pairs", "right_image", "wrong_image")] == [5, 50, 30]
    # Of four drawings of two images, one has only the first and one only the second: 0 %, 50 % twice, 100 %.
    assert kinds["relations"]["intervals"]["right_image"] == [0, 100]


def test_model_that_prefers_fluent_text_wins_both() -> None:
    """Three models: one that reads order, one that likes true texts always, one that ignores order."""
    count, generator = 400, torch.Generator().manual_seed(0)
    pairs = OrderPairs("test", [None] * count)
    for i in range(count):
        pairs.add(i, f"true {i}", f"false {i}", "nouns")
    images = torch.randn(count, 8, generator=generator)
    noise = torch.randn(count, 8, generator=generator)
    reads = {f"true {i}": images[i].tolist() for i in range(count)} | {
        f"false {i}": noise[i].tolist() for i in range(count)
    }
    images_with_bias = torch.cat([images, torch.ones(count, 1)], dim=1)
    fluent = {f"{kind} {i}": [0.0] * 8 + [float(kind == "true")] for i in range(count) for kind in ("true", "false")}
    bag = {f"{kind} {i}": noise[i].tolist() for i in range(count) for kind in ("true", "false")}
    found = []
    for texts, embeds in ((reads, images), (fluent, images_with_bias), (bag, images)):
        scores = score_pairs(TableEncoder(texts), pairs, embeds)
        figures = order_report(pairs, scores)["kinds"]["nouns"]
        found.append((figures["right_image"], figures["wrong_image"]))
        low, high = figures["intervals"]["difference"]
        assert low <= figures["difference"] <= high
    assert found[0][0] > 98 and 40 < found[0][1] < 60
    assert found[1:] == [(100, 100), (50, 50)]


def test_other_image_is_never_the_own_one() -> None:
    pairs = OrderPairs("test", [None, None])
    for i in range(40):
        pairs.add(i % 2, "true", "false", "nouns")
    scores = score_pairs(TableEncoder({"true": [1, 0], "false": [0, 1]}), pairs, torch.eye(2))
    assert scores.right.tolist() == [[1, 0], [0, 1]] * 20
    assert scores.wrong.tolist() == [[0, 1], [1, 0]] * 20


BOXES = "image,caption,negative_caption,bbox_x,bbox_y,bbox_w,bbox_h\n"  # header of a file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of one colour each, 4 x 4, the second with a white right half."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", (1, 0, 0)), ("b.png", (0, 1, 0))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "images" / name)
    with Image.open(tmp_path / "images" / "b.png") as image:
        image.paste((255, 255, 255), (2, 0, 4, 4))
        image.save(tmp_path / "images" / "b.png")
    return tmp_path


def pairs_of(pairs: OrderPairs) -> list[tuple[str, str, str, str]]:
    names = [pairs.names[image] for image in pairs.image]
    return list(zip(names, pairs.true, pairs.false, pairs.kind, strict=True))


def test_layouts_of_benchmarks(pictures: Path) -> None:
    sugar = {"0": {"filename": "a.png", "caption": "a cat on a mat", "negative_caption": "a mat on a cat"},
             "7": {"filename": "b.png", "caption": "red", "negative_caption": "blue"}}  # fmt: skip
    (pictures / "swap_obj.json").write_text(json.dumps(sugar))
    assert pairs_of(read_pairs(pictures / "swap_obj.json")) == [
        ("a.png", "a cat on a mat", "a mat on a cat", "pairs"), ("b.png", "red", "blue", "pairs")]  # fmt: skip

    aro = [{"image_path": "b.png", "bbox_x": 2, "bbox_y": 0, "bbox_w": 2, "bbox_h": 4, "relation_name": "on",
            "true_caption": "a cat on a mat", "false_caption": "a mat on a cat"}]  # fmt: skip
    (pictures / "visual_genome_relation.json").write_text(json.dumps(aro))
    pairs = read_pairs(pictures / "visual_genome_relation.json")
    assert pairs_of(pairs) == [("b.png", "a cat on a mat", "a mat on a cat", "on")]
    assert pairs.open(0).size == (2, 4) and pairs.open(0).getpixel((0, 0)) == (255, 255, 255)

    (pictures / "winoground.csv").write_text(
        'image_0,image_1,caption_0,caption_1,collapsed_tag\na.png,b.png,"grass, in a mug",a mug in grass,Object\n'
    )
    assert pairs_of(read_pairs(pictures / "winoground.csv")) == [
        ("a.png", "grass, in a mug", "a mug in grass", "Object"),
        ("b.png", "a mug in grass", "grass, in a mug", "Object"),
    ]

    (pictures / "mine.jsonl").write_text(
        '{"image": "a.png", "caption": "one", "negative_captions": ["two", "three"]}\n'
    )
    assert pairs_of(read_pairs(pictures / "mine.jsonl", pictures / "images")) == [
        ("a.png", "one", "two", "pairs"), ("a.png", "one", "three", "pairs")]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.png,x\n", r"pairs.csv, row 2.*expected an image .* a false one \(false_caption"),
        ("image,caption,negative_caption\nc.png,x,y\n", "row 2: image 'c.png' is not in .*--image_dir"),
        ("image,caption,negative_caption\na.png,,y\n", "row 2.*expected an image"),
        ("image,caption,negative_caption\n", "no pairs of captions"),
        ("[1, 2", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1, 2]", "row 1: expected an object with an image and its captions, found '1'"),
        ('{"image": "a.png", "caption": "x", "negative_caption": "y"}', "row 1: expected an object .* found 'a.png'"),
        ("image,caption,negative_caption\na.png,x,y, z\n", "row 2: more fields than the 3 of the header.*into quotes"),
        ("image,caption,negative_caption\na.png,x\n", "row 2: .*of which empty: negative_caption"),
        ("image,caption,negative_caption\na.png,x,X .\n", "row 2: the false caption 'X .' is the true one; del"),
        ("image,caption,negative_caption\na.png,x,\"['y'\"\n", "row 2: .*looks like a list.*expected a JSON list"),
        ("image_0,image_1,caption_0,caption_1\na.png,b.png,x,\n", "row 2: .*of which empty: caption_1"),
        ("image_0,image_1,caption_0,caption_1\na.png,b.png,x,x\n", "row 2: the false caption 'x' is the true one"),
        (f"{BOXES}a.png,x,y,1,1,0,1\n", "row 2: .*pixels in bbox_x"),
        (f"{BOXES}a.png,x,y,1,,2,1\n", "row 2: .*pixels in bbox_x"),
    ],
)
def test_bad_files_are_explained(pictures: Path, text: str, message: str) -> None:
    (pictures / "pairs.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(pictures / "pairs.csv")


@pytest.mark.parametrize("content", [b"image,caption,negative_caption\na.png,\xff,y\n", b"image\0,caption\na.png,x\n"])
def test_files_that_are_no_text_are_explained(pictures: Path, content: bytes) -> None:
    (pictures / "pairs.csv").write_bytes(content)
    with pytest.raises(DataError, match="pairs.csv"):
        read_pairs(pictures / "pairs.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(pictures)


def test_one_image_is_an_error_before_the_model_is_loaded(pictures: Path, captioned_folder: Path) -> None:
    (pictures / "pairs.csv").write_text("image,caption,negative_caption\na.png,x,y\na.png,x,z\n")
    data = load_eval_set(str(captioned_folder))
    with pytest.raises(DataError, match="pairs.*all pairs are of one; add pairs of other images"):
        evaluate_model("no model", data, order_test=pictures / "pairs.csv")


def test_written_pairs_name_the_same_images(tmp_path: Path) -> None:
    """Folders, and boxes of one image, are kept; images without a box are whole."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.png")
    (tmp_path / "pairs.csv").write_text(
        f"{BOXES}a/1.png,x,y,0,1,2,3\na/1.png,x,z,1,1,2,3\nb/1.png,v,w,,,,\na/1.png,x,u,0,1,2,3\n"
    )
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert pairs.image == [0, 1, 2, 0] and pairs.names == ["a/1.png", "a/1.png", "b/1.png"]
    scores = PairScores(torch.rand(4, 2), torch.rand(4, 2))
    write_pairs(tmp_path / "order_test.csv", pairs, scores)
    again = read_pairs(tmp_path / "order_test.csv")
    assert (again.images, again.image, again.false) == (pairs.images, pairs.image, pairs.false)
    whole = OrderPairs("whole", ["x.png", "y.png"], [1, 0], ["t"] * 2, ["f"] * 2, ["k"] * 2, names=["x.png", "y.png"])
    write_pairs(tmp_path / "whole.csv", whole, PairScores(torch.rand(2, 2), torch.rand(2, 2)))
    assert (tmp_path / "whole.csv").read_text().startswith("image,kind,true_caption,false_caption,true_score,")


def test_swapped_pairs_of_captions() -> None:
    captions = [["A red ball on a blue box .", "A ball"], ["a ball"], ["An old man chases a dog", "a man and a dog"]]
    pairs = swapped_pairs(captions, [None] * 3, "test")
    assert sorted(set(zip(pairs.image, pairs.kind, strict=True))) == [
        (0, "adjectives"), (0, "nouns"), (0, "relations"), (2, "nouns"), (2, "relations")]  # fmt: skip
    assert all(true in captions[image] for image, true in zip(pairs.image, pairs.true, strict=True))
    with pytest.raises(DataError, match="only 0 % of the captions are English.*--order_test FILE"):
        swapped_pairs([["Ein Hund auf der Wiese"]], [None], "test")
    with pytest.raises(DataError, match="no caption has two words"):
        swapped_pairs([["a ball"]], [None], "test")


def test_order_test_in_report_and_files(
    tiny_export: Path, captioned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (captioned_folder / "captions.csv").open("a") as file:
        for i in range(4):
            file.write(f"9{i},{i}.png,a small red ball on a large blue box\n")
    out, argv = tmp_path / "out", ["eval", str(tiny_export), str(captioned_folder), "--split", "all", "--order_test"]
    assert cli([*argv, "--baseline", str(tiny_export), "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "word order, swapped words" in printed and "A model that only prefers fluent captions wins both" in printed
    report = json.loads((out / "metrics.json").read_text())
    assert report["order_test"] == report["baseline_order_test"]
    assert report["order_test"]["kinds"]["adjectives"]["pairs"] == 4
    assert "a small blue ball on a large red box" in (out / "order_test.html").read_text()
    with (out / "order_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = torch.tensor([[float(row["true_score"]), float(row["false_score"])] for row in rows])
    wins = PairScores(scores, scores).wins()[:, 0]
    assert 100 * wins.mean().item() == pytest.approx(report["order_test"]["kinds"]["all"]["right_image"])
    again = [*argv, str(out / "order_test.csv"), "--image_dir", str(captioned_folder / "Images"), "--json"]
    assert cli(again) == 0
    kinds = json.loads(capsys.readouterr().out)["order_test"]["kinds"]
    for kind, figures in report["order_test"]["kinds"].items():
        assert (kinds[kind]["pairs"], kinds[kind]["right_image"]) == (figures["pairs"], figures["right_image"])
