"""A process that has imported the heavy libraries, but not this package, and forks to run code for the tests.

It reads one request per line, and answers each with the exit code of the fork. Starting Python and importing torch,
timm and transformers takes seconds; a fork of this process has them already. A worker of pytest-xdist forks it before
it collects tests, since it needs these imports itself; without workers it is a script, started when first needed.
"""

import atexit
import gc
import importlib
import json
import os
import sys
import threading
import traceback
import types
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple


def preload() -> None:
    """Import what nearly every program of the tests needs."""
    with suppress(ImportError):
        import deepspeed  # noqa: F401  (accelerate imports it, where it is installed, when a model is saved)
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    from huggingface_hub import HfApi, ModelCard, snapshot_download  # noqa: F401
    from transformers import (  # noqa: F401
        AutoConfig,
        AutoModel,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
        AutoTokenizer,
        CLIPImageProcessorPil,
        DistilBertModel,
        ProcessorMixin,
        TimmWrapperModel,
        dynamic_module_utils,
    )


def read_environment_again() -> None:
    """Let the Hugging Face libraries take their settings from `os.environ` once more, as a new process would."""
    from huggingface_hub import constants, hf_api
    from transformers import dynamic_module_utils, utils

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for module in (utils, utils.hub, dynamic_module_utils):
        module.HF_MODULES_CACHE = modules


def run_code(request: dict[str, Any]) -> int:
    """Run code as `python -c` would; returns the exit code.

    Args:
        request: `code`, its `arguments`, working folder `cwd`, environment `env`, and the files `stdout` and `stderr`
            to write.
    """
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), descriptor)
    sys.stdin = open(0, closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    search_path = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["", *search_path]  # in place of this script's folder
    sys.argv = ["-c", *request["arguments"]]
    read_environment_again()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(requests: Iterable[str], answers: IO[str]) -> None:
    """Run what is requested, each in a fork, until there are no more requests."""
    gc.freeze()  # what was imported is no garbage of the forks
    gc.enable()
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run_code(request))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


class Pipes(NamedTuple):
    """The ends of a warm process that a test holds."""

    pid: int
    requests: IO[str]
    answers: IO[str]


# Of this worker; None without workers, or before `fork_warm_process`.
forked: Pipes | None = None


def fork_warm_process() -> None:
    """Import the libraries and fork a warm process; to be called before this package is imported."""
    global forked
    assert "modeling_miniclip" not in sys.modules
    preload()
    from_test, to_test = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _serve_in_fork(from_test[0], to_test[1])
        finally:
            os._exit(0)
    os.close(from_test[0])
    os.close(to_test[1])
    forked = Pipes(pid, os.fdopen(from_test[1], "w"), os.fdopen(to_test[0]))


def _serve_in_fork(requests: int, answers: int) -> None:
    for descriptor in range(3, 1024):  # pytest's, whose other ends wait until everybody has closed them
        if descriptor not in (requests, answers):
            try:
                os.close(descriptor)
            except OSError:
                continue
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    root = str(Path(__file__).resolve().parents[2])
    sys.path[:] = ["", *(path for path in sys.path if path not in ("", root)), root]  # as in a new process
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as file:
        serve(lines, file)


def main() -> None:
    """Serve requests from stdin until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print while they are imported
    preload()
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
