"""An export's way to the Hub: tried on a temporary branch, loaded from there, then one commit on the target."""

import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError

from ..configuration_miniclip import MiniClipConfig
from ..errors import MiniClipError, ModelError, one_line
from ..utils.resources import PACKAGE
from .model_card import rename_card

VERIFICATION_TIMEOUT = 1800  # seconds that downloading and loading what was uploaded may take
HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # what its client raises; RuntimeError: of an upload


@dataclass(frozen=True)
class Target:
    """A branch to push to, with the commit that a push builds upon: the branch's own, or main's if it `is_new`."""

    repo_id: str
    branch: str
    start: str
    is_new: bool


def prepare_push(
    repo_id: str | None, output_dir: str | os.PathLike, private: bool = False, revision: str | None = None
) -> str:
    """Create the repository before any long work, so that a missing token or right is known at once.

    Args:
        repo_id: `user/name`, or a name alone for the token's user; None takes the output folder's name.
        output_dir: of the run.
        private: whether the repository has to be private.
        revision: branch that will be committed to; None: the main branch.

    Returns:
        The full repository id.

    Raises:
        MiniClipError: no token, no right to write, no valid name, no connection, or nothing that [`push`] would push
            to.
    """
    api, name = HfApi(), repo_id or Path(output_dir).resolve().name
    advice = "Check the --hub_ flags and the token's rights, or train without --push_to_hub and push later"
    with hub_errors_as_miniclip_error(f"--push_to_hub: {name} cannot be created or written", advice):
        _check_token()
        full_name = api.create_repo(name, private=private, exist_ok=True).repo_id
        _find_target(api, full_name, private, revision or "main")
        # Where the repository is there already, nothing was asked of the token so far. This asks, and writes nothing.
        api.preupload_lfs_files(full_name, [CommitOperationAdd("README.md", b"---\n---\n")])
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
    was uploaded, and compares its logits with those of the folder, bit for bit. Then one request makes the same files
    a commit on the target, and the branch is deleted. Whatever fails, the target is as it was or has all of it.

    The card that goes up names the repository, whatever it was called before.

    Args:
        folder: of [`export`].
        repo_id: `user/name`; created if it is not there.
        private: whether the repository has to be private.
        message: of the commit.
        revision: branch to commit to; created if it is not there. None: the main branch.

    Returns:
        Address of the commit.

    Raises:
        MiniClipError: the folder is no export, the repository is public where a private one was asked for or holds
            another kind of model, the revision is no branch, the Hub does not take the upload, or what it took does
            not load; the message says which. The folder stays as it is.
    """
    root, api = Path(folder), HfApi()
    if not (root / "config.json").is_file():
        raise ModelError(f"{folder} is not an export: it has no config.json")
    command = ["miniclip", "push", str(folder), repo_id, *["--private"] * private]
    command += [] if revision is None else ["--revision", revision]
    safe = f"The model is safe in {folder}: try again by `{shlex.join(command)}`"
    with hub_errors_as_miniclip_error(f"{folder} cannot be pushed to {repo_id}", safe):
        _check_token()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        target = _find_target(api, repo_id, private, revision or "main")
    advice = f"Nothing that was in {repo_id} has changed. {safe}"
    with _temporary_branch(api, target, f"{folder} cannot be uploaded to {repo_id}", advice) as branch:
        with hub_errors_as_miniclip_error(f"{folder} cannot be uploaded to {repo_id}, branch {branch}", advice):
            files = _operations(root, repo_id)
            contents = [_content(file) for file in files]  # now: the client would read them when it needs them
            staged = api.create_commit(repo_id, files, commit_message=message, revision=branch).oid
        _verify(root, repo_id, staged, advice)
        again = _operations(root, repo_id)  # a second time, for the client takes them once only
        if [_content(file) for file in again] != contents:
            raise MiniClipError(f"the files in {folder} changed while they were uploaded. {advice}")
        try:
            commit = _publish(api, target, staged, again, message)
        except HUB_ERRORS as error:
            with hub_errors_as_miniclip_error(
                f"{folder} was uploaded, and whether {repo_id} took it cannot be asked", safe
            ):
                lost = _published(api, target, staged)
            if lost is None:
                what = f"{folder} was uploaded, but cannot be committed to {repo_id}"
                raise MiniClipError(f"{what}: {one_line(error)}. {advice}") from None
            commit = lost  # the answer, not the commit
    return f"{api.endpoint}/{repo_id}/commit/{commit}"


def _check_token() -> None:
    if get_token() is None:  # the Hub would answer that there is no such repository
        raise ValueError("there is no token; log in by `hf auth login` or set HF_TOKEN, with a token that may write")


def _find_target(api: HfApi, repo_id: str, private: bool, branch: str) -> Target:
    """Where a push goes.

    Raises:
        ValueError: that is no place for it.
    """
    refs = api.list_repo_refs(repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        if any(branch == tag.name for tag in refs.tags) or re.fullmatch(r"[0-9a-f]{40}", branch):
            raise ValueError(f"{branch} is a tag or a commit, and only to a branch can be committed")
        if not re.fullmatch(r"(?!refs/)\w[\w.-]*(/\w[\w.-]*)*", branch):
            raise ValueError(f"{branch!r} cannot be the name of a branch")
    target = Target(repo_id, branch, heads.get(branch, heads["main"]), branch not in heads)
    there = api.model_info(repo_id, revision=target.start)
    if private and not there.private:
        raise ValueError(
            "it is public already, and a private one was asked for: make it private in its settings on the Hub, or "
            "choose another name"
        )
    kind = (there.config or {}).get("model_type")
    if kind not in (None, MiniClipConfig.model_type):
        raise ValueError(f"it holds another kind of model ({kind}), and their files would mix: choose another name")
    return target


@contextmanager
def _temporary_branch(api: HfApi, target: Target, what: str, advice: str) -> Iterator[str]:
    """A branch for the time of a block. Whatever ends the block, it is deleted, or the user told that it is left."""
    branch, made = f"upload-{secrets.token_hex(4)}", True
    try:
        with hub_errors_as_miniclip_error(what, advice):
            try:
                api.create_branch(target.repo_id, branch=branch, revision=target.start)
            except HfHubHTTPError as error:
                made = error.response.status_code >= 500  # else it was refused; without an answer it may be there
                raise
        yield branch
    finally:
        if made:
            _delete_branch(api, target.repo_id, branch)


def _operations(root: Path, repo_id: str) -> list[CommitOperationAdd]:
    """Every file of the export but hidden ones, the card under the repository's name."""
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    contents: dict[str, str | bytes] = {name: str(root / name) for name in names if "/." not in f"/{name}"}
    if "README.md" in contents:
        contents["README.md"] = rename_card((root / "README.md").read_text(encoding="utf-8"), repo_id).encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _content(file: CommitOperationAdd) -> tuple[str, bytes]:
    return file.path_in_repo, file.upload_info.sha256


def _publish(api: HfApi, target: Target, staged: str, files: list[CommitOperationAdd], message: str) -> str:
    """Make what was staged the target's by one request; gives the target's commit."""
    if target.is_new:
        api.create_branch(target.repo_id, branch=target.branch, revision=staged)
        return staged
    return api.create_commit(
        target.repo_id,
        files,  # their contents are on the Hub already
        commit_message=message,
        revision=target.branch,
        parent_commit=target.start,  # refused if somebody else committed in the meantime
    ).oid


def _published(api: HfApi, target: Target, staged: str) -> str | None:
    """The target's commit if it has all that was staged."""
    trees = []
    for revision in (staged, target.branch):
        try:
            found = api.model_info(target.repo_id, revision=revision, files_metadata=True)
        except RevisionNotFoundError:
            return None
        trees.append({file.rfilename: file.blob_id for file in found.siblings or []})
    return found.sha if trees[0] == trees[1] else None


def _verify(root: Path, repo_id: str, commit: str, advice: str) -> None:
    """Load a commit in a process of its own, from an empty cache, and compare it with the folder.

    Raises:
        MiniClipError: it does not load, or gives other logits.
    """
    argv = [sys.executable, "-m", "modeling_miniclip.hub.verify_upload", str(root.resolve()), repo_id, commit]
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
    raise MiniClipError(f"what was uploaded to {repo_id} was not published: {one_line(reason)}. {advice}")


def _delete_branch(api: HfApi, repo_id: str, branch: str) -> None:
    try:
        api.delete_branch(repo_id, branch=branch)
    except RevisionNotFoundError:  # it was never made
        pass
    except (HTTPError, OSError) as error:
        warnings.warn(
            f"the temporary branch {branch} of {repo_id} cannot be deleted ({one_line(error)}): delete it on the "
            "Hub's page of the repository",
            stacklevel=4,
        )


@contextmanager
def hub_errors_as_miniclip_error(what: str, advice: str) -> Iterator[None]:
    """Errors of the Hub's client in the package's own words, without the token, which some of them carry."""
    try:
        yield
    except HUB_ERRORS as error:
        raise MiniClipError(f"{what}: {one_line(error)}. {advice}") from None
