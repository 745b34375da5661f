"""Where the images of a tar archive are, and their captions: found once per archive, and kept in a cache.

Members belong together by their names, in any order. A text belongs to the image whose name without its suffix is the
longest start of the text's name up to a dot: `a.b.txt` and `a.b.caption.txt` to `a.b.jpg`, not to `a.c.jpg`. Without
such an image, the name up to its first dot counts, as in WebDataset: `0.caption.txt` belongs to `0.image.jpg`, and
`0.txt` to `0.left.jpg` and `0.right.jpg`, but `0.caption.txt` to neither of these two. If a name occurs several times,
the second image goes with the second text.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import posixpath
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from tqdm.auto import tqdm

from ...errors import DataError, MiniClipError, Problem, one_line
from ...utils.files import shared_file
from ...utils.names import name_of
from ...utils.processes import follow_parent, usable_cpus
from ..columns import NEGATIVES
from ..listing import is_hidden_path
from ..picture_formats import BY_SUFFIX
from ..readers.record_captions import captions_of_record, join_captions, negatives_of
from ..splits import SPLIT_ALIASES, SPLITS
from .remote_files import is_url
from .tar_headers import DamagedArchive, Member, find_members

FORMAT = b"miniclip-tar-3\n"
# Compressed archives by their first bytes: how to read them, and the program that unpacks them.
COMPRESSIONS: dict[bytes, tuple[Any, str]] = {
    b"\x1f\x8b": (gzip.open, "gzip"),
    b"BZh": (bz2.open, "bzip2"),
    b"\xfd7zXZ\0": (lzma.open, "xz"),
    b"\x28\xb5\x2f\xfd": (None, "zstd"),
}
TEXTS = (".txt", ".json")
COUNTS = ("lost", "unreadable", "no_lists")  # of a `TarIndex`
SMALL = 256 * 2**20  # bytes of archives for which no processes are started
SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "member": pa.string(),
        "start": pa.int64(),
        "size": pa.int64(),
        "captions": pa.list_(pa.string()),
        "group": pa.string(),
        "split": pa.string(),
        "negatives": pa.list_(pa.string()),
    }
)


class Entry(NamedTuple):
    """An image of an archive.

    Args:
        name: unique name within the archive, without its suffix if possible.
        member: name of the member with its content, escaped by [`name_of`][modeling_miniclip.utils.names.name_of].
        start: offset of its content.
        size: size of its content in bytes.
        captions: its captions, each once.
        group, split, negatives: what the JSON file next to it says.
    """

    name: str
    member: str
    start: int
    size: int
    captions: list[str]
    group: str | None
    split: str | None
    negatives: list[str]


@dataclass
class TarIndex:
    """The images of an archive in its order, and what is wrong with it.

    Args:
        table: one row per image, columns as in [`Entry`].
        damage: why the archive cannot be read to its end; "" if it can.
        lost: number of captions that belong to no image, with the first one's member.
        unreadable: number of texts that are not UTF-8 or not JSON, with the first one's member.
        no_lists: number of texts whose wrong captions look like a list but are none, with the first one's member.
    """

    table: pa.Table
    damage: str = ""
    lost: tuple[int, str] = (0, "")
    unreadable: tuple[int, str] = (0, "")
    no_lists: tuple[int, str] = (0, "")

    def __iter__(self) -> Iterator[Entry]:
        for batch in self.table.to_batches(4096):
            yield from map(Entry, *(column.to_pylist() for column in batch.columns))

    def __len__(self) -> int:
        return int(self.table.num_rows)


@dataclass
class _Text:
    """What the texts of an image say."""

    captions: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)  # whole text files, which may hold the caption of a JSON file
    group: str | None = None
    split: str | None = None
    negatives: list[str] = field(default_factory=list)
    has_no_list: bool = False  # whether its wrong captions look like a list but are none


# --- indexes on disk ------------------------------------------------------------------------------------------------


def open_index(
    path: str,
    cache_dir: str | os.PathLike,
    caption_column: str = "caption",
    name: str | None = None,
    stamp: str | None = None,
) -> TarIndex:
    """The index of an archive: from the cache, or built and stored there.

    Args:
        path: path of the archive.
        cache_dir: folder of indexes.
        caption_column: key of the caption in JSON members.
        name: URL of a remote archive, whose local file `path` is.
        stamp: version of a remote archive.

    Raises:
        DataError: the file is compressed, or changed in the meantime.
        MiniClipError: the index cannot be stored.
        OSError: the archive cannot be read.
    """
    name, before = name or path, stamp or _stamp(path)
    index = load_index(name, cache_dir, caption_column, before)
    if index is None:
        unpack = compressed_by(path)
        if unpack:
            raise DataError(Problem("unusable", compressed_message(name, unpack), name_of(name)))
        with open(path, "rb") as file:
            index = build_index(file, caption_column)
        if (stamp or _stamp(path)) != before:
            raise DataError(Problem("shard", "changed while it was read; start again when it is complete", path))
        _save_index(index, _index_path(name, cache_dir, caption_column), before)
    return index


def load_index(name: str, cache_dir: str | os.PathLike, caption_column: str, stamp: str) -> TarIndex | None:
    """The index of an archive from the cache; None if there is none for this version of it.

    Args:
        name: path or URL of the archive.
        cache_dir, caption_column: as in [`open_index`].
        stamp: its version.
    """
    return _load_index(_index_path(name, cache_dir, caption_column), stamp)


def build_indexes(
    paths: Sequence[str], cache_dir: str | os.PathLike, caption_column: str = "caption", num_workers: int | None = None
) -> None:
    """Build the indexes of many archives that are not in the cache yet, in parallel, with a progress bar.

    An archive that cannot be read is left to [`open_index`], which raises its error.

    Args:
        paths: paths of the archives.
        cache_dir, caption_column: as in [`open_index`].
        num_workers: number of processes; by default as many as there are processors, or none for few archives.

    Raises:
        MiniClipError: an index cannot be stored, or a process died.
    """
    missing = [path for path in paths if not _is_current(path, cache_dir, caption_column)]
    bar = tqdm(total=len(missing), desc="indexing shards", unit="shard", delay=2, leave=False)
    if num_workers is None:
        num_workers = usable_cpus()
        total = sum(os.path.getsize(path) for path in missing if os.path.isfile(path))
        num_workers = min(num_workers, len(missing)) if total > SMALL else 1
    with bar:
        if num_workers < 2:
            for path in missing:
                bar.update(_try_index(path, cache_dir, caption_column))
            return
        with ProcessPoolExecutor(num_workers, initializer=follow_parent) as pool:
            waiting = [pool.submit(_try_index, path, cache_dir, caption_column) for path in missing]
            try:
                for done in as_completed(waiting):
                    bar.update(done.result())
            except BrokenProcessPool as error:
                text = "a process that indexed shards died, probably for lack of memory"
                raise MiniClipError(f"{text}; start again: what is done is kept") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _try_index(path: str, cache_dir: str | os.PathLike, caption_column: str) -> int:
    with suppress(DataError, OSError):
        open_index(path, cache_dir, caption_column)
    return 1


def _is_current(path: str, cache_dir: str | os.PathLike, caption_column: str) -> bool:
    with suppress(OSError):
        return load_index(path, cache_dir, caption_column, _stamp(path)) is not None
    return False


def _index_path(name: str, cache_dir: str | os.PathLike, caption_column: str) -> Path:
    text = f"{name if is_url(name) else os.path.abspath(name)}\0{caption_column}"
    return Path(cache_dir, "indexes", hashlib.sha256(os.fsencode(text)).hexdigest()[:32])


def _stamp(path: str) -> str:
    info = os.stat(path)
    return f"{info.st_size} {info.st_mtime_ns}"


def _load_index(place: Path, stamp: str) -> TarIndex | None:
    """The stored index; None if there is none, it is damaged, or the archive has changed since."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    start, checksum = len(FORMAT) + 4, content[len(FORMAT) : len(FORMAT) + 4]
    if not content.startswith(FORMAT) or zlib.crc32(memoryview(content)[start:]).to_bytes(4, "big") != checksum:
        return None
    table = pa.ipc.open_stream(pa.py_buffer(content).slice(start)).read_all()
    about = json.loads(table.schema.metadata[b"about"])
    if about.pop("stamp") != stamp:
        return None
    counts = (tuple(about[name]) for name in COUNTS)
    return TarIndex(table, about["damage"], *counts)


def _save_index(index: TarIndex, place: Path, stamp: str) -> None:
    about = {"stamp": stamp, "damage": index.damage, **{name: getattr(index, name) for name in COUNTS}}
    table = index.table.replace_schema_metadata({"about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 4096)
    content = sink.getvalue()
    try:
        with shared_file(place) as fresh, fresh.open("wb") as file:
            file.write(FORMAT + zlib.crc32(content).to_bytes(4, "big"))
            file.write(content)
    except OSError as error:
        raise MiniClipError(
            f"indexes of shards cannot be stored in {place.parent}: {error.strerror or error}; free some space, or "
            "let HF_HOME name another disk"
        ) from error


# --- compressed archives --------------------------------------------------------------------------------------------


def compressed_by(path: str) -> str:
    """The program that compressed a file, "" if none did.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    return next((program for magic, (_, program) in COMPRESSIONS.items() if start.startswith(magic)), "")


def compressed_message(path: str, program: str) -> str:
    """What to do about a compressed archive."""
    return (
        f"a compressed tar archive, whose images can only be read one after another; unpack it: {program} -d "
        f"{name_of(path)}"
    )


def open_compressed(path: str, program: str) -> BinaryIO:
    """A compressed archive, decompressed while it is read.

    Raises:
        DataError: nothing here decompresses it.
    """
    reader = next(reader for reader, each in COMPRESSIONS.values() if each == program)
    if reader is None:
        raise DataError(Problem("unusable", compressed_message(path, program), name_of(path)))
    return reader(path, "rb")


class PackedArchive:
    """Reads images of compressed archives in the order of their members: each archive is decompressed once."""

    def __init__(self) -> None:
        self._path = ""
        self._content: BinaryIO | None = None

    def read_now(self, path: str, program: str, start: int, size: int) -> Callable[[], bytes]:
        """Read a member.

        Args:
            path: path of the archive.
            program: the program that compressed it.
            start, size: place of the member in the decompressed archive.

        Returns:
            A function that returns the member, or raises why it cannot be read.
        """
        try:
            if self._content is None or path != self._path:
                if self._content is not None:
                    self._content.close()
                self._path, self._content = path, open_compressed(path, program)
            self._content.seek(start)
            member = self._content.read(size)
        except Exception as error:  # of the libraries that decompress
            return partial(_raise, error)
        return lambda: member


def _raise(error: Exception) -> bytes:
    raise error


# --- which members belong together ----------------------------------------------------------------------------------


def build_index(file: BinaryIO, caption_column: str = "caption") -> TarIndex:
    """Scan the headers of an archive and read its texts.

    Args:
        file: archive, opened in binary mode, perhaps decompressed while it is read.
        caption_column: key of the caption in JSON members.

    Raises:
        OSError: it cannot be read.
    """
    pictures: list[Member] = []
    texts: list[tuple[str, bytes]] = []
    links: list[Member] = []
    damage = ""
    try:
        for member in find_members(file):
            name = _clean(member.name)
            suffix = "." + name.rpartition(".")[2].lower()
            if (suffix not in BY_SUFFIX and suffix not in TEXTS) or is_hidden_path(name):
                continue
            if suffix in BY_SUFFIX:
                (links if member.link else pictures).append(member._replace(name=name))
            elif not member.link:
                file.seek(member.start)
                texts.append((name, file.read(member.size)))
    except DamagedArchive as error:
        damage = str(error)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        damage = f"its compressed data is damaged: {one_line(error)}"
    if links:
        pictures = _resolve_links(pictures, links)
    return _join(pictures, texts, caption_column, damage)


def _clean(name: str) -> str:
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def _resolve_links(pictures: list[Member], links: list[Member]) -> list[Member]:
    """Pictures together with hard links to them, in the order of the archive."""
    places = {member.name: member for member in pictures}
    linked = []
    for link in links:
        target = places.get(_clean(link.link))
        if target is not None:
            linked.append((link.start, link._replace(start=target.start, size=target.size, link=target.name)))
    everything = [*((member.start, member) for member in pictures), *linked]
    return [member for _, member in sorted(everything, key=lambda each: each[0])]


def _join(pictures: list[Member], texts: list[tuple[str, bytes]], caption_column: str, damage: str) -> TarIndex:
    found = [_Text() for _ in pictures]
    by_stem: dict[str, list[int]] = defaultdict(list)
    by_key: dict[str, list[int]] = defaultdict(list)
    occurrences = _occurrences(member.name for member in pictures)
    for i, (member, number) in enumerate(zip(pictures, occurrences, strict=True)):
        by_stem[_numbered(_stem(member.name), number)].append(i)
        by_key[_numbered(_key(member.name), number)].append(i)
    lost, unreadable, no_lists = [], [], []
    for (name, content), number in zip(texts, _occurrences(name for name, _ in texts), strict=True):
        targets = _images_of(name, number, by_stem, by_key)
        if not targets and number:
            targets = _images_of(name, 0, by_stem, by_key)
        text = _read_text(name, content, caption_column)
        if text is None:
            unreadable.append(name)
        elif not targets and (text.captions or text.values):
            lost.append(name)
        else:
            no_lists += [name] * text.has_no_list
            for i in targets:
                _add(found[i], text)
    for i, number in enumerate(occurrences):
        if number and found[i] == _Text():  # the picture was added again, its text was not
            stem = _stem(pictures[i].name)
            found[i] = next((found[j] for j in by_stem[stem] if pictures[j].name == pictures[i].name), found[i])
    names = _unique_names(pictures, occurrences, by_key, by_stem)
    rows = {
        "name": [name_of(name) for name in names],
        "member": [name_of(member.link or member.name) for member in pictures],
        "start": [member.start for member in pictures],
        "size": [member.size for member in pictures],
        "captions": [join_captions(text.values, text.captions) for text in found],
        "group": [text.group for text in found],
        "split": [text.split for text in found],
        "negatives": [text.negatives for text in found],
    }
    return TarIndex(pa.table(rows, SCHEMA), damage, _first(lost), _first(unreadable), _first(no_lists))


def _first(names: list[str]) -> tuple[int, str]:
    return len(names), name_of(names[0]) if names else ""


def _occurrences(names: Iterable[str]) -> list[int]:
    """How often each name came before, so far."""
    before: Counter[str] = Counter()
    numbers = []
    for name in names:
        numbers.append(before[name])
        before[name] += 1
    return numbers


def _numbered(text: str, number: int) -> str:
    return f"{text}\0{number}" if number else text


def _stem(name: str) -> str:
    """The name without its suffix."""
    return name.rpartition(".")[0]


def _key(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _images_of(name: str, number: int, by_stem: dict[str, list[int]], by_key: dict[str, list[int]]) -> list[int]:
    """Images that a text belongs to, by the rule at the top of this file."""
    stem = whole = _stem(name)
    key = _key(name)
    while True:
        images = by_stem.get(_numbered(stem, number))
        if images:
            return images
        if len(stem) <= len(key):
            break
        stem = stem.rpartition(".")[0]
    images = by_key.get(_numbered(key, number), [])
    return images if len(images) == 1 or whole == key else []


def _read_text(name: str, content: bytes, caption_column: str) -> _Text | None:
    """What a text member says; None if it is not UTF-8 or not JSON."""
    try:
        text = content.decode("utf-8-sig").strip()
        if name.lower().endswith(".txt"):
            return _Text(values=[text] if text else [])
        record = json.loads(text)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()  # fails at a lone surrogate, such as "\ud800"
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return _Text(captions=captions_of_record({caption_column: record}, caption_column))
    group, split = group_and_split(record)
    found = _Text(captions=captions_of_record(record, caption_column), group=group, split=split)
    try:
        found.negatives = negatives_of(record.get(NEGATIVES))
    except ValueError:
        found.has_no_list = True
    return found


def group_and_split(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Group and split of an image by the record about it; None for what that does not say."""
    group, split = record.get("group"), record.get("split")
    split = SPLIT_ALIASES.get(split.lower(), split.lower()) if isinstance(split, str) else None
    group = str(group) if isinstance(group, str | int) and group != "" else None
    return group, split if split in SPLITS else None


def _add(text: _Text, more: _Text) -> None:
    text.captions += more.captions
    text.values += more.values
    text.negatives += more.negatives
    text.group = text.group if text.group is not None else more.group
    text.split = text.split if text.split is not None else more.split


def _unique_names(
    pictures: list[Member], occurrences: list[int], by_key: dict[str, list[int]], by_stem: dict[str, list[int]]
) -> list[str]:
    """The shortest name of each picture that no other one has: its key, its stem, or all of its name."""
    names, taken = [], set[str]()
    for member, number in zip(pictures, occurrences, strict=True):
        key, stem = _key(member.name), _stem(member.name)
        name = next((short for short, all_ in ((key, by_key), (stem, by_stem)) if len(all_[short]) == 1), member.name)
        name = f"{member.name}#{number + 1}" if number else name
        while name in taken:
            name += "#"
        taken.add(name)
        names.append(name)
    return names
