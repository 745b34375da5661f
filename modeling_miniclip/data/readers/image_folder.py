"""Folders of images: with metadata files, with a text file next to each image, or with one folder for each class."""

import codecs
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...errors import DataError, Problem, one_line
from ...utils.names import is_utf8, name_of, slashed
from ..columns import NEGATIVES
from ..listing import ListedFolder, images_of_folder, walk_folders
from ..picture_formats import is_picture_file
from ..problems import OnProblem
from ..rows import ReadOptions, Row
from ..splits import split_of_value, splits_of_folders
from ..tables.table_cache import content_of, stat_of
from .caption_file import check_path, read_table
from .image_files import rows_with_images
from .layouts import CAPTION_FILES, METADATA_FILES
from .record_captions import captions_of_record, negatives_at
from .text_files import Lines, check_surrogates

TEXT_ENDINGS = (".txt", ".json")
MOST_NAMES = 100_000  # of files that are kept; a larger folder is listed a second time when it is read

SplitOf = Callable[[str], str | None]  # the split that the folders in an image's name state


@dataclass(frozen=True)
class Layout:
    """What a folder of images looks like, from its folders and not from each of its files.

    Args:
        root: the folder.
        metadata: metadata files, sorted by path.
        has_texts: whether images have text files next to them; of images in class folders, at least half.
        classes: names of class folders, for a folder without captions.
        split_of: function that returns the split of an image by its name.
        wanted: name of the caption in JSON files.
        problems: folders that cannot be listed or are not followed.
        digest: hash of the names of all images, and of the names, sizes and times of the text files next to them.
        folders: the folder and all below it, unless these are too many files to keep their names.
    """

    root: Path
    metadata: list[Path]
    has_texts: bool
    classes: list[str]
    split_of: SplitOf
    wanted: str
    problems: list[Problem]
    digest: str
    folders: list[ListedFolder] | None

    @classmethod
    def of(cls, root: Path, wanted: str = "caption") -> "Layout":
        """Look through a folder.

        Args:
            root: the folder.
            wanted: name of the caption in JSON files.
        """
        metadata, with_images, images, texts, files = [], [], 0, 0, 0
        problems: list[Problem] = []
        folders: list[ListedFolder] = []
        digest = blake2b(digest_size=16)
        for folder in walk_folders(root, problems.append):
            files += len(folder.files)
            if files <= MOST_NAMES:
                folders.append(folder)
            metadata += [Path(folder.path, name) for name in METADATA_FILES if name in folder.files]
            pictures = [name for name in folder.files if is_picture_file(name)]
            if pictures:
                _add_names(digest, folder, pictures)
                with_images.append(_relative(folder.path, root))
                images, texts = images + len(pictures), texts + _count_texts(folder, pictures, wanted)
        split_of = splits_of_folders(with_images)
        found = {_class_of(f"{folder}/", split_of) for folder in with_images} - {None}
        has_texts = texts > 0 and (len(found) < 2 or 2 * texts >= images)  # in class folders, a few may be stray
        classes = [] if metadata or has_texts else sorted(str(name) for name in found)
        kept = folders if files <= MOST_NAMES else None
        return cls(root, sorted(metadata), has_texts, classes, split_of, wanted, problems, digest.hexdigest(), kept)


def _add_names(digest: "blake2b", folder: ListedFolder, pictures: list[str]) -> None:
    texts = [name for name in folder.files if name.lower().endswith(TEXT_ENDINGS)]
    digest.update("\0".join([folder.path, *pictures, "\0"]).encode("utf-8", "surrogatepass"))
    for name in texts:
        with suppress(FileNotFoundError):  # it was deleted in the meantime
            digest.update(repr(stat_of(Path(folder.path, name))).encode("utf-8", "surrogatepass"))


def read_image_folder(
    source: str, options: ReadOptions, on_problem: OnProblem, layout: Layout | None = None
) -> Iterator[Row]:
    """Read the images of a folder and its subfolders, linked ones too, except hidden ones.

    Folders named after splits are splits, if all folders next to them that hold images are. A caption comes from
    `metadata.csv` or `metadata.jsonl` in one or several folders; else from the lines of `0001.txt` next to `0001.jpg`
    (or a caption in `0001.json`); else from the name of the class folder, which is then the image's group.

    Args:
        source: path of the folder.
        options: columns, and the caption of class folders.
        on_problem: function called with each bad row and bad image; with what cannot be listed or is not followed;
            with each image in a format that cannot be read; and once with what is left out (kind `left-out`).
        layout: what the folder looks like, if that is known.

    Raises:
        DataError: there are no captions and no class folders.
    """
    root = Path(source)
    check_path(root, options)
    if layout is None or layout.wanted != options.columns.caption:
        layout = Layout.of(root, options.columns.caption)
    _report_problems(layout, on_problem)
    if layout.metadata:
        yield from read_metadata(layout, options, on_problem)
    elif layout.has_texts:
        yield from _text_rows(layout, options, on_problem)
    elif len(layout.classes) > 1:
        yield from _class_rows(layout, options, on_problem)
    else:
        text = (
            f"no captions found; expected one of {', '.join(CAPTION_FILES[:3])}, {METADATA_FILES[0]} or "
            f"{METADATA_FILES[1]} next to the images, a .txt file next to each image, or at least two folders with "
            "the images of one class each"
        )
        raise DataError(Problem("unusable", text, str(root)))


def inputs_image_folder(source: str, options: ReadOptions, layout: Layout | None = None) -> Iterator[Any]:
    """What the rows depend on, for the key of their table: metadata and text files, and the names of all images."""
    layout = layout or Layout.of(Path(source))
    yield layout.digest
    yield from map(content_of, layout.metadata)


def _report_problems(layout: Layout, on_problem: OnProblem) -> None:
    for problem in layout.problems:
        on_problem(problem)


def _relative(path: str, root: Path) -> str:
    relative = slashed(os.path.relpath(path, root))
    return "" if relative == "." else relative


def _count_texts(folder: ListedFolder, pictures: list[str], wanted: str) -> int:
    """How many pictures have a text file next to them; they count if the first is text, or JSON with a caption."""
    texts = _texts_by_stem(folder)
    found = [texts[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in texts]
    first = next((name for names in found for name in names if name.lower().endswith(".txt")), None)
    is_text = first is not None and _is_text(Path(folder.path, first))
    count = is_text * sum(any(name.lower().endswith(".txt") for name in names) for names in found)
    if found and not count and _captions_of_json(Path(folder.path, found[0][0]), wanted, lambda problem: None)[0]:
        return len(found)
    return count


def _is_text(path: Path) -> bool:
    """Whether a file looks like text, in whatever encoding; whoever reads it reports what cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError:
        return True
    return b"\0" not in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _texts_by_stem(folder: ListedFolder) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for name in folder.files:
        stem, ending = os.path.splitext(name)
        if ending.lower() in TEXT_ENDINGS:
            texts.setdefault(stem, []).append(name)
    return texts


# --- metadata files -------------------------------------------------------------------------------------------------


def read_metadata(layout: Layout, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """The rows of the metadata files in a folder; arguments as in [`read_image_folder`]."""
    first_at: dict[str, tuple[Path, int | None]] | None = {} if _overlap(layout.metadata) else None
    for file in layout.metadata:
        rows = read_table(file, options, on_problem)
        outside = options.columns.allow_outside_images
        for row in rows_with_images(rows, file.parent, outside, on_problem, layout.root, options.bad_images):
            if first_at is not None and _is_elsewhere(row, file, first_at, on_problem):
                continue
            row.split = row.split or layout.split_of(row.name)
            yield row


def _overlap(files: list[Path]) -> bool:
    """Whether two files may name the same images: in the same folder, or in folders of which one holds the other."""
    folders = [file.parent for file in files]
    return any(a == b or a in b.parents or b in a.parents for i, a in enumerate(folders) for b in folders[:i])


def _is_elsewhere(row: Row, file: Path, first_at: dict[str, tuple[Path, int | None]], on_problem: OnProblem) -> bool:
    """Whether an image is in an earlier file, which is reported."""
    first, number = first_at.setdefault(row.name, (file, row.number))
    if first == file:
        return False
    text = f"{row.name!r} is already in {first}, row {number}"
    on_problem(Problem("two-splits", text, row.file, row.number, row.column))
    return True


# --- images without metadata ----------------------------------------------------------------------------------------


class _LeftOut:
    """Images that are left out, to report them once."""

    def __init__(self, reason: str):
        self.reason, self.count, self.first = reason, 0, ""

    def add(self, name: str) -> None:
        self.first, self.count = self.first or name_of(name), self.count + 1

    def report(self, root: Path, on_problem: OnProblem) -> None:
        if self.count:
            text = f"left out {self.count} images {self.reason} (first: {self.first!r})"
            on_problem(Problem("left-out", text, str(root)))


def _images(layout: Layout, on_problem: OnProblem) -> Iterator[tuple[str, str, list[str]]]:
    """The path and the name of each image, and the names of the text files next to it."""
    folders = layout.folders or walk_folders(layout.root, lambda problem: None)  # whose problems are those of `layout`
    for folder in folders:
        parent, texts = _relative(folder.path, layout.root), _texts_by_stem(folder)
        for path in images_of_folder(folder, on_problem):
            base = os.path.basename(path)
            yield path, posixpath.join(parent, base), texts.get(os.path.splitext(base)[0], [])


def _usable_images(layout: Layout, on_problem: OnProblem) -> Iterator[tuple[str, str, list[str]]]:
    """Images as in [`_images`] whose names can be stored."""
    odd = _LeftOut("whose names are not UTF-8; rename them")
    for path, name, texts in _images(layout, on_problem):
        if is_utf8(name):
            yield path, name, texts
        else:
            odd.add(name)
    odd.report(layout.root, on_problem)


def _text_rows(layout: Layout, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    without = _LeftOut("without a text file next to them")
    for path, name, texts in _usable_images(layout, on_problem):
        row = Row(
            name, path, key=name, split=layout.split_of(name), file=os.path.join(os.path.dirname(path), *texts[:1])
        )
        if not texts:
            without.add(name)
        elif _add_texts(row, path, texts, options.columns.caption, on_problem):
            yield row
    without.report(layout.root, on_problem)


def _add_texts(row: Row, path: str, texts: list[str], wanted: str, on_problem: OnProblem) -> bool:
    """Add what the text files next to an image say; False, and a problem, if that is no caption.

    A `.txt` file has one caption per line, unless all of it is the caption in the JSON file.
    """
    lines: list[str] = []
    whole, captions = "", list[str]()
    for name in texts:
        file = Path(os.path.dirname(path), name)
        if name.lower().endswith(".json"):
            more, record = _captions_of_json(file, wanted, on_problem)
            captions += more
            group, split = record.get("group"), record.get("split")
            row.group = row.group or (str(group) if isinstance(group, str | int) and group != "" else None)
            row.split = split_of_value(split) or row.split
            row.negatives += negatives_at(record.get(NEGATIVES), str(file), None, on_problem)
        else:
            reader = Lines(file, on_problem)
            read = [line for number, line in enumerate(reader, 1) if not reader.are_undecoded(number, number)]
            whole, lines = "".join(read).strip(), lines + read
    stripped = [whole] if whole in captions else [line.strip() for line in lines]
    row.captions = list(dict.fromkeys(text for text in (*stripped, *captions) if text))
    if not row.captions:
        place = os.path.join(os.path.dirname(path), texts[0])
        on_problem(Problem("empty-caption", "no caption in this file; write one, or delete it", place))
    return bool(row.captions)


def _captions_of_json(file: Path, wanted: str, on_problem: OnProblem) -> tuple[list[str], dict[str, Any]]:
    try:
        record = json.loads(file.read_bytes())
        check_surrogates(record)
    except (ValueError, RecursionError) as error:
        on_problem(Problem("json", f"not valid JSON: {one_line(error)}", str(file)))
        return [], {}
    if not isinstance(record, dict):
        return captions_of_record({wanted: record}, wanted), {}
    return captions_of_record(record, wanted), record


def _class_of(name: str, split_of: SplitOf) -> str | None:
    """The class folder of an image: the first of its folders, or the second one if the first names a split."""
    folders = name.split("/")[:-1]
    if folders and split_of(f"{folders[0]}/") is not None:
        folders = folders[1:]
    return folders[0] if folders and folders[0] else None


def _class_rows(layout: Layout, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    without = _LeftOut("outside the class folders")
    for path, name, _ in _usable_images(layout, on_problem):
        folder = _class_of(name, layout.split_of)
        if folder is None:
            without.add(name)
            continue
        caption = options.caption_template.replace("{}", folder.replace("_", " ").strip())
        yield Row(name, path, [caption], name, layout.split_of(name), folder, file=os.path.dirname(path))
    without.report(layout.root, on_problem)


# --- all images, for an index ---------------------------------------------------------------------------------------


def read_all_images(layout: Layout, options: ReadOptions, on_problem: OnProblem) -> Iterator[Row]:
    """All images of a folder in the order of the listing, with the captions of text files next to them.

    Arguments as in [`read_image_folder`].
    """
    _report_problems(layout, on_problem)
    for path, name, texts in _images(layout, on_problem):
        row = Row(name, path, split=layout.split_of(name), file=str(layout.root))
        if texts and layout.has_texts:
            _add_texts(row, path, texts, options.columns.caption, on_problem)
        yield row
