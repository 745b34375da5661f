"""The rows of a remote archive without the archive: from the table that img2dataset writes next to it.

`00000.parquet` next to `00000.tar` has a row for each image that img2dataset tried to download. Where an image is in
the archive shows when that is fetched to be trained on. (`00000_stats.json`, and `sizes.json` of other programs, only
count images. Rows need captions, so a count would spare nobody the pass over all archives.)
"""

import zlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import DataError
from ..columns import NEGATIVES
from ..readers.record_captions import join_captions, negatives_of, texts_of
from .remote_files import UnreachableError, explained, file_system
from .shard_url import UNPLACED
from .tar_index import SCHEMA, TarIndex, group_and_split

KEY, STATUS, CAPTION = "key", "status", "caption"  # columns of img2dataset


def read_sidecar(shard: str, caption_column: str = CAPTION) -> TarIndex | None:
    """The images of an archive that img2dataset wrote, in its order; None without a table next to it.

    Args:
        shard: URL of the archive.
        caption_column: column of the captions.

    Raises:
        UnreachableError: the server cannot be reached.
    """
    url = f"{shard.removesuffix('.tar')}.parquet"
    try:
        with explained(url):
            files, path = file_system(url)
            content = files.cat_file(path)
        return _index_of(pq.ParquetFile(pa.BufferReader(content)), caption_column)
    except UnreachableError:
        raise
    except (DataError, pa.ArrowException):
        return None


def _index_of(file: pq.ParquetFile, caption_column: str) -> TarIndex | None:
    """The images of the archive next to a table; None if the table is another one."""
    names = file.schema_arrow.names
    if not {KEY, STATUS, caption_column} <= set(names) or any(map(pa.types.is_binary, file.schema_arrow.types)):
        return None
    wanted = dict.fromkeys((KEY, STATUS, CAPTION, caption_column, "group", "split", NEGATIVES))
    table = file.read([name for name in wanted if name in names])
    rows: list[dict[str, Any]] = table.filter(pc.equal(table[STATUS], "success")).to_pylist()
    keys = [str(row[KEY]) for row in rows]
    if len(set(keys)) < len(keys):
        return None
    captions = [join_captions(texts_of(row.get(CAPTION)), texts_of(row[caption_column])) for row in rows]
    negatives, no_lists = list[list[str]](), list[str]()
    for key, row in zip(keys, rows, strict=True):
        try:
            negatives.append(negatives_of(row.get(NEGATIVES)))
        except ValueError:
            negatives.append([])
            no_lists.append(key)
    groups, splits = zip(*map(group_and_split, rows), strict=True) if rows else ((), ())
    columns: dict[str, Any] = {
        "name": keys,
        "member": keys,
        "start": [zlib.crc32(key.encode()) for key in keys],  # tells the images of a shard apart
        "size": [UNPLACED] * len(keys),
        "captions": captions,
        "group": groups,
        "split": splits,
        "negatives": negatives,
    }
    return TarIndex(pa.table(columns, SCHEMA), no_lists=(len(no_lists), "".join(no_lists[:1])))
