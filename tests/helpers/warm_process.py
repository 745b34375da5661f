"""A process that has imported the heavy libraries, but not this package, and forks to run code for the tests.

Run as a script. It reads one request per line from stdin, and answers each with the exit code of the fork. Starting
Python and importing torch, timm and transformers takes seconds; a fork of this process has them already.
"""

import atexit
import importlib
import json
import os
import sys
import threading
import traceback
import types
from typing import Any


def preload() -> None:
    """Import what nearly every program of the tests needs."""
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


def main() -> None:
    """Serve requests until stdin is closed."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run_code(request))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
