"""A run leaves its process as it found it."""

import ctypes
import os
import random
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data._utils import signal_handling
from tqdm.auto import tqdm

from modeling_miniclip.api.clean_process import SIGNALS, clean_process
from modeling_miniclip.utils import performance
from modeling_miniclip.utils.performance import keep_freed_memory


def state_of_process() -> list[object]:
    return [
        dict(os.environ),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        [signal.getsignal(number) for number in SIGNALS],
        signal_handling._SIGCHLD_handler_set,
        dict(PartialState._shared_state),
        dict(AcceleratorState._shared_state),
        performance.keeps_freed_memory(),
    ]


def change_everything() -> None:
    os.environ["MINICLIP_TEST"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "another"
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal_handling._set_SIGCHLD_handler()
    keep_freed_memory()


@pytest.fixture
def without_sigchld_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no loader process has run; an earlier test may have started one."""
    if not hasattr(signal, "SIGCHLD"):
        pytest.skip("this system has no such signal")
    AcceleratorState._reset_state(reset_partial_state=True)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    monkeypatch.setattr(performance, "_keeps_freed_memory", False)
    yield
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def test_everything_is_as_before(without_sigchld_handler: None) -> None:
    before = state_of_process()
    with pytest.raises(LookupError), clean_process():
        assert PartialState._shared_state == {} and AcceleratorState._shared_state == {}
        Accelerator(cpu=True)
        change_everything()
        now = state_of_process()
        assert all(one != other for one, other in zip(before, now, strict=True))
        raise LookupError
    assert state_of_process() == before


def test_an_accelerator_of_the_program_is_kept() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(cpu=True, mixed_precision="bf16").state
    with clean_process():
        assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
    assert mine.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def mapped_blocks() -> int:
    """Number of memory blocks that glibc has mapped for large tensors."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in
                    ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")]  # fmt: skip

    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = Info
    return int(mallinfo().hblks)


def is_mapped() -> bool:
    """Whether glibc maps a tensor of 1 GB, which is not touched, as it does by default."""
    before = mapped_blocks()
    tensor = torch.empty(2**30, dtype=torch.uint8)
    return mapped_blocks() - before == 1 and len(tensor) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_allocator_has_its_defaults_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if not keep_freed_memory():
        pytest.skip("no glibc")
    monkeypatch.setattr(performance, "_keeps_freed_memory", False)
    assert not is_mapped()
    with clean_process():
        keep_freed_memory()
    assert is_mapped()
    keep_freed_memory()
    with clean_process():
        keep_freed_memory()
    assert not is_mapped(), "the program had chosen it"
    performance.return_freed_memory()


def test_another_thread_may_use_it() -> None:
    errors: list[BaseException] = []

    def use() -> None:
        try:
            with clean_process():
                random.seed(3)
        except BaseException as error:
            errors.append(error)

    before = random.getstate()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join(10)
    assert not errors and random.getstate() == before


def test_the_bar_of_a_failed_run_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    mine = tqdm(total=3, disable=False)
    with pytest.raises(LookupError), clean_process():
        left = tqdm(total=3, disable=False)
        raise LookupError
    assert left not in tqdm._instances and mine in tqdm._instances
    mine.close()
