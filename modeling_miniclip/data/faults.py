"""Sources that cannot be read, are damaged, or change while they are read: an error of one line, or fewer rows."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError, Problem
from ..utils.names import name_of
from .problems import raise_problem
from .rows import ReadOptions
from .shards.remote_files import is_url
from .source_kinds import Kind
from .tables.table import About
from .tables.table_cache import digest_of


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Within the block, what cannot be read in a source is an error of one line.

    Raises:
        DataError: a file or folder cannot be read.
    """
    try:
        yield
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}; check its permissions and its disk"
        raise DataError(Problem("unusable", text, name_of(error.filename or source))) from error


@contextmanager
def unchanged(source: str, kind: Kind, options: ReadOptions, inputs: str) -> Iterator[None]:
    """Within the block, a source that changes is an error: its rows may be partly of before and partly of after.

    Args:
        source, kind, options: the source.
        inputs: hash of what its rows depended on before the block.

    Raises:
        DataError: it changed. If that made something else fail, it is raised from that error.
    """
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    if kind.has_cheap_inputs and not is_url(source) and _inputs_now(source, kind, options) != inputs:
        text = "changed while it was read; start again when it is complete"
        raise DataError(Problem("unusable", text, source)) from failed
    if failed is not None:
        raise failed


def _inputs_now(source: str, kind: Kind, options: ReadOptions) -> str | None:
    try:
        return digest_of(kind.inputs(source, options))
    except (OSError, DataError):  # it is not there any more
        return None


def leave_out_damaged(problem: Problem) -> None:
    """Like [`raise_problem`], except that a damaged shard costs only its own images."""
    if problem.kind != "damaged-shard":
        raise_problem(problem)


def check_damaged(source: str, about: About, limit: float) -> None:
    """Check how many shards of a table are damaged; each counts as a whole, as nobody knows what it has lost.

    Raises:
        DataError: more than this fraction of them are.
    """
    shards = {file for file, _ in about.files} | set(about.damaged)
    if len(about.damaged) > limit * len(shards):
        problem, *_ = about.damaged.values()
        if not limit:
            raise DataError(problem)
        raise DataError(
            f"{len(about.damaged)} of {len(shards)} shards of {source} are damaged, the first one: {problem}. "
            f"--max_bad_image_fraction {limit:g} allows {limit:.2%}: copy them again (`miniclip check` lists them "
            "all) or raise it"
        )
