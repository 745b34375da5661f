"""Pushes to a Hub on loopback are verified before they are published, and happen completely or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_miniclip import export
from modeling_miniclip.cli import cli
from modeling_miniclip.hub import verify_upload
from tests.helpers.hubs import add_repository, local_hub, run
from tests.helpers.runs import ROOT
from tests.helpers.towers import tiny_model, tiny_processor

# A client waits before it tries again; the tests do not.
NO_WAITING = "import time; time.sleep = lambda seconds: None\n"
# What happens to one request of a push, or to all from one on.
FAULTS: dict[str, dict[str, Any]] = {
    "refused once": {"status": 403},
    "unavailable once": {"status": 503},
    "carried out without an answer": {"drop": -1},
    "connection lost for good": {"drop": 0, "reset": 1, "times": -1},
}
REQUESTS = {"main": 15, "v2": 11}  # of a push to an existing repository: to its main branch, and to a new branch


@pytest.fixture
def alices_hub(tmp_path: Path) -> Iterator[Any]:
    with local_hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, `old` and `new`."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        made[name] = export(tiny_model(), tiny_processor(), folder / name, {"name": name})
    return made


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def which(hub: Any, repo_id: str, exports: dict[str, Path], rev: str = "main") -> str:
    """`old` or `new` if all files of a revision but the card are those of that model; else `mixed`."""
    for name, folder in exports.items():
        wanted = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        found = {path: hub.read(repo_id, path, rev=rev) for path in hub.files(repo_id, rev=rev)}
        if all(found.get(path) == content for path, content in wanted.items()):
            return name
    return "mixed"


def branches(hub: Any, repo_id: str) -> list[str]:
    return sorted(ref.removeprefix("refs/heads/") for ref in hub.store.repo("model", repo_id)["refs"])


def push_in_a_client(hub: Any, tmp_path: Path, code: str, **env: str) -> Any:
    """Run code in another process whose Hub this is."""
    return run(code, tmp_path, PYTHONPATH=str(ROOT), **{**hub.client_env(tmp_path / "home"), **env})


WITHOUT_VERIFICATION = "from modeling_miniclip.hub import push as pushing; pushing._verify = lambda *args: None\n"


@pytest.mark.parametrize("requests", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_failing_request_leaves_a_whole_model_and_true_report(
    alices_hub: Any, exports: dict[str, Path], tmp_path: Path, requests: str
) -> None:
    cases = [
        (fault, branch, k)
        for fault in FAULTS
        for branch, count in REQUESTS.items()
        for k in range(count)
        if requests == "all" or k == 1 or k >= count - 3
    ]
    for i, (fault, _, k) in enumerate(cases):
        add_repository(alices_hub, f"alice/m{i}x", files_of(exports["old"]))
        alices_hub.fault(path=rf"\bm{i}x", skip=k, **FAULTS[fault])
    code = f"""{WITHOUT_VERIFICATION}{NO_WAITING}
import warnings
from modeling_miniclip import MiniClipError, push
for i, (_, branch, _) in enumerate({cases!r}):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = "pushed " + push({str(exports["new"])!r}, f"alice/m{{i}}x", revision=branch)
        except MiniClipError as error:
            result = "failed " + str(error)
    print(result, "|", *(warning.message for warning in caught))
"""
    done = push_in_a_client(alices_hub, tmp_path, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    outcomes = set()
    for i, ((fault, branch, k), line) in enumerate(zip(cases, lines, strict=True)):
        case, repo_id = f"{fault}, {branch}, request {k}: {line}", f"alice/m{i}x"
        heads = branches(alices_hub, repo_id)
        there = which(alices_hub, repo_id, exports, branch) if branch in heads else "none"
        outcomes.add((fault, branch, k, line.startswith("pushed"), there))
        assert there == ("new" if line.startswith("pushed") else {"main": "old", "v2": "none"}[branch]) or (
            there == "new" and "whether" in line  # the connection went with the answer
        ), case
        assert branch == "main" or which(alices_hub, repo_id, exports) == "old", case
        assert all(left in line for left in set(heads) - {"main", branch}), case  # a warning names what is left
        assert "hf_alice" not in line and "Traceback" not in line, case
        if line.startswith("failed"):
            advice = rf"The model is safe in .*try again with `miniclip push .*/new {repo_id} --revision {branch}`"
            assert re.search(rf"failed \S+/new (cannot be|was) .*{advice}", line), case
    for branch, count in REQUESTS.items():
        assert ("refused once", branch, count - 1, True, "new") in outcomes, "the last request was not reached"
        assert any(case[:2] == ("carried out without an answer", branch) and case[3] for case in outcomes)


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {  # token, repository, arguments, reason
    "public where private was asked for": ("hf_alice", "alice/birds", {"private": True}, "already public"),
    "another kind of model": ("hf_alice", "alice/bert", {}, r"another kind of model \(bert\)"),
    "a tag": ("hf_alice", "alice/birds", {"revision": "v1"}, "v1 is a tag or a commit"),
    "a commit": ("hf_alice", "alice/birds", {"revision": "0" * 40}, "0000 is a tag or a commit"),
    "a pull request": ("hf_alice", "alice/birds", {"revision": "refs/pr/1"}, "'refs/pr/1' is not a valid name"),
    "no name of a branch": ("hf_alice", "alice/birds", {"revision": "my birds"}, "'my birds' is not a valid name"),
    "no token": ("", "alice/birds", {}, "there is no token; log in with"),
    "an unknown token": ("hf_stranger", "alice/birds", {}, "the Hub rejected this token"),
    "a token that may only read": ("hf_reader", "alice/birds", {}, "this token does not have permission"),
    "a repository of somebody else": ("hf_alice", "bob/birds", {}, "this token does not have permission"),
    "a private one of somebody else": ("hf_alice", "bob/secret", {}, "this token does not have permission"),
    "a new one of somebody else": ("hf_alice", "bob/new", {}, "this token does not have permission"),
}


def test_impossible_push_raises_before_any_upload(alices_hub: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for repo_id in ("alice/birds", "bob/birds", "bob/secret"):
        add_repository(alices_hub, repo_id, files_of(exports["old"]), private=repo_id == "bob/secret")
    add_repository(alices_hub, "alice/bert", {"config.json": tmp_path / "config.json"})
    code = f"""
import os, warnings
from modeling_miniclip import MiniClipError, push
from modeling_miniclip.hub.push import prepare_push
from huggingface_hub import HfApi
HfApi().create_tag("alice/birds", tag="v1")
warnings.simplefilter("error")
for token, repo_id, arguments, _ in {list(REFUSED.values())!r}:
    os.environ["HF_TOKEN"] = token
    for act, source in ((push, {str(exports["new"])!r}), (prepare_push, None)):
        try:
            act(*((source, repo_id) if source else (repo_id, "out")), **arguments)
        except MiniClipError as error:
            print(error)
"""
    before = (alices_hub.store.root / "blobs").stat().st_mtime_ns
    done = push_in_a_client(alices_hub, tmp_path, code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for (case, (token, repo_id, _, reason)), *messages in zip(REFUSED.items(), lines[::2], lines[1::2], strict=True):
        for line in messages:
            assert re.search(reason, line) and repo_id in line, f"{case}: {line}"
            assert not token or token not in line, case
        assert "The model is safe in" in messages[0] and messages[1].startswith("--push_to_hub: "), case
    assert (alices_hub.store.root / "blobs").stat().st_mtime_ns == before
    for repo_id in ("alice/birds", "bob/birds", "bob/secret", "alice/bert"):
        assert [ref for ref in branches(alices_hub, repo_id) if "tags" not in ref] == ["main"]


def test_files_changed_during_upload_are_not_published(
    alices_hub: Any, exports: dict[str, Path], tmp_path: Path
) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    folder = shutil.copytree(exports["new"], tmp_path / "export")
    code = f"""
from pathlib import Path
from modeling_miniclip import push
from modeling_miniclip.hub import push as pushing
pushing._verify = lambda *args: Path({str(folder / "config.json")!r}).write_text("{{}}")
push({str(folder)!r}, "alice/birds")
"""
    last = push_in_a_client(alices_hub, tmp_path, code).stderr.splitlines()[-1]
    assert f"the files in {folder} changed during the upload. Nothing that was in alice/birds has" in last
    assert which(alices_hub, "alice/birds", exports) == "old"
    assert branches(alices_hub, "alice/birds") == ["main"]


@pytest.mark.slow
def test_upload_that_does_not_load_is_not_published(alices_hub: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    alices_hub.fault(origin="cdn", method="GET", status=503, times=-1)
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")  # what clients wait
    code = f"from modeling_miniclip import push\npush({str(exports['new'])!r}, 'alice/birds')"
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run(code, tmp_path, PYTHONPATH=path, **alices_hub.client_env(tmp_path / "home"))
    last = done.stderr.splitlines()[-1]
    assert re.search(
        "alice/birds was not published: alice/birds does not load: .*the Hub is temporarily unavailable: .*503",
        last,
    )
    assert which(alices_hub, "alice/birds", exports) == "old"
    assert branches(alices_hub, "alice/birds") == ["main"]


def test_storage_fault_leaves_the_old_model(alices_hub: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    alices_hub.fault(origin="cdn", method="PUT", status=403, times=-1)
    code = f"{NO_WAITING}from modeling_miniclip import push\npush({str(exports['new'])!r}, 'alice/birds')"
    done = push_in_a_client(alices_hub, tmp_path, code)
    assert done.returncode == 1
    assert "MiniClipError" in done.stderr
    assert "Nothing that was in alice/birds has changed" in done.stderr.splitlines()[-1]
    assert which(alices_hub, "alice/birds", exports) == "old"
    assert branches(alices_hub, "alice/birds") == ["main"]


VERIFICATIONS = {  # what starting the verification gives -> the reason in the error
    "subprocess.CompletedProcess(argv, 1, '', 'first line\\nit does not load: why')": "it does not load: why",
    "subprocess.CompletedProcess(argv, -9, '', '')": "the process ended without a message",
    "raise_(subprocess.TimeoutExpired(argv, 1))": "loading it took more than 1800 seconds",
}


def test_upload_that_fails_verification_is_not_published(
    alices_hub: Any, exports: dict[str, Path], tmp_path: Path
) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    code = f"""
import os, subprocess
from modeling_miniclip import MiniClipError, push
from modeling_miniclip.hub import push as pushing
def raise_(error):
    raise error
def verify(argv, env, **options):
    assert argv[1:5] == ["-m", "modeling_miniclip.hub.verify_upload", {str(exports["new"])!r}, "alice/birds"], argv
    assert env["HF_HUB_CACHE"] != os.environ.get("HF_HUB_CACHE") and options["timeout"] == 1800
    return eval(outcome)
subprocess.run = verify
for outcome in {list(VERIFICATIONS)!r}:
    try:
        push({str(exports["new"])!r}, "alice/birds")
    except MiniClipError as error:
        print(error)
"""
    done = push_in_a_client(alices_hub, tmp_path, code)
    lines = done.stdout.splitlines()
    assert len(lines) == len(VERIFICATIONS), done.stderr
    for line, reason in zip(lines, VERIFICATIONS.values(), strict=True):
        assert line.startswith(
            f"the upload to alice/birds was not published: {reason}. Nothing that was in alice/birds"
        )
    assert which(alices_hub, "alice/birds", exports) == "old"
    assert branches(alices_hub, "alice/birds") == ["main"]


def test_verification_compares_logits_and_reports_load_errors(exports: dict[str, Path], tmp_path: Path) -> None:
    old, new = str(exports["old"]), str(exports["new"])
    verify_upload.main(new, new, "main")
    with pytest.raises(
        SystemExit, match=rf"the uploaded model gives other logits than {new} .largest difference 0\.\d"
    ):
        verify_upload.main(new, old, "main")
    with pytest.raises(SystemExit, match=f"{tmp_path} does not load: "):
        verify_upload.main(new, str(tmp_path), "main")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("contents['model.safetensors'] = OTHER", "gives other logits than"),
        ("del contents['processing_miniclip.py']", "does not load: .*processing_miniclip.py"),
    ],
)
def test_upload_that_differs_is_not_published(
    alices_hub: Any, exports: dict[str, Path], tmp_path: Path, damage: str, reason: str
) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    code = f"""
OTHER = {str(exports["old"] / "model.safetensors")!r}
from modeling_miniclip import push
from modeling_miniclip.hub import push as pushing
from huggingface_hub import CommitOperationAdd
whole = pushing._operations
def damaged(root, repo_id):
    contents = {{o.path_in_repo: o.path_or_fileobj for o in whole(root, repo_id)}}
    {damage}
    return [CommitOperationAdd(*item) for item in contents.items()]
pushing._operations = damaged
push({str(exports["new"])!r}, "alice/birds2")
"""
    add_repository(alices_hub, "alice/birds2")
    done = push_in_a_client(alices_hub, tmp_path, code)
    last = done.stderr.splitlines()[-1]
    assert re.search(rf"MiniClipError: the upload to alice/birds2 was not published: .*{reason}", last), last
    assert "Nothing that was in alice/birds2 has changed" in last
    assert set(alices_hub.files("alice/birds2")) == {".gitattributes"}
    assert branches(alices_hub, "alice/birds2") == ["main"]


def test_unchanged_push_adds_no_commit(alices_hub: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    old, new = str(exports["old"]), str(exports["new"])
    code = f"""{WITHOUT_VERIFICATION}
from huggingface_hub import HfApi
from modeling_miniclip import push
for folder, revision in (({old!r}, None), ({old!r}, None), ({new!r}, "v2"), ({new!r}, "v2")):
    print(push(folder, "alice/birds", private=True, revision=revision))
HfApi().create_tag("alice/birds", tag="first")
print(push({new!r}, "alice/birds"))
"""
    done = push_in_a_client(alices_hub, tmp_path, code)
    assert done.returncode == 0, done.stderr
    urls = done.stdout.split()
    assert urls[0] == urls[1] and urls[2] == urls[3] and len(set(urls)) == 3
    states = {revision: which(alices_hub, "alice/birds", exports, revision) for revision in ("main", "v2", "first")}
    assert states == {"main": "new", "v2": "new", "first": "old"}
    assert branches(alices_hub, "alice/birds") == ["main", "refs/tags/first", "v2"]
    assert alices_hub.store.repo("model", "alice/birds")["private"]


def test_pushed_model_loads_by_tag_and_offline(alices_hub: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    add_repository(alices_hub, "alice/birds", files_of(exports["old"]))
    refs = alices_hub.store.repo("model", "alice/birds")["refs"]
    code = """
import os, sys
from transformers import AutoProcessor
from modeling_miniclip import MiniClipModel
model = MiniClipModel.from_pretrained("alice/birds", revision="v1")
processor = AutoProcessor.from_pretrained("alice/birds", revision="v1")
print(model.loaded_revision, type(processor).__name__)
"""
    tag = "from huggingface_hub import HfApi\nHfApi().create_tag('alice/birds', tag='v1')\n"
    first = push_in_a_client(alices_hub, tmp_path, tag + code)
    alices_hub.stop()
    again = push_in_a_client(alices_hub, tmp_path, code, HF_HUB_OFFLINE="1")
    expected = [refs["refs/heads/main"], "MiniClipProcessor"]
    assert first.stdout.split() == expected, first.stderr
    assert again.stdout.split() == expected, again.stderr


def test_the_command_pushes_to_a_revision(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modeling_miniclip.hub import push

    calls: list[Any] = []
    monkeypatch.setattr(push, "push", lambda *args, **kwargs: calls.append((args, kwargs)) or "URL")
    assert cli(["push", str(exports["new"]), "alice/birds", "--private", "--revision", "v2"]) == 0
    assert calls == [((str(exports["new"]), "alice/birds"), {"private": True, "revision": "v2"})]
    assert capsys.readouterr().out == "pushed: URL\n"
