"""Every file under `configuration/` can be used: launch files, presets and recipes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from PIL import Image

from modeling_miniclip import MiniClipModel, packaged_file
from modeling_miniclip.data.loading.augmentation import build_augmentation
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.check_arguments import augmentation_list
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.create_model import create_model, read_preset
from tests.helpers.hubs import add_repository, local_hub, run
from tests.helpers.runs import ROOT, metrics_of
from tests.helpers.towers import CAPTIONS

CONFIGURATION = ROOT / "configuration"
LAUNCH_FILES = {path.stem: path for path in sorted((CONFIGURATION / "accelerate").glob("*.yaml"))}
PRESETS = sorted((CONFIGURATION / "presets").glob("*.json"))
RECIPES = sorted((CONFIGURATION / "recipes").glob("*.yaml"))


def head(path: Path) -> str:
    """The comment that a file begins with."""
    return "".join(re.findall(r"\A(?:#.*\n)*", path.read_text(encoding="utf-8")))


# --- launch files ----------------------------------------------------------------------------------------------------


def test_each_kind_of_machine_has_a_launch_file() -> None:
    assert set(LAUNCH_FILES) == {"cpu1", "cpu2", "gpu1", "multi_gpu", "fsdp", "deepspeed", "multi_node"}


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines", "on_cpu"),
    [
        ("cpu1", DistributedType.NO, 1, 1, True),
        ("cpu2", DistributedType.MULTI_GPU, 2, 1, True),
        ("gpu1", DistributedType.NO, 1, 1, False),
        ("multi_gpu", DistributedType.MULTI_GPU, 2, 1, False),
        ("fsdp", DistributedType.FSDP, 2, 1, False),
        ("deepspeed", DistributedType.DEEPSPEED, 2, 1, False),
        ("multi_node", DistributedType.MULTI_GPU, 16, 2, False),
    ],
)
def test_accelerate_reads_each_launch_file(
    name: str, kind: DistributedType, processes: int, machines: int, on_cpu: bool
) -> None:
    config = load_config_from_file(str(LAUNCH_FILES[name]))  # refuses unknown keys
    found = (config.distributed_type, config.num_processes, config.num_machines, config.use_cpu)
    assert found == (kind, processes, machines, on_cpu)


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_each_launch_file_describes_its_use(name: str) -> None:
    comment = head(LAUNCH_FILES[name])
    assert len(comment.splitlines()) > 1
    assert f"accelerate launch --config_file configuration/accelerate/{name}.yaml" in comment
    command = comment[comment.index("train_miniclip.py") :]
    for recipe in re.findall(r"--recipe (\w+)", command):
        assert packaged_file("configuration", "recipes", f"{recipe}.yaml")
    known = set(asdict(TrainingArguments())) | set("config_file num_processes gpu_ids num_machines zero_stage".split())
    assert set(re.findall(r"--(\w+)", comment)) <= known | {"machine_rank", "main_process_ip"}


def test_the_precision_is_left_to_the_training_script() -> None:
    # Which precision is best depends on the GPU; one in these files would be used on all of them.
    assert all("mixed_precision" not in yaml.safe_load(path.read_text()) for path in LAUNCH_FILES.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("cpu1", 1), ("cpu2", 2)])
def test_cpu_launch_files_start_their_number_of_processes(tmp_path: Path, name: str, processes: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator\na = Accelerator(cpu=True)\n"
        "print(f'process {a.process_index} of {a.num_processes} on {a.device.type}', flush=True)\na.end_training()\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCH_FILES[name]),
        str(script),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    found = sorted(re.findall(r"process \d of \d on cpu", done.stdout))
    assert found == [f"process {i} of {processes} on cpu" for i in range(processes)], done.stderr


# --- presets and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_preset_builds_a_model_that_embeds(path: Path) -> None:
    config = read_preset(path)
    model, processor = create_model(TrainingArguments(preset=path.stem), CAPTIONS)
    assert isinstance(model, MiniClipModel)
    assert model.config.vision_config.architecture == config.vision_config.architecture
    assert model.text_model.config.to_diff_dict().items() >= config.text_config.to_diff_dict().items()
    images = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")]
    with torch.inference_mode():
        output = model(**processor(images=images, text=["a dog", "a boat"], return_tensors="pt"))
    assert output.logits_per_image.shape == (2, 2)
    assert output.logits_per_image.isfinite().all()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_accepted_and_shows_its_command(path: Path) -> None:
    arguments = parse_arguments(["--recipe", path.stem, "--dataset", "my.csv"])
    assert build_augmentation(augmentation_list(arguments), (64, 64)) is not None or arguments.augmentation == "[]"
    assert arguments.output_dir != TrainingArguments().output_dir, "two recipes should not write into one folder"
    assert re.search(
        r"^#   python train_miniclip\.py( --recipe " + path.stem + r"\b)?", head(path), flags=re.MULTILINE
    )


def test_flickr8k_recipe_matches_the_tutorial() -> None:
    arguments = asdict(parse_arguments(["--recipe", "flickr8k", "--dataset", "my.csv"]))
    expected = {
        "vision_model": "resnet50.a1_in1k", "text_model": "distilbert-base-uncased", "projection_dim": 256,
        "image_size": 224, "max_length": 200, "batch_size": 32, "num_train_epochs": 4, "head_learning_rate": 1e-3,
        "vision_learning_rate": 1e-4, "text_learning_rate": 1e-5, "weight_decay": 1e-3,
        "lr_scheduler_type": "plateau", "lr_scheduler_kwargs": '{"patience": 1, "factor": 0.8}',
        "freeze": "none", "freeze_batch_norm": True, "dropout": None,
    }  # fmt: skip
    assert {name: arguments[name] for name in expected} == expected


def save_resnet50(folder: Path) -> dict[str, Path]:
    """`timm/resnet50.a1_in1k` with random weights and the real repository's configuration."""
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("resnet50.a1_in1k")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    cfg = {name: value for name, value in model.pretrained_cfg.items() if value is not None}
    names = ("tag input_size fixed_input_size interpolation crop_pct crop_mode mean std num_classes pool_size "
             "first_conv classifier").split()  # fmt: skip
    config = {
        "architecture": "resnet50",
        "num_classes": 1000,
        "num_features": 2048,
        "pretrained_cfg": {name: cfg[name] for name in names if name in cfg},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {path.name: path for path in folder.iterdir()}


def save_distilbert(folder: Path) -> dict[str, Path]:
    """`distilbert-base-uncased` with random weights and 30,522 rows, and a WordPiece vocabulary of the captions."""
    from transformers import DistilBertConfig, DistilBertModel

    from modeling_miniclip.training.towers.create_model import train_tokenizer

    DistilBertModel(DistilBertConfig()).save_pretrained(folder)
    tokenizer = train_tokenizer(CAPTIONS, 30522)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
def test_flickr8k_recipe_trains_towers_of_real_shape(tmp_path: Path) -> None:
    images = tmp_path / "pictures" / "Images"
    images.mkdir(parents=True)
    rows = ["image,caption"]
    for i in range(12):
        Image.linear_gradient("L").rotate(30 * i).resize((200 + 9 * i, 160)).convert("RGB").save(images / f"{i}.jpg")
        rows += [f'{i}.jpg,"{caption}"' for caption in CAPTIONS[i % len(CAPTIONS)]]
    (tmp_path / "pictures" / "captions.txt").write_text("\n".join(rows) + "\n")
    for name in ("vision", "text"):
        (tmp_path / name).mkdir()
    with local_hub(tmp_path / "hub") as hub:
        add_repository(hub, "timm/resnet50.a1_in1k", save_resnet50(tmp_path / "vision"))
        add_repository(hub, "distilbert-base-uncased", save_distilbert(tmp_path / "text"))
        argv = f"--recipe flickr8k --dataset {tmp_path / 'pictures'} --max_steps 2 --batch_size 2 --num_workers 0"
        env = {**hub.client_env(tmp_path / "home", token=None), "OMP_NUM_THREADS": "2"}
        done = run([str(ROOT / "train_miniclip.py"), *argv.split()], tmp_path, **env)
        assert done.returncode == 0, done.stderr
    lines = metrics_of(tmp_path / "miniclip-flickr8k")
    train = [line for line in lines if line["split"] == "train"]
    assert train[-1]["step"] == 2 and all(0 < line["loss"] < 10 for line in train)
    assert lines[-1]["split"] == "validation" and lines[-1]["loss"] == 0  # one image: there is nothing else to find
    rates = {"head_learning_rate": 1e-3, "vision_learning_rate": 1e-4, "text_learning_rate": 1e-5}
    assert {name: train[-1][name] for name in rates} == pytest.approx(rates)

    export = tmp_path / "miniclip-flickr8k" / "export"
    model = MiniClipModel.from_pretrained(export)
    assert model.visual_projection.linear.weight.shape == (256, 2048)
    assert model.text_projection.linear.weight.shape == (256, 768)
    assert model.get_input_embeddings().weight.shape == (30522, 768)
    card = (export / "README.md").read_text()
    assert "- timm/resnet50.a1_in1k\n- distilbert-base-uncased\n" in card, "both are the base models of the card"
    assert str(tmp_path) not in card
