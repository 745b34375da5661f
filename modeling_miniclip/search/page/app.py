"""`miniclip app`: search an index in the browser by text, image or both, filter, and browse similar images.

The browser gets re-encoded copies, never files: metadata of photographs (such as where they were taken) stays private.
The page names images by their paths on this machine, to which alone it is served; the index of a Space has none. The
browser refers to an image by its position among the results. Thumbnails are made once and kept while the page is
served; those that nobody viewed for an hour are deleted.
"""

import os
import sys
import tempfile
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import DataError, MiniClipError
from ..index import ImageIndex
from .index_page import IndexPage, Thumbnail
from .thumbnail_route import FOLDER, ROUTE, ThumbnailRoute

KEPT = 3600  # seconds that a thumbnail is kept after it was last shown
MAX_UPLOAD = "20mb"
# Open pages whose results are kept, 0.1 MB each. An older page must search again before it can show an image.
MAX_SESSIONS = 500
AT_ONCE = 4  # searches that are answered at the same time; more would only wait for each other
STATUS_EVERY = 10.0  # seconds between messages to those who wait; gradio's default is one to each after each answer

STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
#examples button { min-width: 0; flex: 0 1 auto; }
.gradio-container .html-container { padding: 0; }
#status p { font-weight: 600; overflow-wrap: anywhere; }
.pictures .grid-wrap { min-height: 0; max-height: none; padding: 2px; overflow: visible; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); grid-auto-rows: auto; }
.pictures button.thumbnail-item { height: auto; aspect-ratio: auto; }
.pictures button.thumbnail-item > img { height: auto; aspect-ratio: 1; }
.pictures button.thumbnail-item > .caption-label { position: static; max-width: none; padding: .35rem .5rem; border: 0;
  opacity: 1; white-space: normal; overflow-wrap: anywhere; color: var(--body-text-color); background: none; }
.pictures button.thumbnail-item:focus-visible, #more:focus-visible { outline: 3px solid var(--color-accent);
  outline-offset: 2px; }
#chosen { scroll-margin-top: 8px; }
@media (max-width: 480px) {
  .gradio-container > .main { padding: 12px !important; }
  .pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
  #image { max-height: 60vh; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto !important; } }
"""
# Run in the browser when an image is chosen, which appears below all results: the keyboard goes on from there.
SHOW_CHOSEN = """() => {
  document.getElementById('chosen').scrollIntoView({behavior: 'smooth'});
  document.querySelector('#more')?.focus({preventScroll: true});
}"""
# Run when the results are replaced from below.
SHOW_RESULTS = """() => {
  document.getElementById('status').scrollIntoView({behavior: 'smooth'});
  document.querySelector('#results button.thumbnail-item')?.focus({preventScroll: true});
}"""


def build_page(index: ImageIndex, title: str = "Search my images") -> Any:
    """Build the page as `gradio.Blocks`, and load the model. Launch it with [`launch_options`].

    Args:
        index: index to search.
        title: heading of the page.

    Raises:
        DataError: the index is empty.
        MiniClipError: gradio is not installed.
    """
    gr = _gradio()
    if not len(index):
        raise DataError(f"{index.folder}: this index has no images; add some: miniclip index MODEL SOURCE -o INDEX")
    served = _served(gr)
    # Otherwise gradio computes statistics with pandas after each event, in any of the server's threads, and each of
    # these threads then keeps some of Arrow's memory.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(sys.maxsize))
    page = IndexPage(index, Path(tempfile.mkdtemp(prefix=FOLDER, dir=served)))
    page.warm_up()
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.HTML(f"<h1>{escape(title)}</h1>", padding=False)
        words, picture, examples, filters = _question(gr, page)
        button = gr.Button("Search", variant="primary", elem_id="search")
        status = gr.HTML(_sentence(f"{len(index):,} images."), padding=False, elem_id="status")
        with gr.Column(visible=False) as answer:
            results = _gallery(gr, "Images found", "results")
        with gr.Column(visible=False, elem_id="chosen") as chosen:
            with gr.Row():
                image = gr.Image(label="Chosen image", interactive=False, elem_id="image", buttons=["fullscreen"],
                                 scale=2)  # fmt: skip
                with gr.Column(scale=1):
                    facts = gr.Textbox(label="About this image", interactive=False, lines=2, elem_id="facts")
                    more = gr.Button("More like this", elem_id="more")
            gr.HTML("<h3>Similar images</h3>", padding=False)
            neighbours = _gallery(gr, "Similar images", "neighbours")
        found = {"results": results, "status": status, "answer": answer, "chosen": chosen}
        shown = {"image": image, "facts": facts, "neighbours": neighbours, "chosen": chosen}
        _connect_searches(gr, blocks, page, button, (words, picture, examples, filters), more, found, shown)
    blocks.queue(status_update_rate=STATUS_EVERY, default_concurrency_limit=AT_ONCE)
    return blocks


def _connect_searches(
    gr: Any,
    blocks: Any,
    page: IndexPage,
    button: Any,
    question: tuple[Any, Any, list[Any], list[Any]],
    more: Any,
    found: dict[str, Any],
    shown: dict[str, Any],
) -> None:
    """Connect what visitors do with the functions of the page.

    Args:
        gr, blocks, page: gradio, the layout and what it does.
        button: starts a search.
        question: what [`_question`] returns.
        more: searches for more images like the chosen one.
        found: components of the answer to a search.
        shown: components of the chosen image.
    """
    words, picture, examples, filters = question
    rows, near_rows, picked = gr.State([]), gr.State([]), gr.State(None)
    private: dict[str, Any] = {"api_visibility": "private"}
    answers = [found["results"], rows, found["status"], found["answer"], found["chosen"]]

    def answer(pictures: list[Any], places: list[int], sentence: str) -> tuple[Any, ...]:
        return pictures, places, _sentence(sentence), gr.update(visible=bool(pictures)), gr.update(visible=False)

    def search(*given: Any) -> tuple[Any, ...]:
        return answer(*page.search(*given))

    def show(places: list[int], event: Any) -> tuple[Any, ...]:
        row = places[event.index] if 0 <= event.index < len(places) else None
        return (*page.show(places, event.index), row, gr.update(visible=True))

    show.__annotations__["event"] = gr.SelectData  # makes gradio pass what was clicked

    blocks.load(lambda: answer(*page.sample()), None, answers, **private)
    asked = {"fn": search, "inputs": [words, picture, *filters], "outputs": answers, **private}
    entered = [field.submit if isinstance(field, gr.Textbox) else field.input for field in filters]
    gr.on([button.click, words.submit, picture.upload, *entered], **asked)
    for example in examples:
        example.click(lambda text: text, example, words, **private).then(**asked)
    more.click(lambda row: answer(*page.more_like(row)), picked, answers, **private).then(
        None, js=SHOW_RESULTS, **private
    )
    outputs = [shown["image"], shown["facts"], shown["neighbours"], near_rows, picked, shown["chosen"]]
    for gallery, places in ((found["results"], rows), (shown["neighbours"], near_rows)):
        gallery.select(show, places, outputs, **private).then(None, js=SHOW_CHOSEN, **private)


def _question(gr: Any, page: IndexPage) -> tuple[Any, Any, list[Any], list[Any]]:
    """Build the inputs: text, image, buttons with examples, and filters in the order of `IndexPage.search`."""
    with gr.Row():
        with gr.Column(scale=3):
            words = gr.Textbox(label="Words", placeholder="two dogs playing in the snow", autofocus=True)
            with gr.Row(elem_id="examples"):
                examples = [gr.Button(text, size="sm", variant="secondary") for text in page.examples()]
        picture = gr.Image(
            label="Image", type="pil", image_mode=None, sources=["upload", "clipboard"], height=180, scale=1
        )
    folders, splits = page.folders(), page.splits()
    dated = page.index.entries["date"].null_count < len(page.index)
    useful = {"Folder": len(folders) > 1, "date": dated, "caption": bool(page.captions()), "Split": bool(splits),
              "fitting": page.index.unrelated is not None}  # fmt: skip
    with gr.Accordion("Filters", open=False, visible=any(useful.values())):
        with gr.Row():
            filters = [
                gr.Dropdown(["", *folders], value="", label="Folder", filterable=True, visible=useful["Folder"]),
                gr.Textbox(label="From date", placeholder="2024-07", visible=useful["date"]),
                gr.Textbox(label="To date", placeholder="2024-07-14", visible=useful["date"]),
                gr.Textbox(label="Caption contains", visible=useful["caption"]),
                gr.Dropdown(["", *splits], value="", label="Split", visible=useful["Split"]),
            ]
        fitting = gr.Checkbox(False, label="Hide what fits no better than unrelated captions", elem_id="fitting",
                              visible=useful["fitting"])  # fmt: skip
        filters.append(fitting)
    return words, picture, examples, filters


def _sentence(text: str) -> str:
    """A status line as HTML, which screen readers read when it changes."""
    return f'<p role="status">{escape(text)}</p>'


def _gallery(gr: Any, label: str, elem_id: str) -> Any:
    gallery = gr.Gallery(
        label=label, show_label=False, elem_id=elem_id, elem_classes="pictures", height="auto", allow_preview=False,
        interactive=False, buttons=[], object_fit="contain",
    )  # fmt: skip
    gallery.postprocess = partial(_answer, gallery)
    return gallery


def _answer(gallery: Any, value: list[Thumbnail] | None) -> list[dict[str, Any]]:
    """What a browser gets of a gallery: thumbnails that the page has made, by their URLs and captions.

    gradio's own function resolves several paths for each of them, to find out whether it may serve the file.
    """
    shown = [(path.as_posix(), caption) for path, caption in value or ()]
    gallery.temp_files.update(path for path, _ in shown)  # which gradio deletes when they are old
    # Relative, for a page that a proxy serves below another path.
    return [{"image": {"path": path, "url": ROUTE[1:] + quote(path)}, "caption": caption} for path, caption in shown]


def launch_options() -> dict[str, Any]:
    """Arguments for `launch` of a page of [`build_page`]."""
    gr = _gradio()
    from starlette.middleware import Middleware

    # System fonts, so that none is downloaded.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {
        "theme": gr.themes.Default(primary_hue="blue", **fonts),
        "css": STYLE,
        "app_kwargs": {"middleware": [Middleware(ThumbnailRoute, served=_served(gr))]},
        "max_file_size": MAX_UPLOAD,
        "state_session_capacity": MAX_SESSIONS,
        "allowed_paths": [],
        "footer_links": [],
        "enable_monitoring": False,
        "ssr_mode": False,
        "share": False,
    }


def run_app(folder: str | os.PathLike, port: int | None = None, open_browser: bool = False) -> None:
    """Serve the page on loopback, to this machine only, until it is interrupted.

    Args:
        folder: folder of the index.
        port: port of the page; by default the first free one from 7860.
        open_browser: whether to open the page in the browser.

    Raises:
        DataError: there is no index, or it cannot be read.
        MiniClipError: gradio is not installed, or the port is taken.
    """
    _check_gradio_is_installed()
    index = ImageIndex.open(folder, verify=True)
    with tempfile.TemporaryDirectory(prefix="miniclip-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # otherwise files of other apps on this machine could be requested
        blocks = build_page(index, f"Search {Path(folder).resolve().name}")
        try:
            blocks.launch(
                server_name="127.0.0.1",
                server_port=port,
                inbrowser=open_browser,
                quiet=True,
                prevent_thread_lock=True,
                **launch_options(),
            )
        except OSError as error:
            raise MiniClipError(f"--port {port}: {error}; choose another port, or leave --port out") from error
        print(f"{len(index):,} images: {blocks.local_url}  (stop with Ctrl-C)", flush=True)
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)


def _served(gr: Any) -> str:
    """Folder of files that gradio gives to browsers."""
    served: str = gr.utils.get_upload_folder()
    os.makedirs(served, exist_ok=True)
    return served


def _check_gradio_is_installed() -> None:
    if find_spec("gradio") is None:
        raise MiniClipError("the search page needs gradio: pip install gradio")


def _gradio() -> Any:
    _check_gradio_is_installed()
    import gradio

    return gradio
