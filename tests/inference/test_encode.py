"""Tests of encoding and search with a trained model."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, PreTrainedModel

from modeling_miniclip import (
    DataError,
    MiniClipConfig,
    MiniClipModel,
    MiniClipProcessor,
    UsageError,
    encode_images,
    encode_texts,
    export,
    find_matches,
    load_captions,
)
from modeling_miniclip.inference.encode import _pixel_values, open_image, truncate_embeddings
from modeling_miniclip.inference.loading import load_tower, processor_of
from modeling_miniclip.search.exact import Match
from tests.helpers.hubs import local_hub, run
from tests.helpers.runs import ROOT
from tests.helpers.towers import CAPTIONS, tiny_model, tiny_processor

TEXTS = [text for captions in CAPTIONS for text in captions]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (36 + i, 40, 3), dtype=np.uint8) for i in range(7)]


@pytest.fixture(scope="module")
def files(arrays, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(arrays))]


@pytest.fixture(scope="module")
def embeddings(model, processor, files):
    return encode_images(model, files, processor, progress=False)


# --- encode ---------------------------------------------------------------------------------------------------------


def test_embeddings_equal_the_models_in_input_order(model, processor, arrays, embeddings):
    with torch.no_grad():
        own = [model(**processor(images=Image.fromarray(a), return_tensors="pt")).image_embeds[0] for a in arrays]
        texts = [model(**processor(text=text, return_tensors="pt")).text_embeds[0] for text in TEXTS]
    assert embeddings.shape == (7, 16) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, torch.stack(own), atol=1e-5, rtol=0)
    found = encode_texts(model, TEXTS, processor, progress=False)
    torch.testing.assert_close(found, torch.stack(texts), atol=1e-5, rtol=0)
    for rows in (embeddings, found):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


@pytest.mark.parametrize(
    "form",
    [
        lambda files, arrays: files,
        lambda files, arrays: [str(file) for file in files],
        lambda files, arrays: (file for file in files),
        lambda files, arrays: map(Image.open, files),
        lambda files, arrays: tuple(Image.open(file).convert("RGBA") for file in files),
        lambda files, arrays: arrays,
        lambda files, arrays: [torch.from_numpy(array) for array in arrays],
        lambda files, arrays: [{"image": Image.open(file), "captions": ["x"]} for file in files],
    ],
    ids=["paths", "strings", "generator", "map_of_pil", "rgba", "arrays", "tensors", "rows"],
)
def test_images_come_as_any_iterable_of_any_kind(model, processor, files, arrays, embeddings, form):
    found = encode_images(model, form(files, arrays), processor, batch_size=3, progress=False)
    torch.testing.assert_close(found, embeddings, atol=1e-5, rtol=0)


def test_dataset_split_can_be_encoded(model, processor, captioned_folder, capfd):
    split = load_captions(captioned_folder, validation_fraction=0.25)["train"]
    paths = [captioned_folder / "Images" / name for name in split["image_id"]]
    found = encode_images(model, split, processor)
    torch.testing.assert_close(found, encode_images(model, paths, processor, progress=False), atol=1e-5, rtol=0)
    assert "3/3" in capfd.readouterr().err  # its length is known to the progress bar


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"do_rescale": False}, {"do_resize": False}])
def test_images_are_prepared_as_the_processor_does(arrays, settings):
    processor = tiny_processor()
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    images = [Image.fromarray(array) for array in arrays]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(_pixel_values(images, processor, torch.device("cpu")), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing(model, processor, files, embeddings, batch_size):
    found = encode_images(model, files, processor, batch_size, progress=False)
    torch.testing.assert_close(found, embeddings, atol=1e-5, rtol=0)
    texts = encode_texts(model, TEXTS, processor, batch_size, progress=False)
    torch.testing.assert_close(texts, encode_texts(model, TEXTS, processor, 4, progress=False), atol=1e-5, rtol=0)


def test_grey_and_transparent_pictures_are_read(tmp_path):
    grey = np.full((5, 6), 77, dtype=np.uint8)
    for image in (grey, grey[:, :, None], Image.fromarray(grey), {"image": grey}):
        assert open_image(image).mode == "RGB" and open_image(image).getpixel((0, 0)) == (77, 77, 77)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_encoding_restores_the_mode_of_every_module(processor, files):
    model = tiny_model(projection_depth=2, projection_dropout=0.5)
    model.train()
    model.vision_model.eval()  # as with frozen batch norm statistics
    before = {name: module.training for name, module in model.named_modules()}
    first = encode_images(model, files, processor, progress=False)
    assert torch.equal(first, encode_images(model, files, processor, progress=False))  # no dropout
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(DataError):
        encode_images(model, [*files, "no.png"], processor, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_embeddings_have_no_graph_but_allow_training(embeddings):
    assert not embeddings.requires_grad and not embeddings.is_inference()
    weight = torch.ones(16, requires_grad=True)
    (embeddings * weight).sum().backward()
    torch.testing.assert_close(weight.grad, embeddings.sum(dim=0))


def test_a_model_in_half_precision_gives_float32(processor, files, embeddings):
    found = encode_images(tiny_model().to(torch.bfloat16), files[:2], processor, progress=False)
    assert found.dtype == torch.float32 and found.shape == (2, 16)


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_on_request(model, processor, capfd, progress):
    encode_texts(model, iter(TEXTS), processor, batch_size=2, progress=progress)
    assert ("encode texts" in capfd.readouterr().err) is progress


def test_images_are_read_when_their_batch_is_due(model, processor, files):
    opened = []

    def reader():
        for file in files:
            opened.append(file)
            yield file if len(opened) < 5 else "no.png"

    with pytest.raises(DataError, match="no.png"):
        encode_images(model, reader(), processor, batch_size=2, progress=False)
    assert len(opened) == 6  # the third batch has the bad one, the last image was not asked for


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "no images"),
        ("a.png", ValueError, "in a list"),
        (Path("a.png"), ValueError, "in a list"),
        (Image.new("RGB", (9, 9)), ValueError, "in a list"),
        (["no.png"], DataError, "no.png"),
        ([np.zeros((9, 9, 2), np.uint8)], DataError, r"\(9, 9, 2\).*\[H, W, C\]"),
        ([np.full((9, 9, 3), 256, np.int64)], DataError, r"int64 with values 256\.\.256: expected 0\.\.255"),
        ([np.full((9, 9, 3), np.nan, np.float16)], DataError, "float16 with values nan"),
        ([torch.rand(3, 9, 9)], DataError, "torch.float32 with values up to 0.9.*multiply them by 255"),
        ([{"picture": 1}], DataError, "'image'.*picture"),
        ([5], DataError, "expected a path"),
    ],
)
def test_wrong_images_raise(model, processor, images, error, message):
    with pytest.raises(error, match=message):
        encode_images(model, images, processor, progress=False)


def test_broken_and_huge_files_are_named(model, processor, tmp_path, files, monkeypatch):
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:80])
    with pytest.raises(DataError, match="cut.png"):
        encode_images(model, [tmp_path / "cut.png"], processor, progress=False)
    with pytest.raises(DataError, match="cut.png"):
        encode_images(model, [Image.open(tmp_path / "cut.png")], processor, progress=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many as a bomb
    with pytest.raises(DataError, match="0.png.*bomb"):
        encode_images(model, files, processor, progress=False)


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), ("a dog", "in a list")])
def test_wrong_texts_raise(model, processor, texts, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(model, texts, processor, progress=False)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_wrong_batch_size_raises(model, processor, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        encode_texts(model, TEXTS, processor, batch_size, progress=False)


# --- truncate_dim ---------------------------------------------------------------------------------------------------


def test_first_dimensions_are_normalised_again():
    embeddings = torch.tensor([[0.6, 0.0, 0.8], [0.48, 0.64, 0.6]])
    assert truncate_embeddings(embeddings, 2).tolist() == [pytest.approx([1, 0]), pytest.approx([0.6, 0.8])]
    assert truncate_embeddings(embeddings, 1).tolist() == [pytest.approx([1]), pytest.approx([1])]
    assert truncate_embeddings(embeddings, 3) is embeddings and truncate_embeddings(embeddings, None) is embeddings
    assert truncate_embeddings(embeddings.half(), 2).dtype == torch.float32


def test_truncated_images_and_texts_match_the_full_ones(model, processor, files, embeddings):
    images = encode_images(model, files, processor, progress=False, truncate_dim=5)
    assert images.shape == (7, 5)
    torch.testing.assert_close(images, embeddings[:, :5] / embeddings[:, :5].norm(dim=1, keepdim=True))
    texts = encode_texts(model, TEXTS, processor, progress=False)
    short = encode_texts(model, TEXTS, processor, progress=False, truncate_dim=5)
    torch.testing.assert_close(short, texts[:, :5] / texts[:, :5].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dim", [0, -1, 17])
def test_wrong_truncate_dim_is_found_before_any_image_is_read(model, processor, dim):
    with pytest.raises(UsageError, match=f"truncate_dim {dim}: expected a number from 1 to 16"):
        encode_images(model, ["nowhere.png"], processor, progress=False, truncate_dim=dim)
    with pytest.raises(UsageError, match=f"truncate_dim {dim}: expected a number from 1 to 16"):
        encode_texts(model, TEXTS, processor, progress=False, truncate_dim=dim)


def test_matches_by_the_first_dimensions(model, processor, files, embeddings):
    short = encode_images(model, files, processor, progress=False, truncate_dim=3)
    text = encode_texts(model, TEXTS[:1], processor, progress=False, truncate_dim=3)[0]
    cosine = (short @ text).tolist()
    for images in (short, embeddings):  # cut already, or still to cut
        found = find_matches(model, images, TEXTS[0], files, processor=processor, truncate_dim=3)
        assert [match.index for match in found] == sorted(range(7), key=lambda i: -cosine[i])
        assert [match.score for match in found] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)
    with pytest.raises(ValueError, match="3-dimensional, the query's 16-dimensional: .*the same truncate_dim"):
        find_matches(model, short, TEXTS[0], files, processor=processor)


# --- find_matches ---------------------------------------------------------------------------------------------------


def test_matches_are_sorted_by_cosine(model, processor, files, embeddings):
    found = find_matches(model, 3 * embeddings, query=TEXTS[0], image_filenames=files, n=4, processor=processor)
    text = encode_texts(model, [TEXTS[0]], processor, progress=False)[0].double().numpy()
    cosine = embeddings.double().numpy() @ text
    assert [match.index for match in found] == np.argsort(-cosine)[:4].tolist()
    assert [match.name for match in found] == [os.fspath(files[match.index]) for match in found]
    assert [match.score for match in found] == pytest.approx(sorted(cosine)[::-1][:4], abs=1e-5)


@pytest.mark.parametrize("form", [lambda file: file, Image.open, lambda file: np.asarray(Image.open(file))])
def test_an_image_finds_itself_first(model, processor, files, embeddings, form):
    for i in (0, 4):
        best = find_matches(model, embeddings, form(files[i]), files, n=1, processor=processor)
        assert best == [Match(os.fspath(files[i]), pytest.approx(1.0, abs=1e-5), i)]


def test_duplicate_image_is_listed_once(model, processor, embeddings):
    names = ["a", "b", "a", "c", "b", "a", "c"]  # as in a table with a row per caption
    found = find_matches(model, embeddings, TEXTS[1], names, n=9, processor=processor)
    text = encode_texts(model, [TEXTS[1]], processor, progress=False)[0]
    scores = embeddings @ text
    best = {name: max(scores[i].item() for i in range(7) if names[i] == name) for name in "abc"}
    assert {m.name: m.score for m in found} == pytest.approx(best, abs=1e-5)
    assert [m.name for m in found] == sorted(best, key=lambda name: -best[name])
    assert all(names[m.index] == m.name for m in found)
    assert find_matches(model, embeddings, TEXTS[1], names, n=2, processor=processor) == found[:2]


def test_names_and_embeddings_may_be_arrays(model, processor, embeddings, files):
    names = np.array([file.name for file in files])
    found = find_matches(model, embeddings.numpy(), TEXTS[2], names, processor=processor)
    assert len(found) == 7 and found == find_matches(model, embeddings, TEXTS[2], list(names), processor=processor)


def test_the_grid_of_matches_is_drawn(model, processor, embeddings, files, tmp_path):
    found = find_matches(model, embeddings, TEXTS[0], files, 5, processor, draw=tmp_path / "grid.png")
    assert len(found) == 5
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG" and grid.width > 600 and grid.height > 400
    find_matches(model, embeddings, files[0], files, 1, processor, draw=str(tmp_path / "one.png"))
    with pytest.raises(DataError, match="nowhere"):
        find_matches(model, embeddings, "x", [f"nowhere/{i}" for i in range(7)], 5, processor, draw=tmp_path / "x.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_filenames": ["a"]}, r"\(7, 16\).* 1 image_filenames"),
        ({"n": 0}, "n must be"),
        ({"image_embeddings": torch.ones(7, 5)}, "5-dimensional.*16"),
        ({"image_embeddings": torch.ones(7)}, r"\(7,\)"),
        ({"query": Path("no.png")}, "no.png"),
    ],
)
def test_wrong_search_arguments_raise(model, processor, embeddings, arguments, message):
    given = {"image_embeddings": embeddings, "query": "x", "image_filenames": list("abcdefg"), "processor": processor}
    with pytest.raises(ValueError, match=message):
        find_matches(model, **(given | arguments))


# --- the processor that belongs to a model --------------------------------------------------------------------------


def processor_with(mean: float):
    processor = tiny_processor()
    processor.image_processor.image_mean = [mean] * 3
    return processor


def test_an_export_brings_its_processor(files, tmp_path):
    own = processor_with(0.25)
    model = MiniClipModel.from_pretrained(export(tiny_model(), own, tmp_path / "export"))
    assert processor_of(model).image_processor.image_mean == pytest.approx((0.25, 0.25, 0.25))
    found = encode_images(model, files, progress=False)
    assert torch.equal(found, encode_images(model, files, own, progress=False))
    assert not torch.allclose(found, encode_images(model, files, tiny_processor(), progress=False), atol=1e-4)
    assert torch.equal(encode_texts(model, TEXTS, progress=False), encode_texts(model, TEXTS, own, progress=False))
    assert find_matches(model, found, files[2], files, n=1)[0].index == 2


def test_unknown_processor_error_asks_for_one(model, files, tmp_path):
    with pytest.raises(ValueError, match="pass processor="):
        encode_images(model, files, progress=False)
    with pytest.raises(ValueError, match="pass processor="):
        find_matches(model, torch.ones(1, 16), "a dog", ["a"])
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare.*pass processor="):
        encode_texts(MiniClipModel.from_pretrained(tmp_path / "bare"), TEXTS, progress=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A folder of three models, two of them in subfolders, each with another mean in its processor. Read-only."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    for mean, name in ((0.1, "."), (0.2, "large"), (0.3, "small/first")):
        export(tiny_model(), processor_with(mean), folder / name)
    return folder


def mean_of(model) -> float:
    return processor_of(model).image_processor.image_mean[0]


@pytest.mark.parametrize("auto_class", [MiniClipModel, AutoModel])
def test_model_of_a_subfolder_gets_its_own_processor(repository, files, auto_class):
    found = {
        name: mean_of(auto_class.from_pretrained(repository, subfolder=name)) for name in ("", "large", "small/first")
    }
    assert found == {"": 0.1, "large": 0.2, "small/first": 0.3}
    model = auto_class.from_pretrained(repository, subfolder="large")
    own = MiniClipProcessor.from_pretrained(repository, subfolder="large")
    assert torch.equal(encode_images(model, files, progress=False), encode_images(model, files, own, progress=False))
    assert load_tower(repository / "large", "text")[0].loaded_from and mean_of(copy.deepcopy(model)) == 0.2


def test_processor_is_never_that_of_another_model(repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    model = MiniClipModel.from_pretrained("clip", subfolder="large")
    export(tiny_model(), processor_with(0.9), tmp_path / "there" / "clip" / "large")
    monkeypatch.chdir(tmp_path / "there")
    assert mean_of(model) == 0.2
    (tmp_path / "here").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="here/clip/large, the folder of this model, has moved: pass processor="):
        mean_of(model)
    built = MiniClipModel(MiniClipConfig.from_pretrained(repository))
    with pytest.raises(ValueError, match="not loaded with from_pretrained.*pass processor="):
        mean_of(built)


def test_processor_is_loaded_with_the_arguments_of_its_model(repository, monkeypatch):
    asked, answer = [], (tiny_model(), {"missing_keys": set()})
    for loader in (PreTrainedModel, MiniClipProcessor):
        monkeypatch.setattr(
            loader, "from_pretrained", classmethod(lambda cls, *args, **kw: asked.append(kw) or answer)
        )
    where = {"token": "hf_secret", "local_files_only": True, "cache_dir": "cache", "subfolder": "large"}
    model = MiniClipModel.from_pretrained("user/clip", revision="v2", **where)
    processor_of(model)
    assert asked[1] == {"pretrained_model_name_or_path": "user/clip", "revision": "v2", **where}
    assert (
        b"hf_secret" not in pickle.dumps(model)
        and pickle.loads(pickle.dumps(model)).loaded_from["cache_dir"] == "cache"
    )


REVISIONS = """
import json, sys
from huggingface_hub import HfApi
from modeling_miniclip import MiniClipModel, export
from modeling_miniclip.inference.loading import processor_of
from transformers import AutoModel
from tests.inference.test_encode import processor_with
from tests.helpers.towers import tiny_model
api, repo, folder = HfApi(), "test-user/clip", sys.argv[1]
other = str(export(tiny_model(), processor_with(0.7), folder + "-other"))
api.create_repo(repo)
def push(mean):
    export(tiny_model(), processor_with(mean), folder)
    return api.upload_folder(folder_path=folder, repo_id=repo, commit_message=str(mean)).oid
first = push(0.1)
unpinned = MiniClipModel.from_pretrained(repo)
push(0.2)
second = api.upload_folder(folder_path=other, repo_id=repo, path_in_repo="large").oid
api.create_tag(repo, tag="v2", revision=second)
push(0.3)
def mean(model):
    return processor_of(model).image_processor.image_mean[0]
found = {
    "commit": mean(MiniClipModel.from_pretrained(repo, revision=first)),
    "tag": mean(MiniClipModel.from_pretrained(repo, revision="v2")),
    "main": mean(MiniClipModel.from_pretrained(repo)),
    "main_before_two_pushes": mean(unpinned),
    "auto": mean(AutoModel.from_pretrained(repo, revision=first)),
    "subfolder": mean(AutoModel.from_pretrained(repo, subfolder="large", revision=second)),
    "with_info": mean(MiniClipModel.from_pretrained(repo, revision=first, output_loading_info=True)[0]),
}
print("FOUND", json.dumps(found))
"""


def test_processor_has_the_revision_of_its_model(tmp_path):
    with local_hub(tmp_path / "server", tokens=("hf_test=test-user",)) as hub:
        env = {**hub.client_env(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = run(REVISIONS, tmp_path, str(tmp_path / "export"), **env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.partition("FOUND ")[2]) == {
        "commit": 0.1, "tag": 0.2, "main": 0.3, "main_before_two_pushes": 0.1, "auto": 0.1, "with_info": 0.1,
        "subfolder": 0.7,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*left out 91 images")
def test_real_photographs_are_found_by_search(shared):
    splits = load_captions(shared / "flickr8k")
    rows = splits["validation"].select(range(4))
    model, processor = tiny_model(), tiny_processor()
    names = [str(shared / "flickr8k" / "Images" / name) for name in rows["image_id"]]
    embeddings = encode_images(model, names, processor, progress=False)
    torch.testing.assert_close(embeddings, encode_images(model, rows, processor, progress=False), atol=1e-5, rtol=0)
    assert find_matches(model, embeddings, Path(names[3]), names, n=1, processor=processor)[0].name == names[3]
