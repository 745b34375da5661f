"""The picture of queries and the images found for them."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_miniclip.utils.match_grid import LabelledImage, MatchRow, draw_matches, match_rows
from tests.helpers.pixels import has_color, picture
from tests.helpers.towers import with_slow

GREEN = (21, 128, 61)


@pytest.fixture(autouse=True)
def no_warning_of_matplotlib():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a legend without lines, a scale without positive values
        yield


def rows_of(count: int, found: int = 3, query: str = "a red disc", size=(64, 64), right: int = -1) -> list[MatchRow]:
    images = [Image.new("RGB", size, (40 * i, 90, 200)) for i in range(found)]
    return [
        MatchRow(query, "rank 1 of 9", [LabelledImage(im, "0.30", i == right) for i, im in enumerate(images)])
    ] * count


@pytest.fixture(scope="module")
def plain_shapes(tmp_path_factory) -> dict[int, tuple[int, ...]]:
    """Shapes of grids of one and of two rows with three images each and a short query."""
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    shapes = {}
    for count in (1, 2):
        draw_matches(path, rows_of(count, 3))
        shapes[count] = picture(path).shape
    return shapes


@pytest.mark.parametrize(("count", "found"), [(1, 1), (1, 9), (2, 7)])
def test_grids_of_every_shape_are_drawn(tmp_path, count, found):
    draw_matches(tmp_path / "grid.png", rows_of(count, found), "What was found")
    pixels = picture(tmp_path / "grid.png")
    assert all(has_color(pixels, (40 * i, 90, 200), 1000) for i in range(min(found, 6)))


QUERIES = {
    "dollars": "costs $\\frac$ of 5", "empty": "", "one word": "x" * 900, "lines": "two\nlines", "wide": "WWWW " * 60,
    "markup": "<b>a & b</b> {x} %d %%", "backslashes": "a_b^c \\alpha \\n", "long": "a long caption " * 90,
    "alphabets": "é ü ж Ω", "one dollar": "$",
}  # fmt: skip


@pytest.mark.parametrize("query", with_slow(list(QUERIES)[:5], list(QUERIES)[5:]))
def test_captions_are_drawn_literally_at_fixed_size(tmp_path, query, plain_shapes):
    query = QUERIES[query]
    for count, plain in plain_shapes.items():  # a query above the images, and queries next to theirs
        draw_matches(tmp_path / "grid.png", rows_of(count, 3, query), query)
        pixels = picture(tmp_path / "grid.png")
        assert pixels.shape[1] == plain[1] and pixels.shape[0] < plain[0] + 250
        assert (pixels[:, -15:] == 255).all()
        if count == 2:  # the text stays in its column: between it and the images is nothing
            assert ((pixels[-400:, :335] < 250).any() or not query) and (pixels[-400:, 335:345] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (1600, 1200), (300, 200)])
def test_tiny_huge_and_narrow_images_fit_their_tile(tmp_path, size, plain_shapes):
    draw_matches(tmp_path / "grid.png", rows_of(2, size=size))
    assert picture(tmp_path / "grid.png").shape == plain_shapes[2]
    # As large as a tile in its longer side, the other side in proportion.
    where = np.argwhere((picture(tmp_path / "grid.png") == (40, 90, 200)).all(axis=2))
    found = (where.max(axis=0) - where.min(axis=0) + 1)[1]  # in both rows, so the width alone
    assert found == pytest.approx(174 * size[0] / max(size), abs=4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_every_mode_are_drawn(tmp_path, mode):
    row = MatchRow("x", "", [LabelledImage(Image.new(mode, (20, 20)), "0.1", False)])
    draw_matches(tmp_path / "grid.png", [row, row])
    picture(tmp_path / "grid.png")


def test_only_the_right_image_is_framed_green(tmp_path):
    draw_matches(tmp_path / "right.png", rows_of(2, 3, right=1))
    draw_matches(tmp_path / "none.png", rows_of(2, 3))
    right, none = picture(tmp_path / "right.png"), picture(tmp_path / "none.png")
    green = (right == GREEN).all(axis=2)
    assert not has_color(none, GREEN, 1)
    columns = np.flatnonzero(green[:, 360:].sum(axis=0) > 100) + 360  # the two upright sides of the frames
    assert columns.max() - columns.min() == pytest.approx(174, abs=10)


def test_rows_with_unequal_numbers_of_images_are_drawn(tmp_path):
    rows = [*rows_of(1, 5), *rows_of(1, 1), MatchRow("nothing", "", [])]
    draw_matches(tmp_path / "grid.png", rows)
    picture(tmp_path / "grid.png")


@pytest.mark.parametrize("rows", [[], [MatchRow("x", "", [])]])
def test_nothing_to_draw_raises(tmp_path, rows):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_matches(tmp_path / "grid.png", rows)
    assert not (tmp_path / "grid.png").exists()


def test_the_callers_images_are_not_changed(tmp_path):
    image = Image.new("RGB", (500, 400), "red")
    draw_matches(tmp_path / "grid.png", [MatchRow("x", "", [LabelledImage(image, "", False)])])
    assert image.size == (500, 400) and image.getpixel((9, 9)) == (255, 0, 0)


def test_rows_show_best_images_scores_and_rank():
    images = [Image.new("L", (1, 1), i) for i in range(5)]
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2, 0.4], [0.2, 0.9, 0.2, 0.1, 0.2]])
    rows = match_rows([(2, "a"), (4, "b")], scores, lambda i: images[i], top=3)
    assert [row.query for row in rows] == ["a", "b"]
    assert [image.getpixel((0, 0)) for image, *_ in rows[0].found] == [1, 4, 2]
    assert [found[1:] for found in rows[0].found] == [("0.50", False), ("0.40", False), ("0.30", True)]
    # 0.3 is third; 0.2 comes after 0.9 and two equal scores, which count against it as in the metrics
    assert [row.remark for row in rows] == ["right image: rank 3 of 5", "right image: rank 4 of 5"]
    assert len(match_rows([(0, "a")], scores[:1], lambda i: images[i], top=99)[0].found) == 5
