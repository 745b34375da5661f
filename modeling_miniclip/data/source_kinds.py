"""The kinds of sources, and which kind a source is: the one list of what every command reads."""

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, Problem
from .problems import OnProblem
from .readers.caption_file import inputs_caption_file, read_caption_file, split_lines
from .readers.coco import inputs_coco, inputs_karpathy, read_coco, read_karpathy
from .readers.hub import inputs_hub, read_hub
from .readers.image_folder import Layout, inputs_image_folder, read_image_folder
from .readers.memory import inputs_memory, is_memory, names_paths, read_memory
from .readers.parquet import inputs_parquet, read_parquet
from .readers.recognise import TAR_ENDINGS, recognise_source
from .readers.saved import inputs_saved, read_saved
from .readers.tars import inputs_tar, read_tar
from .rows import Reader, ReadOptions, SplitName
from .shards.remote_files import is_url
from .shards.shard_patterns import is_pattern, shard_kind

Sources = str | os.PathLike | Iterable[str | os.PathLike]  # one or several
# A missing local file with one of these endings is not looked for on the Hub.
FILE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".zip")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^/]+)?")  # with a configuration


def _no_split_files(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[SplitName] | None:
    return None


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Args:
        name: name of the kind.
        read: its reader.
        inputs: everything that its rows depend on, for the key of the cached table.
        split_lines: lines of split files next to a source, None if there are none.
        by_name: whether a random split is drawn in the order of the names of the images, instead of the source's.
        groups_are_classes: whether a random split holds out images of each group, instead of whole groups.
        one_split_is_train: whether a source with a single split is for training, whatever that is called.
        has_cheap_inputs: whether `inputs` takes little time in comparison with `read`.
        layout: what this folder of images looks like, which takes a walk through it.
    """

    name: str
    read: Reader
    inputs: Callable[[str, ReadOptions], Iterable[Any]]
    split_lines: Callable[[str, ReadOptions, OnProblem], Iterator[SplitName] | None] = _no_split_files
    by_name: bool = False
    groups_are_classes: bool = False
    one_split_is_train: bool = False
    has_cheap_inputs: bool = True
    layout: Layout | None = None


CAPTION_FILE = Kind("captions", read_caption_file, inputs_caption_file, split_lines, by_name=True)
IMAGE_FOLDER = Kind("folder", read_image_folder, inputs_image_folder, by_name=True, has_cheap_inputs=False)
CLASS_FOLDERS = replace(IMAGE_FOLDER, name="classes", groups_are_classes=True)
COCO = Kind("coco", read_coco, inputs_coco, by_name=True)
KARPATHY = Kind("karpathy", read_karpathy, inputs_karpathy, by_name=True)
TAR = Kind("tar", read_tar, inputs_tar, one_split_is_train=True)
PARQUET = Kind("parquet", read_parquet, inputs_parquet, one_split_is_train=True)
SAVED = Kind("saved", read_saved, inputs_saved, one_split_is_train=True)
HUB = Kind("hub", read_hub, inputs_hub, one_split_is_train=True, has_cheap_inputs=False)
MEMORY = Kind("memory", read_memory, inputs_memory, one_split_is_train=True)
BY_NAME = {kind.name: kind for kind in (IMAGE_FOLDER, COCO, KARPATHY, TAR, PARQUET, SAVED)} | {"text": CAPTION_FILE}


def kind_of(source: str) -> Kind | None:
    """The kind of a source; None for an image.

    Args:
        source: path, pattern, URL or name on the Hub, as [`resolve`] returns it.

    Raises:
        DataError: no such file exists, or it is none that can be read.
    """
    if is_memory(source):
        return replace(MEMORY, by_name=names_paths(source))  # as in a caption file with these paths
    if not os.path.exists(source):
        return BY_NAME.get(shard_kind(source) or "") if is_url(source) or is_pattern(source) else HUB
    if not os.path.isfile(source) and not os.path.isdir(source):
        raise DataError(
            Problem("unusable", "neither a file nor a folder; name the file or folder with the images", source)
        )
    name = recognise_source(source)
    if name == "shards":
        name = shard_kind(source) or "folder"
    return _kind_of_images(source) if name == "folder" else BY_NAME.get(name)


def _kind_of_images(folder: str) -> Kind:
    layout = Layout.of(Path(folder))
    read, inputs = partial(read_image_folder, layout=layout), partial(inputs_image_folder, layout=layout)
    return replace(CLASS_FOLDERS if layout.classes else IMAGE_FOLDER, read=read, inputs=inputs, layout=layout)


def captioned_kind(source: str) -> Kind:
    """The kind of a source of captioned images.

    Raises:
        DataError: it is an image, or as in [`kind_of`].
    """
    kind = kind_of(source)
    if kind is None:
        text = "an image, not a caption file; `miniclip index` reads it, training and evaluation do not"
        raise DataError(Problem("unusable", text, source))
    return kind


def each_source(sources: Sources) -> list[str]:
    """Several sources as a list; also one alone, of which a loop would take every letter for a source."""
    return [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]


def hub_id(source: str) -> str | None:
    """The dataset on the Hub that a source is, or is a part of; None for any other source.

    Raises:
        DataError: as in [`local_path`].
    """
    if match := re.match(r"hf://datasets/([^/@]+/[^/@]+)", source):
        return match[1]
    if source == "scenes" or is_memory(source) or is_url(source) or is_pattern(source):
        return None
    if local_path(source) is not None:
        return None
    return source.partition(":")[0]


def resolve(source: str | os.PathLike) -> str:
    """The absolute path or pattern of a source, so that the working folder does not matter; other names as they are.

    Raises:
        DataError: as in [`local_path`].
    """
    name = os.fspath(source)
    if name == "scenes" or is_memory(name) or is_url(name):
        return name
    if is_pattern(name):
        return os.path.abspath(os.path.expanduser(name))
    path = local_path(source)
    return name if path is None else os.path.abspath(path)


def local_path(source: str | os.PathLike) -> Path | None:
    """The file or folder that a source names; None if it is the name of a dataset on the Hub.

    Raises:
        DataError: no such file or folder exists, and it cannot be the name of a dataset; or it cannot be reached.
    """
    path = Path(source).expanduser()
    try:
        os.stat(path)
        return path
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions and its disk") from error
    if path.name.lower().endswith(FILE_ENDINGS + TAR_ENDINGS) or not HUB_NAME.fullmatch(os.fspath(source)):
        raise DataError(f"{source}: no such file or folder; name a file, a folder or a dataset on the Hub")
    return None
