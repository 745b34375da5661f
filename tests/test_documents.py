"""README and guides: their commands and code run, and their flags, links, paths and figures exist."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import webbrowser
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from modeling_miniclip import MiniClipError, load_captions
from modeling_miniclip.cli import build_parser, cli
from modeling_miniclip.training.command_line.arguments import TrainingArguments, flag_tables
from modeling_miniclip.training.command_line.parsing import parse_arguments, spread_learning_rate
from modeling_miniclip.training.command_line.recipes import read_recipe
from tests.helpers.runs import ROOT, environment
from train_miniclip import main

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", ROOT / "configuration" / "README.md"]
DOCUMENTS = [README, *GUIDES]
LINKED = [ROOT / "CHANGELOG.md", ROOT / ".github" / "SECURITY.md"]
LINKED += sorted((ROOT / "docs" / "reference").glob("*.md"))
LINKED += [path for path in sorted((ROOT / "benchmarks").glob("*.md")) if path not in OTHERS]
PUBLIC_CLIP = "openai/clip-vit-base-patch32"  # an export stands for it, which needs no download
# Code that needs a Hub, Optuna or several processes: tests/hub/test_push.py and tests/api/test_train.py run it.
TESTED_ELSEWHERE = ("push(", "import optuna", "notebook_launcher")
# In place of a time limit of training code: one step with the towers of the tests.
ONE_STEP = (
    'max_steps=1, vision_model="towers/vision-resnet", text_model="towers/text-distilbert", image_size=32, '
    "batch_size=32, num_workers=0"
)
# Tested elsewhere: what needs a Hub, serves until it is stopped, or takes long.
NOT_RUN_HERE = {
    "push": "tests/hub/test_push.py",
    "app": "tests/search/test_app.py",
    "space": "tests/search/test_app.py",
    "export": "tests/hub/test_onnx_export.py and the slow test below",
    "convert": "tests/clips/test_back.py",
}
# Flags of other programs: the ONNX example, `hf download --local-dir`, Slurm, `torchrun`, and `accelerate launch`.
FOREIGN_FLAGS = {"text", "local", "nodes", "ntasks", "gpus", "cpus", "signal", "requeue", "open", "kill"}
FOREIGN_FLAGS |= {"nnodes", "nproc", "max", "rdzv"} | {action.dest for action in launch_command_parser()._actions}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Every line of the bash blocks of a document, split as a shell does."""
    lines = [line for block in code_blocks(path, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def training_flags(words: list[str]) -> list[str] | None:
    """The flags for `train_miniclip.py` in a command, or None if it does not start a training run."""
    return words[words.index("train_miniclip.py") + 1 :] if "train_miniclip.py" in words else None


TRAINING = [
    pytest.param(words, id=f"{name_of(path)}-{number}")
    for path in DOCUMENTS
    for number, words in enumerate(commands(path))
    if training_flags(words) is not None
    and "multi_gpu.yaml" not in str(words)  # needs GPUs
    and "--num_machines" not in words  # tests/training/test_machines.py
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_towers: tuple[Path, Path], tiny_export: Path) -> Path:
    """A reader's folder: captions, images, class folders, a finished export, and tiny towers for the default ones."""
    folder = tmp_path_factory.mktemp("reader")
    names = ["beach", "kitchen", *map(str, range(3, 121))]
    rows = code_blocks(README, "csv")[0].strip().splitlines()
    rows += [f"{name}.jpg,a red sign on a grey wall with the number {name}" for name in names[2:]]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "more.csv").write_text("\n".join(rows[:1] + rows[-20:]) + "\n", encoding="utf-8")
    copies = {
        "Images": names,
        "Pictures/sea": names[:3],
        "places/beach": names[:1] + names[2:3],
        "places/kitchen": names[1:2] + names[3:4],
    }
    for place, of_place in copies.items():
        (folder / place).mkdir(parents=True)
        for name in of_place:
            picture(names.index(name)).save(folder / place / f"{name}.jpg")
    shutil.copy(folder / "Images" / "beach.jpg", folder / "beach.jpg")
    shutil.copytree(tiny_export, folder / "my-clip" / "export")
    shutil.copytree(tiny_export, folder / "openai-clip")  # in place of a converted CLIP
    for tower in tiny_towers:
        shutil.copytree(tower, folder / "towers" / tower.name)
    with contextlib.chdir(folder):  # the tars that commands of this guide read
        exec(code_blocks(ROOT / "docs" / "scale.md", "python")[0], {})
    return folder


def picture(seed: int) -> Image.Image:
    """Large noise: no two of these pictures look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC)


@pytest.fixture
def reader(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's folder as the working folder and the home folder; no browser opens."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    yield project


# --- commands and code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_is_valid(path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = settings["optional-dependencies"]
    packages = {re.split(r"[=<>\[]", entry)[0] for entry in [*settings["dependencies"], *sum(extras.values(), [])]}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(path):
        if (flags := training_flags(words)) is not None:
            parse_arguments(flags)
            assert words[0] == "python" or (ROOT / words[words.index("--config_file") + 1]).is_file()
        elif words[0] == "miniclip":
            build_parser().parse_args(words[1:])  # raises SystemExit for a wrong flag
        elif words[:2] == ["pip", "install"]:
            for name in words[2:]:
                extra = re.fullmatch(r"\.\[(\w+)\]", name)
                assert extra[1] in extras if extra else name == "." or name in packages, name
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets)
        else:
            assert words[:2] == ["python", "my-clip-onnx/example.py"], f"no test knows how to run {words}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if code_blocks(path, "python")], ids=name_of)
def test_python_blocks_run_in_order(path: Path, reader: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in code_blocks(path, "python"):
        if not any(name in block for name in TESTED_ELSEWHERE):
            block = block.replace('time_limit="20m"', ONE_STEP)
            exec(block.replace(PUBLIC_CLIP, "my-clip/export"), namespace)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if code_blocks(path, "csv")], ids=name_of)
def test_csv_blocks_load(path: Path, reader: Path, tmp_path: Path) -> None:
    for block in code_blocks(path, "csv"):
        (tmp_path / "captions.csv").write_text(block, encoding="utf-8")
        splits = load_captions(tmp_path / "captions.csv", image_dir=reader / "Images")
        assert sum(len(captions) for split in splits.values() for captions in split["captions"]) == 3


def test_miniclip_commands_run(
    reader: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model without training finds no hard negatives, which is an error.
    found = lambda images, texts, captions, *_: [["wrong"] for _ in captions]  # noqa: E731
    monkeypatch.setattr("modeling_miniclip.search.mine.find_negatives", found)
    done = set()
    for words in [words for path in DOCUMENTS for words in commands(path) if words[0] == "miniclip"]:
        argv = [os.path.expanduser(word).replace(PUBLIC_CLIP, "my-clip/export") for word in words[1:]]
        if argv[0] in NOT_RUN_HERE or tuple(argv) in done:
            continue
        if "--linear_probe" in argv and find_spec("sklearn") is None:
            continue
        done.add(tuple(argv))
        assert cli(argv) == 0, (words, capsys.readouterr().err)
    assert len(done) > 12
    assert all((reader / name).exists() for name in ("clean.csv", "found.html", "eval/failures.html"))


def run_training(words: list[str]) -> None:
    """Run a training command with tiny towers for one step, or seconds; `accelerate launch` in its own processes."""
    words = [word.replace(PUBLIC_CLIP, "my-clip/export") for word in words]  # needs no download
    if "--model_name_or_path" in words or "finetune" in words:
        small = ["--model_name_or_path", "my-clip/export", "--image_size", "32"]
    else:
        small = ["--vision_model", "towers/vision-resnet", "--text_model", "towers/text-distilbert"]
        small += ["--image_size", "32"]
    small += ["--batch_size", "32", "--num_workers", "0"]
    if "--time_limit" in words:
        words = [{"20m": "5s"}.get(word, word) for word in words]
    else:
        small += ["--max_steps", "1"]
    flags = [*(training_flags(words) or []), *small]
    if words[0] == "python":
        main(flags)
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(ROOT / words[words.index("--config_file") + 1]), str(ROOT / "train_miniclip.py")]
    variables = {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}  # as the guide to DeepSpeed says
    env = environment() | variables
    done = subprocess.run([*launcher, *flags], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAINING)
def test_every_training_command_runs(words: list[str], reader: Path, tmp_path: Path) -> None:
    argv = [*words, "--output_dir", str(tmp_path / "run")]
    if "--overfit_batch" in words:  # with the towers of the tests, one step is not enough
        with pytest.raises(MiniClipError, match="does not reach zero"):
            run_training(argv)
    else:
        run_training(argv)
        assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_onnx_commands_run(reader: Path) -> None:
    lines = [words for words in commands(ROOT / "docs" / "export.md") if words[0] != "pip"]
    export_onnx, example = (next(words for words in lines if start in words) for start in ("--onnx", "--text"))
    assert cli(export_onnx[1:]) == 0
    subprocess.run([sys.executable, *example[1:]], check=True, timeout=100)


@pytest.mark.slow
def test_space_command_runs(reader: Path) -> None:
    (words,) = [words for words in commands(ROOT / "docs" / "export.md") if words[:2] == ["miniclip", "space"]]
    assert cli([os.path.expanduser(word) for word in words[1:]]) == 0


# --- flags, links and sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS], ids=name_of)
def test_flags_in_documents_exist(path: Path) -> None:
    known = {flag.name for flag in fields(TrainingArguments)} | FOREIGN_FLAGS | {"debug", "help"}
    subcommands = next(action for action in build_parser()._actions if action.dest == "command")
    for subparser in dict(subcommands.choices or {}).values():
        known |= {option[2:] for action in subparser._actions for option in action.option_strings}
    pattern = r"--([a-z]\w*)" if path in DOCUMENTS else r"--([a-z]+_\w+)"  # OTHERS also name flags of benchmarks
    assert set(re.findall(pattern, path.read_text(encoding="utf-8"))) - known == set()


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS, *LINKED], ids=name_of)
def test_links_and_paths_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", text):
        target = path.parent / link if link else path
        assert link.startswith("https://") or target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
    for file in re.findall(r"`((?:[\w.-]+/)*\w+\.(?:py|md|yaml|toml))`", text):
        places = (ROOT, path.parent, *map(ROOT.joinpath, ("modeling_miniclip", "benchmarks", "tests/conformance")))
        written_by_a_run = file in ("arguments.yaml", "my-clip-onnx/example.py")
        assert written_by_a_run or any((place / file).exists() for place in places), file


def test_readme_is_short_and_starts_with_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    assert [words[:2] for words in commands(README)[:2]] == [["make", "demo"], ["make", "test"]]
    assert text.index("```bash") < 20


@pytest.mark.parametrize("path", [path for path in GUIDES if path.name != "README.md"], ids=name_of)
def test_guides_start_with_a_command_and_are_listed(path: Path) -> None:
    assert re.match(r"# [^\n]+\n\n```bash\n", path.read_text(encoding="utf-8"))
    assert f"({path.name})" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert f"(docs/{path.name})" in README.read_text(encoding="utf-8")


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    texts = [path.read_text(encoding="utf-8") for path in [*DOCUMENTS, *OTHERS]]
    assert {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)} <= targets


# --- generated parts ------------------------------------------------------------------------------------------------


def test_flag_tables_are_up_to_date() -> None:
    assert flag_tables() in (ROOT / "configuration" / "README.md").read_text(encoding="utf-8"), "run `make docs`"


def test_results_are_those_of_the_committed_metrics() -> None:
    table = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py")], capture_output=True, text=True, check=True
    ).stdout
    for path in (README, ROOT / "benchmarks" / "README.md"):
        assert table in path.read_text(encoding="utf-8"), "run `make docs`"


def test_reliability_shows_recorded_figures_of_existing_tests() -> None:
    page = (ROOT / "benchmarks" / "RELIABILITY.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in page, "run `make docs`"
    links = re.findall(r"\]\(\.\./([^)]+)\)", page)
    assert len(links) > 8 and all((ROOT / link).exists() for link in links)


RECORDED = {"demo": "scenes", "heads": "heads", "full": "full", "finish": "finish"}


@pytest.mark.parametrize(("run", "recipe"), RECORDED.items())
def test_recorded_runs_used_the_recipes_as_they_are(run: str, recipe: str) -> None:
    recorded = read_recipe(ROOT / "benchmarks" / run / "arguments.yaml")
    wanted = spread_learning_rate(read_recipe(ROOT / "configuration" / "recipes" / f"{recipe}.yaml"))
    wanted.pop("learning_rate", None)
    paths = {"dataset", "vision_model", "text_model", "model_name_or_path", "output_dir"}
    assert {name: recorded[name] for name in wanted.keys() - paths} == {
        name: value for name, value in wanted.items() if name not in paths
    }
    lines = (ROOT / "benchmarks" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["epoch"] == wanted["num_train_epochs"]


def test_no_photograph_is_in_the_repository() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pictures = {f for f in files if f.endswith((".png", ".jpg", ".jpeg"))}
    drawn = ("tests/fixtures/", "docs/pictures/")  # the latter by benchmarks/pictures.py, from the built-in scenes
    assert {f for f in pictures if Path(f).name != "curves.png" and not f.startswith(drawn)} <= {
        "benchmarks/demo/retrieval.png"
    }
