"""The documents: every command in the README runs, and what is generated in them is up to date."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modeling_miniclip.cli import build_parser
from modeling_miniclip.training.arguments import flag_tables
from modeling_miniclip.training.parsing import parse_arguments, read_recipe, spread_learning_rate
from tests.helpers.runs import ROOT, environment
from tests.helpers.towers import save_towers

README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS_THE_HUB = "push("  # tests/hub/test_export.py pushes to a Hub of its own


def blocks(language: str) -> list[str]:
    """Code blocks of the README in a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Lines of the bash blocks that start with a program, split as a shell does."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: Any) -> Path:
    """A folder as the README's reader has it: `captions.csv` with images, and tiny towers for the default ones."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "Images").mkdir()
    block = blocks("csv")[0].strip().splitlines()
    rows = [*block, *(f"{i},{i}.jpg,a picture of the number {i}" for i in range(3, 20))]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for i, name in enumerate(["beach", "kitchen", *range(3, 20)]):
        Image.new("RGB", (48, 40), (12 * i, 200 - 9 * i, 90)).save(folder / "Images" / f"{name}.jpg")
    save_towers(folder / "towers")
    return folder


def run_here(argv: list[str], folder: Path) -> None:
    """Run a training command of the README with the tiny towers, for one step."""
    program = [sys.executable, *(["-m", "accelerate.commands.launch"] if argv[0] == "accelerate" else [])]
    words = argv[2:] if argv[0] == "accelerate" else argv[1:]
    words = [str(ROOT / w) if w == "train_miniclip.py" or w.startswith("configuration/") else w for w in words]
    small = ["--vision_model", "towers/vision-resnet", "--text_model", "towers/text-distilbert", "--batch_size", "4"]
    steps = "2" if "--resume_from_checkpoint" in words else "1"
    result = subprocess.run(
        [*program, *words, *small, "--max_steps", steps, "--num_workers", "0"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


def test_every_training_command_runs_and_every_python_block_after_it(project: Path, monkeypatch: Any) -> None:
    training = [argv for argv in commands("python train_miniclip.py") + commands("accelerate launch") if len(argv) > 2]
    assert len(training) >= 4
    for argv in training:
        run_here(argv, project)
    assert (project / "my-clip" / "export" / "model.safetensors").is_file()
    monkeypatch.chdir(project)
    namespace: dict[str, Any] = {}
    for block in blocks("python"):
        if NEEDS_THE_HUB not in block:
            exec(block, namespace)
    assert (project / "found.png").is_file()


def test_commands_use_flags_that_exist() -> None:
    texts = [
        README,
        *(p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md")),
    ]
    known = set(re.findall(r"`--(\w+)`", flag_tables()))
    for argv in commands("miniclip "):
        build_parser().parse_args(argv[1:])  # or it ends with exit code 2
        known |= {word[2:] for word in argv if word.startswith("--")}
    used = {flag for text in texts for flag in re.findall(r"--([a-z]+_[a-z_]+)", text)} - {"config_file"}
    assert used and used <= known
    parse_arguments(["--recipe", "scenes"])


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", texts, re.MULTILINE)) <= targets
    assert README.index("make demo") < README.index("make test") < 300


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 400
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_flag_tables_are_up_to_date() -> None:
    assert flag_tables() in (ROOT / "configuration" / "README.md").read_text(encoding="utf-8"), "run `make docs`"


def test_results_are_those_of_the_committed_metrics() -> None:
    table = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py")], capture_output=True, text=True, check=True
    ).stdout
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        assert table in path.read_text(encoding="utf-8"), "run `make docs`"


def test_reliability_is_that_of_the_recorded_figures_and_its_tests_are_there() -> None:
    page = (ROOT / "benchmarks" / "RELIABILITY.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in page, "run `make docs`"
    links = re.findall(r"\]\(\.\./([^)]+)\)", page)
    assert len(links) > 8 and all((ROOT / link).exists() for link in links)


RECORDED = {"demo": "scenes", "heads": "heads", "lit": "lit", "heads_then_full": "heads_then_full", "full": "full"}


@pytest.mark.parametrize(("run", "recipe"), RECORDED.items())
def test_recorded_runs_are_of_the_recipes_as_they_are(run: str, recipe: str) -> None:
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
    assert {f for f in pictures if Path(f).name != "curves.png"} <= {"benchmarks/demo/retrieval.png"}
