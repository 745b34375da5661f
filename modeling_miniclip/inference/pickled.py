"""What to do about pickled weights, which are never read here: a pickle can hold any program."""

import glob
import json
import os
import shlex
from fnmatch import fnmatch
from pathlib import Path

from ..errors import ModelError

PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")  # the first pattern that fits is taken
CONVERSION = (
    "import glob, torch; from safetensors.torch import save_file; save_file({name: tensor.clone().contiguous() "
    'for file in glob.glob(%s) for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items()}, '
    '%s, {"format": "pt"})'
)


def reject_pickled(flag: str, source: str) -> None:
    """Raise an error with the command that converts the weights, if a model has nothing but pickled ones.

    Args:
        flag: flag or argument that named the model, for the message.
        source: folder of a model, or its repository on the Hub.

    Raises:
        ModelError: it has pickled weights and no safetensors.
    """
    names = _file_names(source)
    found = next((pattern for pattern in PICKLED if any(fnmatch(name, pattern) for name in names)), None)
    if found is None or any(name.endswith(".safetensors") for name in names):
        return
    pickled = next(name for name in names if fnmatch(name, found))
    folder, download = source, ""
    if not os.path.isdir(source):
        folder = source.rpartition("/")[2]
        download = f"hf download {shlex.quote(source)} --local-dir {shlex.quote(folder)} && "
    files = os.path.join(glob.escape(folder), found if found == PICKLED[0] else glob.escape(pickled))
    code = CONVERSION % (json.dumps(files), json.dumps(os.path.join(folder, "model.safetensors")))
    raise ModelError(
        f"{flag} {source}: pickled weights ({pickled}) are not read, as a pickle can hold any program; convert them "
        f"with {download}python -c {shlex.quote(code)}" + (f" and pass {flag} ./{folder}" if download else "")
    )


def _file_names(source: str) -> list[str]:
    """Names of the files of a model; none if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    if os.path.isdir(source):
        return sorted(path.name for path in Path(source).iterdir())
    try:
        return sorted(HfApi().list_repo_files(source))
    except (HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, OSError):
        return []
