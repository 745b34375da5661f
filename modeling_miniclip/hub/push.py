"""Push an export: upload it to a temporary branch, verify that it loads, then commit it to the target."""

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
from .renew_code import check_code

VERIFICATION_TIMEOUT = 1800  # seconds to download and load the uploaded model
HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # raised by the Hub's client; RuntimeError by uploads


@dataclass(frozen=True)
class Target:
    """The branch to push to, and the commit to build upon: the branch's head, or main's if the branch `is_new`."""

    repo_id: str
    branch: str
    start: str
    is_new: bool


def prepare_push(
    repo_id: str | None, output_dir: str | os.PathLike, private: bool = False, revision: str | None = None
) -> str:
    """Create the repository before any long work, so that a missing token or permission is known at once.

    Args:
        repo_id: `user/name`, or `name` for a repository of the token's user; None means the name of the output folder.
        output_dir: output folder of the run.
        private: whether the repository must be private.
        revision: branch to commit to later; None means the main branch.

    Returns:
        The full repository id, `user/name`.

    Raises:
        MiniClipError: there is no token, permission or connection, the name is not valid, or [`push`] would reject
            the repository.
    """
    api, name = HfApi(), repo_id or Path(output_dir).resolve().name
    advice = "Check the --hub_ flags and the token's rights, or train without --push_to_hub and push later"
    with hub_errors_as_miniclip_error(f"--push_to_hub: {name} cannot be created or written", advice):
        full_name = _open_target(api, name, private, revision).repo_id
        # If the repository already existed, the token has not been checked so far. This checks it and writes nothing.
        api.preupload_lfs_files(full_name, [CommitOperationAdd("README.md", b"---\n---\n")])
    return full_name


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    message: str = "Upload MiniCLIP model",
    revision: str | None = None,
) -> str:
    """Upload an export, verify that it loads, then publish it as one commit.

    The files first go to a temporary branch. A fresh process loads that branch with the Auto classes and the uploaded
    code, and compares its logits with those of the model in the folder, bit for bit. Then one request commits the same
    files to the target, and the temporary branch is deleted. Whatever fails, the target has either all of the files or
    none.

    The uploaded card names the repository, whatever the card in the folder says.

    Args:
        folder: folder written by [`export`].
        repo_id: `user/name`; created if it does not exist.
        private: whether the repository must be private.
        message: commit message.
        revision: branch to commit to, created if it does not exist; None means the main branch.

    Returns:
        URL of the commit.

    Raises:
        MiniClipError: the folder is not an export or its code is out of date, the repository is public although
            `private` is set or holds another kind of model, the revision is not a branch, the Hub rejects the upload,
            or the uploaded model does not load; the message says which. The folder stays as it is.
    """
    root, api = Path(folder), HfApi()
    if not (root / "config.json").is_file():
        raise ModelError(f"{folder} is not an export: it has no config.json")
    check_code(root)
    retry = _advice_to_retry(folder, repo_id, private, revision)
    with hub_errors_as_miniclip_error(f"{folder} cannot be pushed to {repo_id}", retry):
        target = _open_target(api, repo_id, private, revision)
    repo_id = target.repo_id
    advice = f"Nothing that was in {repo_id} has changed. {retry}"
    with _temporary_branch(api, target, f"{folder} cannot be uploaded to {repo_id}", advice) as branch:
        with hub_errors_as_miniclip_error(f"{folder} cannot be uploaded to {repo_id}, branch {branch}", advice):
            files = _operations(root, repo_id)
            contents = [_content(file) for file in files]  # read now; the client would read the files later
            staged = api.create_commit(repo_id, files, commit_message=message, revision=branch).oid
        _verify(root, repo_id, staged, advice)
        again = _operations(root, repo_id)  # again, because the client accepts an operation only once
        if [_content(file) for file in again] != contents:
            raise MiniClipError(f"the files in {folder} changed during the upload. {advice}")
        try:
            commit = _publish(api, target, staged, again, message)
        except HUB_ERRORS as error:
            commit = _commit_in_spite_of(error, api, target, staged, f"{folder} was uploaded, but", retry, advice)
    return f"{api.endpoint}/{repo_id}/commit/{commit}"


def _advice_to_retry(folder: str | os.PathLike, repo_id: str, private: bool, revision: str | None) -> str:
    command = ["miniclip", "push", str(folder), repo_id, *["--private"] * private]
    command += [] if revision is None else ["--revision", revision]
    return f"The model is safe in {folder}: try again with `{shlex.join(command)}`"


def _open_target(api: HfApi, repo_id: str, private: bool, revision: str | None) -> Target:
    """Create the repository unless it exists, and find the branch to push to; arguments as in [`push`].

    Raises:
        ValueError: there is no token, or the repository or branch is not one to push to.
    """
    if get_token() is None:  # without one, the Hub would answer that the repository does not exist
        raise ValueError(
            "there is no token; log in with `hf auth login` or set HF_TOKEN, with a token that has write access"
        )
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return _find_target(api, repo_id, private, revision or "main")


def _find_target(api: HfApi, repo_id: str, private: bool, branch: str) -> Target:
    """Find the branch to push to, and the commit to build upon.

    Raises:
        ValueError: the repository or branch is not one to push to.
    """
    refs = api.list_repo_refs(repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        if any(branch == tag.name for tag in refs.tags) or re.fullmatch(r"[0-9a-f]{40}", branch):
            raise ValueError(f"{branch} is a tag or a commit, but a push needs a branch")
        if not re.fullmatch(r"(?!refs/)\w[\w.-]*(/\w[\w.-]*)*", branch):
            raise ValueError(f"{branch!r} is not a valid name of a branch")
    target = Target(repo_id, branch, heads.get(branch, heads["main"]), branch not in heads)
    info = api.model_info(repo_id, revision=target.start)
    if private and not info.private:
        raise ValueError(
            "it is already public, but you asked for a private one: make it private in its settings on the Hub, or "
            "choose another name"
        )
    kind = (info.config or {}).get("model_type")
    if kind not in (None, MiniClipConfig.model_type):
        raise ValueError(f"it holds another kind of model ({kind}), and the files would mix: choose another name")
    return target


@contextmanager
def _temporary_branch(api: HfApi, target: Target, what: str, advice: str) -> Iterator[str]:
    """A branch that is deleted at the end of the block, even after an error; a warning reports it if that fails."""
    branch, may_exist = f"upload-{secrets.token_hex(4)}", True
    try:
        with hub_errors_as_miniclip_error(what, advice):
            try:
                api.create_branch(target.repo_id, branch=branch, revision=target.start)
            except HfHubHTTPError as error:
                may_exist = error.response.status_code >= 500  # after any other status it was not created
                raise
        yield branch
    finally:
        if may_exist:
            _delete_branch(api, target.repo_id, branch)


def _operations(root: Path, repo_id: str) -> list[CommitOperationAdd]:
    """Operations that add all files of the export except hidden ones, with the repository's name in the card."""
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    contents: dict[str, str | bytes] = {name: str(root / name) for name in names if "/." not in f"/{name}"}
    if "README.md" in contents:
        contents["README.md"] = rename_card((root / "README.md").read_text(encoding="utf-8"), repo_id).encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _content(file: CommitOperationAdd) -> tuple[str, bytes]:
    return file.path_in_repo, file.upload_info.sha256


def _publish(api: HfApi, target: Target, staged: str, files: list[CommitOperationAdd], message: str) -> str:
    """Commit the staged files to the target with one request; return the commit."""
    if target.is_new:
        api.create_branch(target.repo_id, branch=target.branch, revision=staged)
        return staged
    return api.create_commit(
        target.repo_id,
        files,  # already on the Hub, so not uploaded again
        commit_message=message,
        revision=target.branch,
        parent_commit=target.start,  # the Hub rejects this if somebody else has committed in the meantime
    ).oid


def _commit_in_spite_of(
    error: Exception, api: HfApi, target: Target, staged: str, what: str, retry: str, advice: str
) -> str:
    """The target's commit if only the Hub's answer was lost.

    Raises:
        MiniClipError: there is no such commit, or nobody can tell.
    """
    with hub_errors_as_miniclip_error(f"{what} it is unknown whether {target.repo_id} has the commit", retry):
        published = _published(api, target, staged)
    if published is None:
        raise MiniClipError(f"{what} cannot be committed to {target.repo_id}: {one_line(error)}. {advice}") from None
    return published


def _published(api: HfApi, target: Target, staged: str) -> str | None:
    """The target's commit if it has exactly the staged files, else None."""
    trees = []
    for revision in (staged, target.branch):
        try:
            found = api.model_info(target.repo_id, revision=revision, files_metadata=True)
        except RevisionNotFoundError:
            return None
        trees.append({file.rfilename: file.blob_id for file in found.siblings or []})
    return found.sha if trees[0] == trees[1] else None


def _verify(root: Path, repo_id: str, commit: str, advice: str) -> None:
    """Load a commit in a fresh process with an empty cache, and compare it with the folder.

    Raises:
        MiniClipError: it does not load, or its logits differ.
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
            reason = f"loading it took more than {VERIFICATION_TIMEOUT} seconds"
        else:
            if done.returncode == 0:
                return
            reason = (done.stderr.strip().splitlines() or ["the process ended without a message"])[-1]
    raise MiniClipError(f"the upload to {repo_id} was not published: {one_line(reason)}. {advice}")


def _delete_branch(api: HfApi, repo_id: str, branch: str) -> None:
    try:
        api.delete_branch(repo_id, branch=branch)
    except RevisionNotFoundError:  # it was never created
        pass
    except (HTTPError, OSError) as error:
        warnings.warn(
            f"the temporary branch {branch} of {repo_id} cannot be deleted ({one_line(error)}): delete it on the "
            "repository's page on the Hub",
            stacklevel=4,
        )


@contextmanager
def hub_errors_as_miniclip_error(what: str, advice: str) -> Iterator[None]:
    """Turn errors of the Hub's client into a [`MiniClipError`], without the token that some of them contain.

    Args:
        what: what failed, the start of the message.
        advice: how to fix it, the end of the message.
    """
    try:
        yield
    except HUB_ERRORS as error:
        raise MiniClipError(f"{what}: {one_line(error)}. {advice}") from None
