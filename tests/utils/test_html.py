"""One-file pages: whatever text comes in stays text, images are inside the file, and nothing else is loaded."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from modeling_miniclip.utils.html import grid, heading, page, paragraph, section, table, thumbnail, tile
from modeling_miniclip.utils.thumbnails import THUMBNAIL

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;' onload='a"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Tags with their attributes, and the text of the page; tags must be closed in the right order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def of(tag: str, reader: Reader) -> list[dict[str, str | None]]:
    """Attributes of all elements of a kind."""
    return [attributes for name, attributes in reader.tags if name == tag]


@pytest.mark.parametrize(
    "made",
    [
        heading(HOSTILE, HOSTILE),
        paragraph(HOSTILE),
        section(HOSTILE, HOSTILE, ""),
        tile(HOSTILE, HOSTILE, image=HOSTILE),
        tile(HOSTILE, HOSTILE, text=HOSTILE, mark=HOSTILE),
        table([HOSTILE], [[HOSTILE]]),
        page(HOSTILE, "", HOSTILE),
    ],
    ids=["heading", "paragraph", "section", "image", "text", "table", "page"],
)
def test_hostile_text_stays_text(made: str) -> None:
    reader = Reader(made)
    assert not of("script", reader) and reader.open == []
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert HOSTILE in "".join(reader.texts)
    for image in of("img", reader):
        assert image["src"] == HOSTILE and image["alt"] == HOSTILE


def test_thumbnail_is_a_small_jpeg_without_metadata() -> None:
    image = Image.new("RGB", (600, 300), (200, 30, 40))
    image.info["comment"] = b"at home"
    address = thumbnail(image)
    head, _, data = address.partition(",")
    small = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == "data:image/jpeg;base64" and small.format == "JPEG"
    assert small.size == (THUMBNAIL, THUMBNAIL // 2) and image.size == (600, 300)
    assert max(abs(a - b) for a, b in zip(small.getpixel((9, 9)), (200, 30, 40), strict=True)) <= 3
    assert "comment" not in small.info and not small.getexif()


def test_a_page_shows_its_images_and_loads_nothing() -> None:
    address = thumbnail(Image.new("RGB", (8, 8), "blue"))
    reader = Reader(page("t", grid([tile("0.31", "a.jpg", address), tile("0.2", "b.jpg", address, mark="right")])))
    assert [image["src"] for image in of("img", reader)] == [address, address]
    assert [figure["class"] for figure in of("figure", reader)] == ["", "right"]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    policy = next(meta["content"] for meta in of("meta", reader) if meta.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:")
    assert reader.open == []
