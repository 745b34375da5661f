"""`miniclip app`: search an index in the browser by text, image or both, filter, and browse similar images.

The browser gets re-encoded copies, never files: paths of this machine and metadata of photographs (such as where they
were taken) stay private. The browser refers to an image by its position among the results. Thumbnails are made once
and kept while the page is served; those that nobody viewed for an hour are deleted.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path, PurePath
from threading import get_ident
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DataError, MiniClipError
from ...utils.files import replace_file
from ...utils.performance import one_thread, release_freed_memory
from ...utils.processes import usable_cpus
from ..filters import EntryFilter
from ..index import ImageIndex
from ..query import Query, embed_queries, load_checked
from .pictures import picture_of

RESULTS, NEIGHBOURS, EXAMPLES = 24, 12, 6
THUMBNAIL_PIXELS, LARGE_PIXELS = 320, 1600  # longer side in pixels
KEPT = 3600  # seconds that a thumbnail is kept after it was last shown
MAX_FOLDERS = 500  # entries of the drop-down list
MAX_UPLOAD = "20mb"
# Open pages whose results are kept, 0.1 MB each. An older page must search again before it can show an image.
MAX_SESSIONS = 500
# Example queries for an index without captions.
GENERAL_EXAMPLES = ("a dog", "people outdoors", "food on a table", "a building", "water and sky", "a child playing")

STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
#examples button { min-width: 0; flex: 0 1 auto; }
#status, #status textarea, #status input { padding: 0; border: 0; background: none; box-shadow: none;
  font-weight: 600; }
.pictures .grid-wrap { min-height: 0; max-height: none; padding: 2px; overflow: visible; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); grid-auto-rows: auto; }
.pictures button.thumbnail-item { height: auto; aspect-ratio: auto; }
.pictures button.thumbnail-item > img { height: auto; aspect-ratio: 1; }
.pictures button.thumbnail-item > .caption-label { position: static; max-width: none; padding: .35rem .5rem; border: 0;
  opacity: 1; white-space: normal; overflow-wrap: anywhere; }
.pictures button.thumbnail-item:focus-visible { outline: 3px solid #2b6cb0; outline-offset: 2px; }
"""
# Run in the browser when an image is chosen; it appears below all results.
SHOW_CHOSEN = "() => document.getElementById('chosen').scrollIntoView({behavior: 'smooth'})"

# A thumbnail file and the caption below it.
Thumbnail = tuple[Path, str]


class IndexPage:
    """What the page does, without its layout. Rows of the index never leave the server.

    Args:
        index: index to search.
        pictures: folder for thumbnails.
    """

    def __init__(self, index: ImageIndex, pictures: Path):
        self.index = index
        self.pictures = pictures
        self.threads = ThreadPoolExecutor(usable_cpus())
        # One thread, because torch keeps working memory for each thread that ever computed.
        self.embedder = ThreadPoolExecutor(1)
        self.load: Callable[..., Any] = lru_cache(maxsize=2)(load_checked)  # keeps both towers

    def search(
        self,
        words: str | None,
        picture: Image.Image | None,
        folder: str | None = None,
        since: str | None = None,
        until: str | None = None,
        caption: str | None = None,
        split: str | None = None,
    ) -> tuple[list[Thumbnail], list[int], str]:
        """Answer a query. Strings that are None or blank mean no condition.

        Args:
            words: text to search for.
            picture: image to search for.
            folder: folder that contains the images; this and the following conditions are those of [`EntryFilter`].
            since: earliest date of the images.
            until: latest date of the images.
            caption: words that the captions must contain.
            split: split of the images.

        Returns:
            Thumbnails of the images found, best first, their rows, and a status line, which may report an error.
        """
        given = [(value or "").strip() or None for value in (words, folder, since, until, caption, split)]
        if given[0] is None and picture is None:
            return [], [], "Nothing to search for: enter words, add an image, or both."
        try:
            query = Query(given[0], picture)
            chosen = EntryFilter(*given[1:])
            rows = chosen.rows(self.index.entries) if chosen else None
            if rows is not None and not len(rows):
                return [], [], "No image passes the filters."
            embedding = self.embedder.submit(self._embed, query).result()
            matches = self.index.search(embedding, RESULTS, rows)
            found = [(match.index, match.score) for match in matches]
            shown = self._thumbnails(found)
        except MiniClipError as error:
            return [], [], str(error)
        candidates = len(self.index) if rows is None else len(rows)
        return shown, [row for row, _ in found], f"Best {len(found)} of {candidates:,} images."

    def show(self, rows: list[int], place: int) -> tuple[Image.Image | None, str, list[Thumbnail], list[int]]:
        """Show one of the images found, with up to `LARGE_PIXELS` pixels, and similar images.

        Args:
            rows: rows of the images on the page.
            place: position among them; it comes from the browser.

        Returns:
            The image, a text about it, thumbnails of similar images, and their rows.
        """
        if not 0 <= place < len(rows):
            return None, "", [], []
        row = rows[place]
        entry = self.index.entry(row)
        near = self.index.search(np.asarray(self.index.embeddings[row]), NEIGHBOURS + 1)
        others = [(match.index, match.score) for match in near if match.index != row][:NEIGHBOURS]
        facts = [
            *entry["captions"],
            *([f"{entry['date']:%Y-%m-%d %H:%M}"] if entry["date"] else []),
            *([f"{entry['width']} x {entry['height']} pixels"] if entry["width"] else []),
            entry["id"] if entry["path"] else _name(entry),
        ]
        return (
            picture_of(self.index, row, LARGE_PIXELS),
            "\n".join(facts),
            self._thumbnails(others),
            [row for row, _ in others],
        )

    def thumbnail_file(self, row: int) -> Path:
        """Thumbnail file of an image. It is blank for an unreadable image, so that the others keep their places."""
        path = self.pictures / f"{row}.jpg"
        try:
            os.utime(path)  # marks it as recently shown
        except FileNotFoundError:
            picture = picture_of(self.index, row, THUMBNAIL_PIXELS) or Image.new(
                "RGB", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), "#cbd5e0"
            )
            fresh = path.with_suffix(f".{get_ident()}")
            picture.save(fresh, "JPEG", quality=82)
            replace_file(fresh, path)
        return path

    def _embed(self, query: Query) -> np.ndarray:
        """`[dim]` embedding of a query."""
        with one_thread():  # with many users there are many small computations at once
            embedding: np.ndarray = embed_queries(self.index, [query], load=self.load)[0]
        release_freed_memory()  # otherwise each of the server's threads keeps some
        return embedding

    def _thumbnails(self, found: list[tuple[int, float]]) -> list[Thumbnail]:
        files = self.threads.map(self.thumbnail_file, [row for row, _ in found])
        captions = (f"{score:.3f}  {_name(self.index.entry(row))}" for row, score in found)
        return list(zip(files, captions, strict=True))

    def folders(self) -> list[str]:
        """Folders and other sources of the images, in alphabetical order, at most `MAX_FOLDERS`."""
        parents = {os.path.dirname(name) for name in self.index.entries["id"].to_pylist()}
        return sorted(parents - {""})[:MAX_FOLDERS]

    def splits(self) -> list[str]:
        """Splits of the images."""
        return sorted(name for name in self.index.entries["split"].unique().to_pylist() if name)

    def captions(self) -> list[str]:
        """First caption of each image that has captions."""
        return [several[0] for several in self.index.entries["captions"].to_pylist() if several]

    def examples(self) -> list[str]:
        """Example queries: captions from all over the index."""
        captions = self.captions()
        if not captions:
            return list(GENERAL_EXAMPLES)
        step = max(1, len(captions) // EXAMPLES)
        return list(dict.fromkeys(captions[::step]))[:EXAMPLES]


def _name(entry: dict[str, Any]) -> str:
    return PurePath(entry["id"]).name


def build_page(index: ImageIndex, title: str = "Search my images") -> Any:
    """Build the page as `gradio.Blocks`. Launch it with [`launch_options`].

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
    served = gr.utils.get_upload_folder()
    os.makedirs(served, exist_ok=True)
    # Otherwise gradio computes statistics with pandas after each event, in any of the server's threads, and each of
    # these threads then keeps some of Arrow's memory.
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(sys.maxsize))
    page = IndexPage(index, Path(tempfile.mkdtemp(prefix="miniclip-", dir=served)))
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.HTML(f"<h1>{escape(title)}</h1>")
        words, picture, examples, filters = _question(gr, page)
        button = gr.Button("Search", variant="primary", elem_id="search")
        status = gr.Textbox(f"{len(index):,} images. Search by words, by image, or both.", label="Result",
                            show_label=False, container=False, interactive=False, elem_id="status")  # fmt: skip
        with gr.Column(visible=False) as answer:
            results = _gallery(gr, "Images found", "results")
        with gr.Column(visible=False, elem_id="chosen") as chosen:
            with gr.Row():
                image = gr.Image(label="Chosen image", interactive=False, elem_id="image", buttons=["fullscreen"],
                                 scale=2)  # fmt: skip
                facts = gr.Textbox(label="About this image", interactive=False, lines=2, elem_id="facts", scale=1)
            gr.HTML("<h3>Similar images</h3>")
            neighbours = _gallery(gr, "Similar images", "neighbours")
        rows, near_rows = gr.State([]), gr.State([])

        def search(*given: Any) -> tuple[Any, ...]:
            shown, found, sentence = page.search(*given)
            return shown, found, sentence, gr.update(visible=bool(shown)), gr.update(visible=False)

        def show(places: list[int], event: Any) -> tuple[Any, ...]:
            return (*page.show(places, event.index), gr.update(visible=True))

        show.__annotations__["event"] = gr.SelectData  # makes gradio pass what was clicked

        private: dict[str, Any] = {"api_visibility": "private"}
        asked = {"fn": search, "inputs": [words, picture, *filters], **private,
                 "outputs": [results, rows, status, answer, chosen]}  # fmt: skip
        entered = [field.input if isinstance(field, gr.Dropdown) else field.submit for field in filters]
        gr.on([button.click, words.submit, picture.upload, *entered], **asked)
        for example in examples:
            example.click(lambda text: text, example, words, **private).then(**asked)
        for gallery, places in ((results, rows), (neighbours, near_rows)):
            found = gallery.select(show, places, [image, facts, neighbours, near_rows, chosen], **private)
            found.then(None, js=SHOW_CHOSEN, **private)
    return blocks


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
    useful = {"Folder": len(folders) > 1, "date": dated, "caption": bool(page.captions()), "Split": bool(splits)}
    with gr.Accordion("Filters", open=False, visible=any(useful.values())), gr.Row():
        filters = [
            gr.Dropdown(["", *folders], value="", label="Folder", filterable=True, visible=useful["Folder"]),
            gr.Textbox(label="From date", placeholder="2024-07", visible=useful["date"]),
            gr.Textbox(label="To date", placeholder="2024-07-14", visible=useful["date"]),
            gr.Textbox(label="Caption contains", visible=useful["caption"]),
            gr.Dropdown(["", *splits], value="", label="Split", visible=useful["Split"]),
        ]
    return words, picture, examples, filters


def _gallery(gr: Any, label: str, elem_id: str) -> Any:
    return gr.Gallery(
        label=label, show_label=False, elem_id=elem_id, elem_classes="pictures", height="auto", allow_preview=False,
        interactive=False, buttons=[], object_fit="contain",
    )  # fmt: skip


def launch_options() -> dict[str, Any]:
    """Arguments for `launch` of a page of [`build_page`]."""
    gr = _gradio()
    # System fonts, so that none is downloaded.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {
        "theme": gr.themes.Default(primary_hue="blue", **fonts),
        "css": STYLE,
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


def _check_gradio_is_installed() -> None:
    if find_spec("gradio") is None:
        raise MiniClipError("the search page needs gradio: pip install 'miniclip[app]'")


def _gradio() -> Any:
    _check_gradio_is_installed()
    import gradio

    return gradio
