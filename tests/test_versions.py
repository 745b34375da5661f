"""The files that travel with an export run under each supported release of transformers."""

import ast
import re
from pathlib import Path

import modeling_miniclip
from tests.helpers.runs import ROOT

PACKAGE = Path(modeling_miniclip.__file__).parent
TRAVELLING = {path.stem for path in PACKAGE.glob("*_miniclip.py")}
# What they import: in transformers since 4.57, in timm since 1.0.15, in huggingface_hub since 0.34. Run
# `make test-versions` before you add a name.
NAMES = {
    "huggingface_hub": "get_session try_to_load_from_cache",
    "timm.data": "resolve_data_config",
    "transformers": "AutoConfig AutoImageProcessor AutoTokenizer BatchFeature CLIPImageProcessor "
    "MODEL_FOR_CAUSAL_LM_MAPPING MODEL_FOR_MASKED_LM_MAPPING MODEL_FOR_TEXT_ENCODING_MAPPING MODEL_MAPPING "
    "PreTrainedModel PreTrainedTokenizerBase PretrainedConfig ProcessorMixin TimmWrapperConfig TimmWrapperModel",
    "transformers.image_utils": "PILImageResampling SizeDict",
    "transformers.modeling_outputs": "BaseModelOutputWithPooling",
    "transformers.processing_utils": "ProcessingKwargs Unpack",
    "transformers.utils": "ModelOutput TransformersKwargs cached_file can_return_tuple extract_commit_hash logging",
}


def imports(name: str) -> list[ast.ImportFrom]:
    """The `from ... import` lines of a file of the package, inside functions too."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_travelling_files_import_names_of_every_release() -> None:
    found: dict[str, set[str]] = {}
    for node in (node for name in TRAVELLING for node in imports(name)):
        if node.level == 0 and node.module.split(".")[0] in ("huggingface_hub", "timm", "transformers"):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert found == {module: set(names.split()) for module, names in NAMES.items()}


def test_no_travelling_file_imports_a_chain() -> None:
    # Up to transformers 5.8, a local folder's file may only import files that import no other.
    siblings = {name: {node.module for node in imports(name) if node.level} for name in TRAVELLING}
    assert siblings.pop("modeling_miniclip") == {"configuration_miniclip", "loss_miniclip"}
    assert siblings.pop("processing_miniclip") == {"configuration_miniclip", "pictures_miniclip"}
    assert not any(siblings.values())


def test_tested_releases_are_those_of_the_guide() -> None:
    (line,) = re.findall(r"^VERSIONS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    *tested, oldest_torch = line.split()
    guide = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+\.\d+\.\d+) \| torch", guide, re.MULTILINE) == tested
    assert f"tested with {oldest_torch.replace('-', ' ')}" in guide
    minors = [tuple(map(int, version.split(".")[:2])) for version in tested]
    assert minors[0] == (4, 57) and minors[1:] == [(5, 4 * i) for i in range(len(minors) - 1)]
    # Within four minor releases of the newest one that the tests have passed with.
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    newest = re.search(r"^transformers==(\d+)\.(\d+)", constraints, re.MULTILINE)
    assert newest is not None and (5, minors[-1][1] + 4) >= tuple(map(int, newest.groups()))
