"""Give an export of an earlier release the code of this one, so that older releases of transformers can run it."""

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from ..errors import ModelError, one_line
from ..utils.files import check_new_folder, replaced_folder
from ..utils.resources import PACKAGE

CLASSES = ("configuration_miniclip.py", "modeling_miniclip.py", "processing_miniclip.py")  # in exports of any release
CODE = (*CLASSES, "loss_miniclip.py", "pictures_miniclip.py")  # all that travels
FILES = ["*.json", "*.md", "*.safetensors", "*.txt"]  # all that an export consists of, but for the code
NEWEST_ONLY = "SubConfigSpec"  # imported by the code that transformers before 5.23 could not run


def renew_code(source: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Copy an export, with the code of this release in place of its own. Weights, processor and card stay as they are.

    Args:
        source: folder of the export, or its repository on the Hub.
        folder: folder to write; must not exist, or be empty.

    Returns:
        Path of the folder.

    Raises:
        UsageError: the folder is not empty.
        ModelError: the source is no export, or cannot be downloaded.
    """
    target, path = Path(folder), Path(source)
    check_new_folder(target, "--code ")
    if not path.is_dir():
        try:
            path = Path(snapshot_download(os.fspath(source), allow_patterns=[*FILES, *CODE]))
        except (HFValidationError, HTTPError, OSError, ValueError) as error:
            raise ModelError(f"{source}: neither a folder nor a model on the Hub: {one_line(error)}") from error
    if not (path / "config.json").is_file() or not all((path / name).is_file() for name in CLASSES):
        raise ModelError(f"{source} is not an export: it has no config.json, or no {', '.join(CLASSES)}")
    with replaced_folder(target) as fresh:
        shutil.copytree(path, fresh, dirs_exist_ok=True)
        for name in CODE:
            (fresh / name).unlink(missing_ok=True)
            shutil.copyfile(PACKAGE / name, fresh / name)
    return target


def check_code(folder: Path) -> None:
    """Check that older releases of transformers can run the code of an export.

    Raises:
        ModelError: they cannot; the message has the command that helps.
    """
    code = folder / CLASSES[0]
    if code.is_file() and NEWEST_ONLY in code.read_text(encoding="utf-8", errors="replace"):
        new = f"{folder}-new"
        raise ModelError(
            f"{folder}: its code is that of an earlier MiniCLIP, which transformers before 5.23 cannot run: write it "
            f"again with `miniclip export {folder} --code {new}`, then push {new}"
        )
