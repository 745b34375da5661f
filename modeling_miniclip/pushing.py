"""An export's way to the Hub: tried on a temporary branch, loaded from there, then one commit on the target."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UsageError
from .hub import rename_card
from .resources import PACKAGE

VERIFICATION_TIMEOUT = 1800  # seconds that downloading and loading what was uploaded may take


def prepare_push(repo_id: str | None, output_dir: str | os.PathLike, private: bool = False) -> str:
    """Create the repository before any long work, so that a missing token or right is known at once.

    Args:
        repo_id: `user/name`, or a name alone for the token's user; None takes the output folder's name.
        output_dir: of the run.
        private: whether a new repository is private.

    Returns:
        The full repository id.

    Raises:
        UsageError: no token, no right to write, no valid name, or no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    name = repo_id or Path(output_dir).resolve().name
    advice = "Check --hub_model_id and the token's rights, or train without --push_to_hub and push later"
    if get_token() is None:
        raise UsageError(
            f"--push_to_hub: no token to create {name} with. Log in by `hf auth login` or set HF_TOKEN, with a token "
            "that may write; or train without --push_to_hub and push later"
        )
    with _told(f"--push_to_hub: {name} cannot be created or written", advice):
        full_name = HfApi().create_repo(name, private=private, exist_ok=True).repo_id
        # Where the repository is there already, nothing was asked of the token so far. This asks, and writes nothing.
        HfApi().preupload_lfs_files(full_name, [CommitOperationAdd("README.md", b"---\n---\n")])
    return full_name


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    message: str = "Upload MiniCLIP model",
    revision: str | None = None,
) -> str:
    """Upload an export, make sure that it loads, then publish it as one commit.

    The files go to a temporary branch first. A fresh process loads that branch by the Auto classes, with the code that
    was uploaded, and compares its logits with those of the folder, bit for bit. Then the same files become one commit
    on the target, and the branch is deleted. Whatever fails before, the target is as it was.

    The card that goes up names the repository, whatever it was called before.

    Args:
        folder: of [`export`].
        repo_id: `user/name`; created if it is not there.
        private: whether a new repository is private.
        message: of the commit.
        revision: branch to commit to; created if it is not there. None: the main branch.

    Returns:
        Address of the commit.

    Raises:
        UsageError: the folder is no export, or the Hub does not take it, or what it took does not load; the message
            says which. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    root = Path(folder)
    if not (root / "config.json").is_file():
        raise UsageError(f"{folder} is not an export: it has no config.json")
    api = HfApi()
    advice = f"The model is safe in {folder}: try again by `miniclip push {folder} {repo_id}`"
    with _told(f"{folder} cannot be pushed to {repo_id}", advice):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = _head(api, repo_id, revision or "main")
    branch = f"upload-{secrets.token_hex(4)}"
    target = f"{repo_id} is as it was. {advice}"
    try:
        with _told(f"{folder} cannot be uploaded to {repo_id}, branch {branch}", target):
            api.create_branch(repo_id, branch=branch, revision=head)
            staged = api.create_commit(repo_id, _operations(root, repo_id), commit_message=message, revision=branch)
        _verify(root, repo_id, staged.oid, target)
        with _told(f"{folder} was uploaded, but cannot be committed to {repo_id}", advice):
            if head is None:
                api.create_branch(repo_id, branch=str(revision))
            commit = api.create_commit(
                repo_id,
                _operations(root, repo_id),  # their contents are on the Hub already
                commit_message=message,
                revision=revision,
                parent_commit=head,  # refused if somebody else committed in the meantime
            )
    finally:
        _delete_branch(api, repo_id, branch)
    return str(commit.commit_url)


def _head(api: Any, repo_id: str, revision: str) -> str | None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.repo_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        return None


def _operations(root: Path, repo_id: str) -> list[Any]:
    """Every file of the export but hidden ones, the card under the repository's name."""
    from huggingface_hub import CommitOperationAdd

    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    contents: dict[str, Any] = {name: str(root / name) for name in names if "/." not in f"/{name}"}
    if "README.md" in contents:
        contents["README.md"] = rename_card((root / "README.md").read_text(encoding="utf-8"), repo_id).encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _verify(root: Path, repo_id: str, commit: str, advice: str) -> None:
    """Load a commit in a process of its own, from an empty cache, and compare it with the folder.

    Raises:
        UsageError: it does not load, or gives other logits.
    """
    argv = [sys.executable, "-m", "modeling_miniclip.verification", str(root.resolve()), repo_id, commit]
    with tempfile.TemporaryDirectory(prefix="miniclip-push-") as cache:
        python_path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        env = {"HF_HUB_CACHE": cache, "HF_MODULES_CACHE": f"{cache}/modules", "PYTHONPATH": python_path}
        try:
            done = subprocess.run(
                argv, env=os.environ | env, capture_output=True, text=True, timeout=VERIFICATION_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            reason = f"it was not loaded within {VERIFICATION_TIMEOUT} seconds"
        else:
            if done.returncode == 0:
                return
            reason = (done.stderr.strip().splitlines() or ["the process ended without a word"])[-1]
    raise UsageError(f"what was uploaded to {repo_id} was not published: {_clean(reason)}. {advice}")


def _delete_branch(api: Any, repo_id: str, branch: str) -> None:
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    try:
        api.delete_branch(repo_id, branch=branch)
    except RevisionNotFoundError:  # it was never made
        pass
    except (HTTPError, OSError) as error:
        warnings.warn(
            f"the temporary branch {branch} of {repo_id} cannot be deleted ({_clean(str(error))}): delete it on the "
            "Hub's page of the repository",
            stacklevel=3,
        )


@contextmanager
def _told(what: str, advice: str) -> Iterator[None]:
    """Errors of the Hub's client in the package's own words, without the token, which some of them carry."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = f": {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""
        raise UsageError(f"{what}: {_clean(f'{error}{cause}')}. {advice}") from None


def _clean(text: str) -> str:
    """An error's text in one line, without the token that some of them carry."""
    text = re.sub(r"Bearer [^'\"]*", "Bearer ***", " ".join(text.split()))
    return re.sub(r"For more information check: \S+ ?", "", text).rstrip(".")
