"""`miniclip app` and `miniclip space`: answers of the page, also in a real browser, and what it must not serve."""

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeling_miniclip import MiniClipModel, encode_images, encode_texts
from modeling_miniclip.cli import cli
from modeling_miniclip.search import space
from modeling_miniclip.search.index import ImageIndex
from modeling_miniclip.search.page import app, index_page
from modeling_miniclip.search.page.app import build_page, launch_options
from modeling_miniclip.search.page.index_page import (
    LARGE_PIXELS,
    NEIGHBOURS,
    RESULTS,
    THUMBNAIL_PIXELS,
    IndexPage,
)
from modeling_miniclip.search.page.pictures import picture_of
from modeling_miniclip.search.page.thumbnail_route import ThumbnailRoute
from modeling_miniclip.search.unrelated import is_weak, percent
from modeling_miniclip.search.update import update_index
from tests.helpers.browsers import browser_page
from tests.helpers.indexes import write_pictures
from tests.helpers.runs import ROOT, environment

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="no gradio: pip install gradio")
NAMES = " ".join(f"{folder}/{i:02d}.png" for folder in ("sea", "town") for i in range(8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> Path:
    """17 `pictures` in two folders, one of them larger than the page shows, and their `pictures.index`."""
    folder = tmp_path_factory.mktemp("app")
    write_pictures(folder / "pictures", NAMES)
    noise = np.random.default_rng(9).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((2 * LARGE_PIXELS, LARGE_PIXELS))
    exif = large.getexif()
    exif[0x010E] = "taken at home"
    large.save(folder / "pictures" / "sea" / "large.jpg", exif=exif)
    (folder / "secret.txt").write_text("nobody may read this")
    update_index(folder / "pictures.index", [folder / "pictures"], tiny_export, progress=False)
    return folder


@pytest.fixture(scope="module")
def page(place: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexPage:
    """The page without its layout."""
    return IndexPage(ImageIndex.open(place / "pictures.index"), tmp_path_factory.mktemp("thumbnails"))


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> MiniClipModel:
    """The model that built the index."""
    return MiniClipModel.from_pretrained(tiny_export)


def nearest(place: Path, model: MiniClipModel, query: str | np.ndarray) -> list[str]:
    """Reference: names of all pictures, most similar first, for a text or an embedding."""
    paths = sorted((place / "pictures").rglob("*.*"))
    embedding = encode_texts(model, [query], progress=False)[0].numpy() if isinstance(query, str) else query
    scores = encode_images(model, paths, progress=False).numpy() @ embedding
    return [paths[i].name for i in np.argsort(-scores)]


def test_words_find_the_nearest_images(place: Path, page: IndexPage, model: MiniClipModel) -> None:
    shown, rows, status = page.search("a dog on the grass", None)
    names = [caption.split("  ")[1] for _, caption in shown]
    assert names == nearest(place, model, "a dog on the grass")
    assert [page.index.entry(row)["id"].rpartition("/")[2] for row in rows] == names
    assert status.startswith("Best 17 of 17 images.")
    for file, _ in shown:
        with Image.open(file) as image:
            assert image.mode == "RGB" and not image.getexif() and max(image.size) <= THUMBNAIL_PIXELS


def test_thumbnails_match_their_rows_and_are_reused(page: IndexPage, tmp_path: Path) -> None:
    shown, rows, _ = page.search("a dog on the grass", None)
    whole = {row: picture_of(page.index, row, THUMBNAIL_PIXELS) for row in rows}
    for (file, _), row in zip(shown, rows, strict=True):
        with Image.open(file) as image:
            pixels = np.asarray(image, dtype=int)
            alike = {r: np.asarray(w) for r, w in whole.items() if w is not None and w.size == image.size}
        assert min(alike, key=lambda r: np.abs(pixels - alike[r]).mean()) == row
    made = {file: file.stat().st_ino for file, _ in shown}
    os.utime(shown[0][0], (1, 1))
    assert {file: file.stat().st_ino for file, _ in page.search("a dog on the grass", None)[0]} == made
    assert shown[0][0].stat().st_mtime > 1  # otherwise it would be deleted as one that nobody viewed
    shown[0][0].unlink()
    page.search("a dog on the grass", None)
    assert shown[0][0].is_file()


def test_an_image_finds_itself_first(place: Path, page: IndexPage) -> None:
    shown, _, _ = page.search("", Image.open(place / "pictures" / "town" / "03.png"))
    assert shown[0][1].startswith("1.000  03.png")


def test_filters_exclude_other_images(place: Path, page: IndexPage) -> None:
    folder = str(place / "pictures" / "town")
    assert folder in page.folders()
    _, rows, status = page.search("a dog", None, folder=folder)
    assert {os.path.dirname(page.index.entry(row)["id"]) for row in rows} == {folder} and len(rows) == 8
    assert "of 8 images" in status
    assert page.search("a dog", None, until="1999") == ([], [], "No image passes the filters.")


@pytest.mark.parametrize(
    ("query", "message"),
    [({"words": " "}, "Nothing to search for"), ({"words": "a", "since": "soon"}, "is not a date")],
)
def test_unanswerable_queries_get_a_message(page: IndexPage, query: dict[str, str], message: str) -> None:
    shown, rows, status = page.search(**{"picture": None, **query})
    assert shown == [] and rows == [] and message in status


def test_chosen_image_is_shown_with_similar_ones(place: Path, page: IndexPage, model: MiniClipModel) -> None:
    _, rows, _ = page.search("a dog", None)
    large = next(i for i, row in enumerate(rows) if page.index.entry(row)["id"].endswith("large.jpg"))
    image, facts, shown, near = page.show(rows, large)
    assert (
        image is not None
        and image.size == (LARGE_PIXELS, LARGE_PIXELS // 2)
        and not image.info
        and not image.getexif()
    )
    assert str(place / "pictures" / "sea" / "large.jpg") in facts
    order = nearest(place, model, np.array(page.index.embeddings[rows[large]]))
    assert [caption.split("  ")[1] for _, caption in shown] == order[1 : NEIGHBOURS + 1]
    assert rows[large] not in near and len(near) == NEIGHBOURS


@pytest.mark.parametrize("wrong", [-1, 17, 10**9])
def test_only_shown_results_can_be_chosen(page: IndexPage, wrong: int) -> None:
    assert page.show(list(range(17)), wrong) == (None, "", [], [])


def test_missing_image_keeps_the_places_of_others(tmp_path: Path, tiny_export: Path) -> None:
    files = write_pictures(tmp_path / "pictures", "0.png 1.png 2.png")
    update_index(tmp_path / "index", [tmp_path / "pictures"], tiny_export, progress=False)
    files[1].unlink()
    shown, rows, _ = IndexPage(ImageIndex.open(tmp_path / "index"), tmp_path).search("a dog", None)
    assert len(shown) == len(rows) == 3


@needs_gradio
@pytest.mark.parametrize(
    ("command", "code"),
    [(["app", "{place}/nothing"], 1), (["space", "{export}", "{place}/pictures", "--images", "{place}"], 2)],
)
def test_bad_folders_give_one_line_errors(
    command: list[str], code: int, place: Path, tiny_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([word.format(place=place, export=tiny_export) for word in command]) == code
    assert re.fullmatch(r"error: .*(no index here|there is already something).*\n", capsys.readouterr().err)


def test_one_thread_embeds_for_all_visitors(page: IndexPage, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = np.ones(page.index.manifest.dim, dtype=np.float32)
    threads_used, all_ask = [], Barrier(4)

    def embed_queries(*_: Any, **__: Any) -> np.ndarray:
        threads_used.append(get_ident())
        return embedding[None]

    def ask(number: int) -> int:
        all_ask.wait(60)  # so that four threads ask at the same time
        return len(page.search(f"dog number {number}", None)[0])

    monkeypatch.setattr(index_page, "embed_queries", embed_queries)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(4))) == {17}
    assert len(threads_used) == 4 and len(set(threads_used)) == 1
    page.embed_words.cache_clear()  # the other tests use the same page


def test_words_are_embedded_once_and_pictures_each_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, asked = IndexPage(ImageIndex.open(place / "pictures.index"), tmp_path), []
    embed = index_page.embed_queries

    def embed_queries(index: ImageIndex, queries: Any, **options: Any) -> np.ndarray:
        asked.append(queries[0].words)
        return embed(index, queries, **options)

    monkeypatch.setattr(index_page, "embed_queries", embed_queries)
    picture = Image.open(place / "pictures" / "town" / "03.png")
    answers = [page.search("a dog", None), page.search(" a dog ", None, split=""), page.search("a dog", picture)]
    assert page.search("a dog", picture)[1] == answers[2][1]
    assert answers[0] == answers[1] and asked == ["a dog", "a dog", "a dog"]


def test_sample_shows_images_from_all_over_the_index(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = IndexPage(ImageIndex.open(place / "pictures.index"), tmp_path)
    shown, rows, status = page.sample()
    assert rows == list(range(17)) and status == "17 images."
    assert [caption for _, caption in shown] == [Path(name).name for name in page.index.entries["id"].to_pylist()]
    assert all(file.is_file() for file, _ in shown)
    monkeypatch.setattr(index_page, "RESULTS", 3)
    assert page.sample()[1:] == ([0, 8, 16], "17 images, here are 3 of them.")


def test_more_like_this_lists_the_nearest_images(place: Path, page: IndexPage, model: MiniClipModel) -> None:
    shown, rows, status = page.more_like(5)
    order = nearest(place, model, np.array(page.index.embeddings[5]))
    assert rows[0] == 5 and [caption.split("  ")[1] for _, caption in shown] == order[:RESULTS]
    assert status.startswith("Best 17 of 17 images, like ")
    assert page.more_like(None) == ([], [], "Choose an image first.")


def test_results_show_their_chance_and_hide_large_ones(page: IndexPage, model: MiniClipModel) -> None:
    query = encode_texts(model, ["a dog on the grass"], progress=False)[0].numpy()
    found = page.index.search(query, RESULTS, cutoff=1)
    shown, _, status = page.search("a dog on the grass", None)
    for (_, caption), match in zip(shown, found, strict=True):
        assert match.chance is not None
        mark = " ?" if is_weak(match.chance) else ""
        assert caption == f"{match.score:.3f}, {percent(match.chance)}{mark}  {Path(match.name).name}"
    assert status.endswith("how often an unrelated caption scores as high; ?: no better than that.")
    fitting = [match.index for match in found if not is_weak(match.chance)]
    assert page.search("a dog on the grass", None, only_fitting=True)[1] == fitting


@pytest.mark.parametrize(
    ("path", "is_answered"),
    [
        ("/gradio_api/file={served}/miniclip-a_1/7.jpg", True),
        ("/gradio_api/file={served}/miniclip-a_1/8.jpg", False),  # there is none
        ("/gradio_api/file={served}/miniclip-a_1/../secret.jpg", False),
        ("/gradio_api/file={served}/miniclip-a_1/secret.txt", False),
        ("/gradio_api/file={served}/other/7.jpg", False),
        ("/gradio_api/file=/elsewhere/miniclip-a_1/7.jpg", False),
        ("/gradio_api/file={served}/miniclip-a_1/7.jpg/", False),
        ("/file={served}/miniclip-a_1/7.jpg", False),
    ],
)
def test_fast_route_answers_for_thumbnails_only(path: str, is_answered: bool, tmp_path: Path) -> None:
    for name in ("miniclip-a_1/7.jpg", "miniclip-a_1/secret.txt", "other/7.jpg", "secret.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    passed, sent = [], []

    async def rest(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    route = ThumbnailRoute(rest, str(tmp_path))
    scope = {"type": "http", "method": "GET", "path": path.format(served=tmp_path)}
    asyncio.run(route(scope, None, send))
    assert bool(passed) != is_answered
    if is_answered:
        assert sent[0]["status"] == 200 and (b"content-type", b"image/jpeg") in sent[0]["headers"]
        assert sent[1]["body"] == b"content"
    asyncio.run(route({**scope, "method": "POST"}, None, send))
    assert passed


def import_gradio() -> None:
    """Import gradio without the half of its import that updates its type stubs from the sources of its classes."""

    def no_source(_: object) -> str:
        raise OSError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inspect, "getfile", no_source)
        import gradio  # noqa: F401


@needs_gradio
def test_memory_does_not_grow_with_visitors(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    import_gradio()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "of #1 %41"))
    monkeypatch.setattr(app, "MAX_SESSIONS", 3)
    blocks = build_page(ImageIndex.open(place / "pictures.index"))
    tables: list[Any] = []
    monkeypatch.setattr(pandas, "DataFrame", lambda records: tables.append(records))  # for gradio's statistics
    options = {**launch_options(), "quiet": True, "prevent_thread_lock": True}
    blocks.launch(server_name="127.0.0.1", **options)
    try:
        config = json.loads(status_and_content(f"{blocks.local_url}config")[1])
        for visitor in range(5):
            answer = ask_page(blocks.local_url.rstrip("/"), config, "a dog", None, f"visitor{visitor}")
            assert '"success":true' in answer and "17 of 17 images" in answer
        assert_thumbnails_are_served_and_deleted(blocks, answer)
        assert len(blocks.state_holder.session_data) == 3 and not tables
    finally:
        blocks.close(verbose=False)


def assert_thumbnails_are_served_and_deleted(blocks: Any, answer: str) -> None:
    """The pictures of an answer are at their URLs, relative to the page, and known to gradio as files to delete."""
    from gradio.route_utils import delete_files_created_by_app

    events = [json.loads(line.removeprefix("data:")) for line in answer.splitlines() if line.startswith("data:")]
    pictures = next(e for e in events if e["msg"] == "process_completed")["output"]["data"][0]
    assert len(pictures) == 17
    for picture in pictures:
        status, content = status_and_content(urllib.parse.urljoin(blocks.local_url, picture["image"]["url"]))
        assert status == 200 and content == Path(picture["image"]["path"]).read_bytes()
    delete_files_created_by_app(blocks, 3600)
    assert all(Path(picture["image"]["path"]).exists() for picture in pictures)
    delete_files_created_by_app(blocks, 0)
    assert not any(Path(picture["image"]["path"]).exists() for picture in pictures)


# --- the page itself ------------------------------------------------------------------------------------------------


@contextmanager
def served(argv: list[str], **options: Any) -> Iterator[str]:
    """Address of a page while the command that serves it runs."""
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        pytest.fail(f"the page ended with code {process.wait()}")
    finally:
        process.terminate()
        process.wait(60)


def status_and_content(url: str, data: bytes | None = None) -> tuple[int, bytes]:
    """Status code and content of the answer to a request."""
    headers = {"Content-Type": "application/json"} if data else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask_page(address: str, config: Any, words: str, picture: Any, session: str) -> str:
    """Answer of the page to a search, requested as a browser does."""
    search = next(d for d in config["dependencies"] if len(d["inputs"]) == 8)
    data = [words, picture, "", "", "", "", "", False]
    request = {"data": data, "fn_index": search["id"], "session_hash": session}
    status_and_content(f"{address}/gradio_api/queue/join?", json.dumps(request).encode())
    return status_and_content(f"{address}/gradio_api/queue/data?session_hash={session}")[1].decode()


@pytest.mark.slow
@needs_gradio
def test_page_answers_in_browser_and_serves_no_file(place: Path, tmp_path: Path, model: MiniClipModel) -> None:
    argv = ["-m", "modeling_miniclip", "app", str(place / "pictures.index")]
    with served(argv, env=environment(), cwd=ROOT) as address, browser_page() as page:
        page.goto(address)
        pictures = page.locator("#results button.thumbnail-item")
        pictures.nth(16).wait_for()  # a sample of the index, before anything is searched
        page.screenshot(path=str(tmp_path / "sample.png"), full_page=True)
        page.get_by_label("Words").fill("a dog on the grass")
        page.keyboard.press("Enter")  # with the keyboard only
        expected = nearest(place, model, "a dog on the grass")
        page.wait_for_function(FIRST_IS, arg=expected[0])
        assert "%" in pictures.first.inner_text()
        for width in (400, 360):
            page.set_viewport_size({"width": width, "height": 700})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width  # fits on a phone's screen
        pictures.first.focus()
        page.keyboard.press("Enter")
        page.locator("#neighbours button.thumbnail-item").first.wait_for()
        assert expected[0] in page.locator("#facts textarea").input_value()
        page.wait_for_function("() => document.getElementById('chosen').getBoundingClientRect().top < 100")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)
        page.wait_for_function("() => document.activeElement.id === 'more'")  # the keyboard goes on there
        page.keyboard.press("Enter")
        page.wait_for_function("() => !document.getElementById('chosen')?.checkVisibility()")
        page.wait_for_function(FIRST_IS, arg="1.000")
        assert expected[0] in pictures.first.inner_text()
        assert "like " + expected[0] in page.locator("#status").inner_text()
        assert_page_is_dark_if_wanted(page, address)
        page.screenshot(path=str(tmp_path / "dark.png"), full_page=True)
        assert_no_file_is_served(address, place)


# Whether the first picture that was found has a name.
FIRST_IS = "name => document.querySelector('#results button.thumbnail-item')?.innerText.includes(name)"
# Brightness of what is behind the text below the first picture, and of this text, from 0 to 255.
BRIGHTNESS = """() => ['backgroundColor', 'color'].map(key => {
  let element = document.querySelector('#results .caption-label'), colour = '';
  do { colour = getComputedStyle(element)[key]; element = element.parentElement; }
  while (element && colour.replaceAll(' ', '') === 'rgba(0,0,0,0)');
  return colour.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
})"""


def assert_page_is_dark_if_wanted(page: Any, address: str) -> None:
    """Open the page in both themes, as the system of the visitor asks for."""
    for scheme, is_dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        page.goto(address)
        page.locator("#results button.thumbnail-item").first.wait_for()
        ground, ink = page.evaluate(BRIGHTNESS)
        assert (ground < 80 and ink > 150) if is_dark else (ground > 200 and ink < 120), (scheme, ground, ink)


def assert_no_file_is_served(address: str, place: Path) -> None:
    """Request files by their paths, in several spellings, and as pictures that were not uploaded."""
    secret, photo = place / "secret.txt", place / "pictures" / "sea" / "large.jpg"
    climbing = "../" * 12
    for path in ("/etc/passwd", str(secret), str(photo), f"{climbing}etc/passwd", f"{climbing}{secret}"):
        for name in (path, urllib.parse.quote(path, safe=""), urllib.parse.quote(urllib.parse.quote(path, safe=""))):
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/"):
                status, content = status_and_content(f"{address}{route}{name}")
                assert b"root:" not in content and b"nobody may" not in content and photo.read_bytes() != content
                assert status != 200 or b"<html" in content.lower(), (route, name)
    config = json.loads(status_and_content(f"{address}/config")[1])
    for path in ("/etc/passwd", str(secret), str(photo)):
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        answer = ask_page(address, config, "", picture, "stranger")
        assert '"success":false' in answer.replace(" ", "") and "1.000" not in answer


@needs_gradio
def test_space_names_images_that_it_leaves_out(
    tmp_path: Path, tiny_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = write_pictures(tmp_path / "photos", "a.png b.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(first.read_bytes()[:100])
    monkeypatch.setattr(space, "picture_of", lambda index, row, pixels: Image.new("RGB", (9, 9)) if row else None)
    assert cli(["space", str(tiny_export), str(tmp_path / "space"), "--images", str(tmp_path / "photos")]) == 1
    printed = capsys.readouterr()
    assert f"{tmp_path / 'space'}: a Space with 1 images" in printed.out
    assert f"2 of 3 images could not be read: {first}, {tmp_path / 'photos' / 'broken.jpg'}; " in printed.err
    index = ImageIndex.open(tmp_path / "space" / "index")
    assert index.entries["id"].to_pylist() == ["b.png"] and index.unrelated is not None


@pytest.mark.slow
@needs_gradio
def test_space_runs_locally_and_holds_only_small_copies(
    place: Path, tmp_path: Path, tiny_export: Path, model: MiniClipModel
) -> None:
    folder = tmp_path / "space"
    assert cli(["space", str(tiny_export), str(folder), "--images", str(place / "pictures"), "--title", "Sea"]) == 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert str(place).encode() not in path.read_bytes(), path
    index = ImageIndex.open(folder / "index")
    assert len(index) == 17 and set(index.entries["path"].to_pylist()) == {None}
    head = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert {"sdk: gradio", "app_file: app.py", "title: Sea"} <= set(head.splitlines())
    assert re.search(r"^transformers==\d", (folder / "requirements.txt").read_text(), re.MULTILINE)
    moved = folder.rename(tmp_path / "elsewhere")
    env = {**environment(), "PYTHONPATH": ""}
    with served(["-u", "app.py"], env=env, cwd=moved) as address, browser_page() as page:
        page.goto(address)
        page.locator("#results button.thumbnail-item").first.wait_for()  # the sample
        page.locator("#examples button").first.click()
        page.wait_for_function("() => document.querySelector('#status').innerText.includes('Best')")
        words = page.get_by_label("Words").input_value()
        assert nearest(place, model, words)[0] in page.locator("#results button.thumbnail-item").first.inner_text()
