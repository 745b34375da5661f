"""Untrusted input cannot run code, read other files or write control characters to the terminal."""

import ast
import json
import os
import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from modeling_miniclip import DataError, MiniClipError, MiniClipModel, UsageError, load_captions
from modeling_miniclip.cli import build_parser
from modeling_miniclip.errors import one_line, printable
from modeling_miniclip.hub.model_card import rename_card, write_card
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.reports.reporting import say
from modeling_miniclip.utils import plain_yaml
from modeling_miniclip.utils.match_grid import LabelledImage, MatchRow, draw_matches
from tests.helpers.runs import ROOT
from tests.helpers.towers import save_towers, tiny_model

SOURCES = [*sorted((ROOT / "modeling_miniclip").rglob("*.py")), ROOT / "train_miniclip.py"]
HOSTILE = 'x\x1b]0;owned\x07\n# Title "` <img src=x onerror=alert(1)> | \u202egnp.exe'
RUNNING = ("eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system")


# --- code -----------------------------------------------------------------------------------------------------------


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The syntax tree of a source as a list, the module first."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_no_source_runs_what_it_reads() -> None:
    for path, node in ((source, node) for source in SOURCES for node in nodes_of(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not modules & {"pickle", "marshal", "shelve", "dill", "joblib"}, (path, node.lineno)
        if isinstance(node, ast.Call):
            assert called(node) not in RUNNING, (path, node.lineno)
            is_safe = called(node) != "yaml.load" or ast.unparse(node.args[1]) == "_PlainLoader"
            assert is_safe, (path, node.lineno)
            for keyword in node.keywords:
                on = keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and ast.unparse(keyword.value)
                # A push loads what it has just uploaded itself, as its readers will.
                assert on in (False, "False") or path.name == "verify_upload.py", (path, node.lineno)


def test_the_loader_of_yaml_is_a_safe_one() -> None:
    assert issubclass(plain_yaml._PlainLoader, yaml.SafeLoader)
    assert set(plain_yaml._PlainLoader.yaml_constructors) == set(yaml.SafeLoader.yaml_constructors)


class Program:
    """Its pickle runs a command when it is read."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_pickled_weights_raise_and_are_not_read(tmp_path: Path) -> None:
    vision, text = save_towers(tmp_path)
    tiny_model().save_pretrained(tmp_path / "export")
    for folder in (text, tmp_path / "export"):
        (folder / "model.safetensors").unlink()
        torch.save(Program(f"touch {tmp_path / 'ran'}"), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MiniClipModel.from_towers(vision, text)
    with pytest.raises(OSError, match="safetensors"):
        MiniClipModel.from_pretrained(tmp_path / "export")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flag", ["--recipe", "--augmentation"])
def test_yaml_makes_no_objects(tmp_path: Path, flag: str) -> None:
    text = f"batch_size: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n"
    (tmp_path / "recipe.yaml").write_text(text)
    value = str(tmp_path / "recipe.yaml") if flag == "--recipe" else text
    with pytest.raises(UsageError, match="python/object"):
        parse_arguments(["--dataset", "scenes", flag, value])
    assert not (tmp_path / "ran").exists()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A CSV with two images, and a third one elsewhere."""
    for name in ("data/Images/a.png", "data/Images/b.png", "elsewhere/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "data" / "captions.csv").write_text("image,caption\na.png,one\nb.png,two\n")
    return tmp_path / "data"


def escape(data: Path, way: str) -> str:
    """A name for the secret picture."""
    secret = data.parent / "elsewhere" / "secret.png"
    if way == "parent":
        return "../../elsewhere/secret.png"
    if way == "absolute":
        return str(secret)
    if way == "same prefix":
        secret.parent.rename(data / "Images-private")
        return "../Images-private/secret.png"
    link, target = {"link": ("c.png", secret), "linked folder": ("sub", secret.parent)}[way]
    (data / "Images" / link).symlink_to(target)
    return "c.png" if way == "link" else "sub/secret.png"


@pytest.mark.parametrize("way", ["parent", "absolute", "same prefix", "link", "linked folder"])
@pytest.mark.parametrize("form", ["csv", "imagefolder"])
def test_image_outside_the_folder_needs_permission(data: Path, way: str, form: str) -> None:
    name = escape(data, way)
    path = data / "captions.csv"
    path.write_text(path.read_text() + f"{name},three\n")
    if form == "imagefolder":
        path = path.rename(data / "Images" / "metadata.csv")
    source = path if form == "csv" else data / "Images"
    with pytest.raises(DataError, match=r"row 4.*outside.*--allow_outside_images .1 of 3"):
        load_captions(source)
    splits = load_captions(source, allow_outside_images=True)
    assert sum(len(rows) for rows in splits.values()) == 3


def test_error_does_not_reveal_outside_files(data: Path) -> None:
    messages = []
    for name in ("../../elsewhere/secret.png", "../../elsewhere/nothing.png"):
        (data / "captions.csv").write_text(f"image,caption\na.png,one\n{name},three\n")
        with pytest.raises(DataError) as caught:
            load_captions(data / "captions.csv")
        messages.append(str(caught.value).replace(name, ""))
    assert messages[0] == messages[1]


def test_image_folder_may_be_a_link(data: Path, tmp_path: Path) -> None:
    (data / "Images").rename(tmp_path / "store")
    (data / "Images").symlink_to(tmp_path / "store")
    (data / "captions.csv").write_text(f"image,caption\na.png,one\n{tmp_path / 'store' / 'b.png'},two\n")
    assert len(load_captions(data / "captions.csv")["train"]) == 1


# --- names and captions where they are shown ------------------------------------------------------------------------


def test_printable_removes_control_characters_only() -> None:
    # The planes with characters, and the ends of the others.
    ranges = range(0x33480), range(0xE0000, 0xE0200), range(sys.maxunicode - 99, sys.maxunicode + 1)
    everything = "".join(chr(number) for numbers in ranges for number in numbers)
    assert printable(everything).isprintable() and printable(printable(everything)) == printable(everything)
    plain = "Zoë's 猫 🐈 کتاب \\n"
    assert printable(plain) == plain


@pytest.mark.parametrize("kind", [MiniClipError, DataError, UsageError])
def test_every_error_is_one_harmless_line_without_tokens(kind: type[MiniClipError]) -> None:
    message = str(kind(f"{HOSTILE}: token hf_{'a1' * 17}\n  next"))
    assert message.isprintable() and "hf_***" in message and "a1a1" not in message and message.endswith("*** next")


def test_hostile_name_is_reported_harmlessly(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = HOSTILE.replace('"', "").replace("\n", "")
    (data / "captions.csv").write_text(f"image,caption\na.png,one\n{name},two\n")
    with pytest.raises(DataError, match="row 3") as caught:
        load_captions(data / "captions.csv")
    assert str(caught.value).isprintable() and r"\x1b" in str(caught.value)
    say(type("Accelerator", (), {"is_main_process": True}), f"warning: {name}")
    assert capsys.readouterr().out.rstrip("\n").isprintable()


def test_a_card_shows_hostile_names_as_text(tmp_path: Path) -> None:
    values = {
        "name": HOSTILE,
        "data": {"name": HOSTILE, "splits": {"validation": {"images": 2, "captions": 2}}},
        "arguments": {"caption_column": HOSTILE},
        "command": f"train --caption_column '{HOSTILE}' ```",
    }
    write_card(tmp_path / "README.md", tiny_model(), values)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.replace("\n", "").isprintable()
    body = text.split("---\n", 2)[2]
    assert len(re.findall("^# ", body, flags=re.MULTILINE)) == 1
    outside_code = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert body.count("```") == 4 and not re.search(r"(?<!\\)<img", outside_code)
    sample = ast.parse(re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)[1])  # type: ignore[index]
    assert [node.value.value for node in sample.body if isinstance(node, ast.Assign)  # type: ignore[attr-defined]
            and ast.unparse(node.targets[0]) == "repository"] == [printable(HOSTILE)]  # fmt: skip
    assert "# you/my-clip" not in rename_card(text, "you/my-clip") and "# my-clip" in rename_card(text, "you/my-clip")


def test_a_picture_is_drawn_with_any_query(tmp_path: Path) -> None:
    found = [LabelledImage(Image.new("RGB", (8, 8)), HOSTILE, True)]
    draw_matches(tmp_path / "found.png", [MatchRow(HOSTILE + "\ud800 $\\frac{$ \x00", "", found)] * 2)
    with Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 100


# --- secrets --------------------------------------------------------------------------------------------------------


def test_no_flag_takes_a_secret() -> None:
    flags = [field.name for field in fields(TrainingArguments)]
    for parser in build_parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        flags += [option for action in parser._actions for option in action.option_strings]
    assert len(flags) > 60
    assert [flag for flag in flags if re.search(r"token$|password|secret|api_key", flag)] == []


def test_token_is_removed_from_foreign_messages() -> None:
    assert "hf_abc" not in one_line("refused: Bearer hf_abcdefghijklmnopqrstuvwxyz")
    assert "a1a1" not in str(UsageError(one_line(json.dumps({"token": "hf_" + "a1" * 17}))))


# --- messages -------------------------------------------------------------------------------------------------------

# A message says how to fix the problem: by an alternative, an expectation, a bound or a flag.
FIXES = re.compile(
    r"; |--\w|expected|must|choose|at least|need|name |neither|exclude|install|lower|belongs to no flag|it has no|"
    r"knows|again|advice|did_you_mean|cause|hint|error|BAD_FILES|compressed_message"  # names of what is put in
)
# What passes on another message, which says so itself.
PASSED_ON = re.compile(r"^[\s:.]*(error|problem|str|verdict)|^no model (of|in)|undecodable|\\1|"
                       r"^augmentation: .*: *error|has the wrong type|torch.onnx cannot")  # fmt: skip


def messages() -> list[tuple[str, str, bool]]:
    """Where an error of the package is raised, its text, and whether it names something."""
    found = []
    for path in SOURCES:
        for function in (node for node in nodes_of(path) if isinstance(node, ast.FunctionDef)):
            assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    if called(node.exc) in ("MiniClipError", "DataError", "ModelError", "UsageError"):
                        message = node.exc.args[0]
                        has_place = isinstance(message, ast.Call) and called(message) == "Problem"  # file and row
                        if has_place:
                            message = message.args[1]
                        values = {
                            ast.unparse(assignment.targets[0]): assignment.value
                            for assignment in sorted(assignments, key=lambda assignment: assignment.lineno)
                            if assignment.lineno < node.lineno
                        }
                        parts = list(ast.walk(values.get(ast.unparse(message), message)))
                        words = [part.value if isinstance(part, ast.Constant) else ast.unparse(part)
                                 for part in parts if isinstance(part, ast.Constant | ast.Name)]  # fmt: skip
                        text = " ".join(word for word in words if isinstance(word, str))
                        names = "--" in text or any(
                            isinstance(part, ast.FormattedValue) or getattr(part, "attr", "") == "format"
                            for part in parts
                        )
                        found.append((f"{path.name}:{node.lineno}", text, names or has_place))
    return found


def test_every_message_names_what_where_and_fix() -> None:
    own = [(where, text, names) for where, text, names in messages() if not PASSED_ON.search(text)]
    assert len(own) > 60
    assert [where for where, text, names in own if not names and not re.search("`|: ", text)] == []
    assert [f"{where} {text}" for where, text, _ in own if not FIXES.search(text)] == []
    assert [where for where, text, _ in own if text.rstrip().endswith("!") or "\n" in text] == []


def test_the_hierarchy_is_small() -> None:
    kinds = [MiniClipError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.__name__ for kind in kinds if kind.__module__ == "modeling_miniclip.errors"} == {
        "MiniClipError", "DataError", "ModelError", "UsageError"
    }  # fmt: skip
