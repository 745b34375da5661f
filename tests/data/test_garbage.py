"""The garbage collector while many objects come and go."""

import gc

import pytest

from modeling_miniclip.data.tables.garbage import only_new_garbage


def test_older_objects_are_set_aside_within_the_block_only() -> None:
    gc.unfreeze()  # what the runner of the tests froze
    with pytest.raises(KeyError), only_new_garbage():
        assert gc.get_freeze_count() > 1000
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_objects_that_someone_else_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        with only_new_garbage(), only_new_garbage():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
