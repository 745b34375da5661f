"""Leave a process as it was before a run: seeds, threads, environment, signal handlers, memory."""

import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data._utils import signal_handling
from tqdm import tqdm

from ..errors import UsageError
from ..utils.performance import keeps_freed_memory, return_freed_memory

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGCHLD") if hasattr(signal, name)]
STATES = (PartialState, AcceleratorState, GradientState)  # of accelerate: each is shared by all its instances

_running = threading.Lock()


@contextmanager
def clean_process() -> Iterator[None]:
    """Within the block a run finds this process as if it were a new one; afterwards the process is as it was before.

    Raises:
        UsageError: another thread is in such a block.
    """
    if not _running.acquire(blocking=False):
        raise UsageError("`train` is running in another thread of this process; wait until it ends, or use processes")
    try:
        with ExitStack() as stack:
            for kept in (
                _memory, _environment, _random_state, _torch_settings, _signal_handlers, _accelerate_state,
                _progress_bars,
            ):  # fmt: skip
                stack.enter_context(kept())
            yield
    finally:
        _running.release()


@contextmanager
def _memory() -> Iterator[None]:
    keeps = keeps_freed_memory()
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
        if not keeps:
            return_freed_memory()


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # as `train_miniclip.py` does, when it is imported first
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextmanager
def _random_state() -> Iterator[None]:
    on_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpus else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu_states is not None:
            torch.cuda.set_rng_state_all(gpu_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def _torch_settings() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)


@contextmanager
def _signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    is_set = signal_handling._SIGCHLD_handler_set  # torch sets one when the first loader process starts
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler and handler is not None:  # None: it was not set from Python
                    signal.signal(number, handler)
            signal_handling._SIGCHLD_handler_set = is_set


@contextmanager
def _accelerate_state() -> Iterator[None]:
    """Accelerate's choice of device and processes; the processes of a launcher stay joined."""
    if _is_joined():
        yield
        return
    before: list[dict[str, Any]] = [dict(state._shared_state) for state in STATES]
    for state in STATES:
        state._shared_state.clear()
    try:
        yield
    finally:
        if not _is_joined():
            for state, values in zip(STATES, before, strict=True):
                state._shared_state.clear()
                state._shared_state.update(values)


@contextmanager
def _progress_bars() -> Iterator[None]:
    before = set(vars(tqdm)["_instances"])  # there is no public name for it
    try:
        yield
    finally:
        for bar in set(vars(tqdm)["_instances"]) - before:  # of a run that an error or a second interrupt ended
            bar.close()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()
