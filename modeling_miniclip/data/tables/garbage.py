"""Python's garbage collector while millions of objects come and go."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Within the block, the garbage collector looks only at objects that are created in it.

    Reading millions of rows sets it off again and again, and with the libraries loaded, looking at everything that
    exists takes longer than reading. Where objects are frozen already (`gc.freeze`), nothing changes.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
