"""JSON about a whole dataset: COCO's caption annotations, and Karpathy's splits of COCO, Flickr8k and Flickr30k."""

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import DataError, Problem, one_line
from ...utils.names import is_utf8, name_of
from ..columns import NEGATIVES, ColumnNames, image_name
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..splits import split_of_name, split_of_value
from ..tables.table_cache import content_of
from .caption_file import check_path
from .image_files import SAMPLE, rows_with_images
from .layouts import find_coco_files, find_images, find_karpathy_file
from .record_captions import negatives_at, texts_of


def read_coco(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """Read caption annotations in COCO's format: one row per image, in the order of the file.

    Args:
        source: path of a file such as `captions_train2017.json`, its images in `train2017/` next to it or next to its
            folder; or of a folder with one such file for each split, or with these files in `annotations/`.
        options: the caption's name, and the folder of the images.
        on_problem: function called with each annotation without a caption and each image that cannot be used; and once
            with what is left out: images without captions, captions without images (kind `left-out`).

    Raises:
        DataError: a file is not as expected, or there is no folder of images.
    """
    for split, file in _coco_files(source):
        rows = _coco_rows(file, options, on_problem)
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
        for row in _with_images(list(rows), file, root, options, on_problem):
            row.split = split
            yield row


def inputs_coco(source: str, options: ReadOptions) -> Iterator[Any]:
    """What the rows depend on, for the key of their table; arguments as in [`read_coco`]."""
    yield from (content_of(file) for _, file in _coco_files(source))


def read_karpathy(source: str, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """Read one of Karpathy's splits: one row per image, in the order of the file; `restval` is training data.

    Args:
        source: path of a file such as `dataset_flickr8k.json`, next to its images, or of its folder.
        options: the folder of the images.
        on_problem: function called with each caption that is no text, each image that cannot be used, and once with
            the images without captions (kind `left-out`).

    Raises:
        DataError: the file is not as expected, or there is no folder of images.
    """
    file = _karpathy_file(source)
    images = _load(file, ("images", "filename", "filepath", "split", "sentences", "raw", NEGATIVES)).get("images")
    entries = _objects(images, "images", file)
    rows = list(_karpathy_rows(entries, file, options, on_problem, with_folders=True))
    folder, _ = find_images(file.parent, None, (row.name for row in rows), options.image_dir)
    if not any((folder / row.name).is_file() for row in rows[:SAMPLE]):  # all images in one folder, perhaps
        rows = list(_karpathy_rows(entries, file, options, lambda problem: None, with_folders=False))
    del entries, images
    yield from _with_images(rows, file, file.parent, options, on_problem)


def inputs_karpathy(source: str, options: ReadOptions) -> Iterator[Any]:
    """What the rows depend on, for the key of their table; arguments as in [`read_karpathy`]."""
    yield content_of(_karpathy_file(source))


def _coco_files(source: str) -> list[tuple[str | None, Path]]:
    path = Path(source)
    if path.is_file():
        return [(None, path)]
    return [(split_of_name(file.name), file) for file in find_coco_files(path)]


def _karpathy_file(source: str) -> Path:
    path = Path(source)
    return path if path.is_file() else find_karpathy_file(path) or path


def _with_images(
    rows: list[Row], file: Path, root: Path, options: ReadOptions, on_problem: OnProblem
) -> Iterator[Row]:
    check_path(file, options)
    names = [row.name for row in islice(rows, SAMPLE)]
    folder, bounds = find_images(root, split_of_name(file.name), names, options.image_dir)
    check_path(folder, options)
    outside = options.columns.allow_outside_images
    yield from rows_with_images(rows, folder, outside, on_problem, bounds, options.bad_images)


# --- JSON -----------------------------------------------------------------------------------------------------------


def _load(file: Path, keys: Collection[str]) -> dict[str, Any]:
    """A JSON object with only these keys in it and in the objects in it: the others would fill the memory.

    Raises:
        DataError: the file cannot be read, or is no JSON object.
    """
    wanted = frozenset(keys)
    try:
        value = json.loads(
            file.read_bytes(), object_pairs_hook=lambda pairs: {key: one for key, one in pairs if key in wanted}
        )
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
        raise DataError(Problem("unusable", text, name_of(file))) from error
    except (ValueError, RecursionError) as error:
        text = f"not valid JSON: {one_line(error)}; copy or download the file again"
        raise DataError(Problem("unusable", text, str(file))) from error
    if not isinstance(value, dict):
        raise DataError(Problem("unusable", "expected a JSON object {...}", str(file)))
    return value


def _objects(values: Any, name: str, file: Path) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(Problem("unusable", f"expected a list of objects called {name!r}", str(file)))
    return values


def _coco_rows(file: Path, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    caption = options.columns.caption
    data = _load(file, ("images", "annotations", "id", "image_id", "file_name", caption, NEGATIVES))
    images = _objects(data.get("images"), "images", file)
    annotations = _objects(data.get("annotations"), "annotations", file)
    if not any(caption in annotation for annotation in annotations):
        text = (
            f"no annotation has a {caption!r}; name a file with captions, such as annotations/captions_train2017.json"
        )
        if caption != ColumnNames.caption:
            text += ", or the right key with caption_column"
        raise DataError(Problem("unusable", text, str(file)))
    captions = _captions_by_image(annotations, caption, file, on_problem)
    wrong: dict[Any, list[str]] = {}
    for annotation in annotations:
        where = f"annotation {annotation.get('id')}"
        if negatives := negatives_at(annotation.get(NEGATIVES), str(file), None, on_problem, of=where):
            wrong.setdefault(annotation.get("image_id"), []).extend(negatives)
    without = 0
    for number, image in enumerate(images, 1):
        texts = captions.pop(image.get("id"), [])
        name = _name(image.get("file_name"), f"image {number}", file, "file_name", on_problem)
        if name is None or not (texts or options.all_images):
            without += not texts
            continue
        negatives = wrong.get(image.get("id"), [])
        yield Row(name, "", texts, name, file=str(file), column="file_name", negatives=negatives)
    lost = sum(map(len, captions.values()))
    found = [(0 if options.all_images else without, "images without a caption"), (lost, "captions without an image")]
    if reasons := [f"{count} {what}" for count, what in found if count]:
        on_problem(Problem("left-out", f"left out {' and '.join(reasons)}", str(file)))


def _captions_by_image(
    annotations: list[dict[str, Any]], key: str, file: Path, on_problem: OnProblem
) -> dict[Any, list[str]]:
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        number, image = annotation.get("id"), annotation.get("image_id")
        texts = _texts(annotation.get(key), f"annotation {number}", file, key, on_problem)
        captions.setdefault(image if isinstance(image, int | str) else None, []).extend(texts)
    return captions


def _karpathy_rows(
    entries: list[dict[str, Any]], file: Path, options: ReadOptions, on_problem: OnProblem, with_folders: bool
) -> Iterator[Row]:
    without = 0
    for number, image in enumerate(entries, 1):
        where = f"image {number}"
        name = _name(image.get("filename"), where, file, "filename", on_problem)
        sentences = image.get("sentences")
        captions = [
            text
            for sentence in (sentences if isinstance(sentences, list) else [])
            for text in _texts(sentence, where, file, "sentences", on_problem)
        ]
        without += not captions
        if name is None or not (captions or options.all_images):
            continue
        folder = image.get("filepath")
        if with_folders and isinstance(folder, str) and folder.strip("/. "):
            name = f"{folder.strip().strip('/')}/{name}"
        yield Row(
            name,
            "",
            captions,
            name,
            split_of_value(image.get("split")),
            file=str(file),
            column="filename",
            negatives=negatives_at(image.get(NEGATIVES), str(file), None, on_problem, of=where),
        )
    if without and not options.all_images:
        on_problem(Problem("left-out", f"left out {without} images without a caption", str(file)))


def _name(value: Any, where: str, file: Path, key: str, on_problem: OnProblem) -> str | None:
    if isinstance(value, str) and value.strip() and is_utf8(value):
        return image_name(value, str(file), 0, key, on_problem)
    on_problem(
        Problem("no-name", f"{where} has no name, found {value!r}; correct or delete it", str(file), column=key)
    )
    return None


def _texts(value: Any, where: str, file: Path, key: str, on_problem: OnProblem) -> list[str]:
    texts = texts_of(value)
    if texts and all(map(is_utf8, texts)):
        return texts
    text = f"the caption of {where} is empty or not text, found {value!r}; correct or delete it"
    on_problem(Problem("empty-caption", text, str(file), column=key))
    return []
