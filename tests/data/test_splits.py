"""Which split an image belongs to."""

import pytest

from modeling_miniclip.data.splits import splits_of_folders


@pytest.mark.parametrize(
    ("image_id", "split"),
    [
        ("train/a.jpg", "train"),
        ("photos/Val/b.jpg", "validation"),
        ("restval/c.jpg", "train"),
        ("train/dev/d.jpg", "train"),  # the outermost folder decides
        ("photos/e.jpg", None),
        ("photos/test", None),  # a file of this name
    ],
)
def test_a_folder_names_the_split_of_an_image(image_id: str, split: str | None) -> None:
    assert splits_of_folders([image_id.rpartition("/")[0]])(image_id) == split
