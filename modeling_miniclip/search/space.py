"""`miniclip space`: a folder with a model, an index and the search page, which runs as a Gradio Space or locally.

The index holds copies of 512 pixels, and captions. Image files, paths, dates and metadata are not published.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from ..clips.exported import export_folder
from ..data.source_kinds import Sources
from ..errors import DataError, MiniClipError, UsageError
from ..utils.files import check_new_folder, replaced_folder
from ..utils.resources import PACKAGE
from ..utils.thumbnails import encode_thumbnail
from .building.merge import Report
from .embeddings_file import BLOCK
from .fingerprints import describe_files
from .index import ImageIndex, Manifest, write_index
from .page.pictures import picture_of
from .update import update_index

PIXELS = 512  # longer side of the copies

# What the page needs at run time. The Space pins the versions that are installed here.
LIBRARIES = (
    "accelerate", "datasets", "huggingface_hub", "numpy", "pillow", "pyarrow", "safetensors", "timm", "tokenizers",
    "torch", "torchvision", "tqdm", "transformers",
)  # fmt: skip

APP = '''"""Search the images of `index` with the model in `model`, by text or by image."""

import os
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)

from modeling_miniclip.search.index import ImageIndex  # noqa: E402
from modeling_miniclip.search.page.app import build_page, launch_options  # noqa: E402

if __name__ == "__main__":
    build_page(ImageIndex.open("index"), {title!r}).launch(**launch_options())
'''

README = """---
{metadata}---

# {title}

Search {images:,} images by text or by image with a [MiniCLIP](model/README.md) model. The index holds small copies of
the images, with their captions if they have any. To run it locally: `pip install gradio -r requirements.txt` and
`python app.py`.
"""


def write_space(export: str, folder: str | os.PathLike, sources: Sources, title: str = "Image search") -> Report:
    """Write a Space. The folder appears only when it is complete.

    Args:
        export: folder of an exported model, or its name on the Hub; or any CLIP that `from_clip` takes.
        folder: folder to write, new or empty.
        sources: one or several sources of images, as for `update_index`.
        title: title of the page.

    Returns:
        The number of images, and which images and folders could not be read.

    Raises:
        ModelError: there is no such model.
        MiniClipError: gradio is not installed.
        UsageError: the folder is not empty, or the title is.
        DataError: a source cannot be read, or has no images.
    """
    target = Path(folder).expanduser()
    check_new_folder(target)
    try:
        sdk_version = version("gradio")
    except PackageNotFoundError as error:
        raise MiniClipError("a Space needs gradio: pip install gradio") from error
    if not title.strip():
        raise UsageError("--title is empty: give the page a title")
    title = " ".join(title.split())
    model = export_folder(export)
    with replaced_folder(target) as fresh, tempfile.TemporaryDirectory() as scratch:
        report = update_index(Path(scratch) / "index", sources, model)
        shutil.copytree(model, fresh / "model", ignore=shutil.ignore_patterns(".*", "__pycache__"))
        gone = _write_portable(ImageIndex.open(Path(scratch) / "index"), fresh / "index", fresh / "model")
        report.images, report.skipped = report.images - len(gone), report.skipped | gone
        for path in PACKAGE.rglob("*.py"):
            copy = fresh / PACKAGE.name / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        (fresh / "app.py").write_text(APP.format(title=title), encoding="utf-8")
        pins = [f"{library}=={version(library).partition('+')[0]}" for library in LIBRARIES]
        (fresh / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
        card = README.format(metadata=_metadata(model, title, sdk_version), title=title, images=report.images)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return report


def _write_portable(index: ImageIndex, target: Path, model: Path) -> dict[str, str]:
    """Write a copy of an index with thumbnails, but without paths, sources and dates.

    Returns:
        Names of images that can no longer be read and are left out, with the reason.

    Raises:
        DataError: that is so for all images.
    """
    entries = index.read_entries()
    small: dict[int, bytes] = {}
    gone: dict[str, str] = {}
    for row in range(len(index)):
        if (picture := picture_of(index, row, PIXELS)) is not None:
            small[row] = encode_thumbnail(picture, PIXELS)
        else:
            gone[entries["id"][row].as_py()] = "it was read a moment ago, but can no longer be"
    if not small:
        raise DataError(
            f"none of the {len(gone)} images can be read any longer, first {next(iter(gone))}; check its disk"
        )
    kept = list(small)
    names = _unique_names([entries["id"][row].as_py() for row in kept])
    changed: dict[str, Any] = {
        "id": pa.array(names, pa.string()),
        "path": pa.nulls(len(kept), pa.string()),
        "source": pa.array(["images"] * len(kept)),
        "mtime": pa.array([-1] * len(kept), pa.int64()),
        "date": pa.nulls(len(kept), pa.timestamp("s")),
        "thumbnail": pa.array(list(small.values()), pa.large_binary()),
        "version": pa.nulls(len(kept), pa.string()),
    }
    entries = entries.take(pa.array(kept, pa.int64()))
    for name, column in changed.items():
        entries = entries.set_column(entries.schema.get_field_index(name), name, column)
    old = index.manifest
    manifest = Manifest(
        model="model", fingerprint=old.fingerprint, dim=old.dim, dtype=old.dtype, files=describe_files(model),
        sources=["images"],
    )  # fmt: skip

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(kept), BLOCK):
            yield np.asarray(index.embeddings[kept[start : start + BLOCK]])

    captions = None if index.unrelated is None else index.unrelated.captions
    write_index(target, manifest, [entries], blocks(), captions=captions)
    return gone


def _unique_names(ids: list[str]) -> list[str]:
    """The last part of each id, numbered where they are equal."""
    names: dict[str, None] = {}
    for place, name in enumerate(PurePath(one).name for one in ids):
        while name in names:
            name = f"{place}-{name}"
        names[name] = None
    return list(names)


def _metadata(model: Path, title: str, sdk_version: str) -> str:
    """Metadata that the Hub reads from the start of the README."""
    from huggingface_hub import ModelCard, SpaceCardData

    card = model / "README.md"
    license = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    data = SpaceCardData(
        title=title, emoji="🔎", colorFrom="blue", colorTo="gray", sdk="gradio",
        sdk_version=sdk_version, app_file="app.py", license=license if license != "unknown" else None,
        tags=["miniclip", "image-search"],
    )  # fmt: skip
    return str(data.to_yaml()) + "\n"
