"""Settings that a run derives from its data and its towers: the rules, worked by hand, and when they apply."""

import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION
from modeling_miniclip.errors import UsageError
from modeling_miniclip.training import settings
from modeling_miniclip.training.command_line.arguments import DERIVED, TrainingArguments
from modeling_miniclip.training.command_line.check_arguments import augmentation_list
from modeling_miniclip.training.command_line.derived import Facts, asks_about_tower, derive
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.command_line.recipes import read_recipe, save_arguments
from modeling_miniclip.training.resuming.resume_rules import recorded_flags
from modeling_miniclip.training.settings import choose_settings, facts_of, saved_settings
from tests.helpers.runs import ROOT, flags, plain_arguments
from tests.helpers.towers import PIXELS
from train_miniclip import prepare

TOWERS = Facts(6000, 5.0, 224, takes_other_sizes=True)
NOBODY: Any = SimpleNamespace(is_main_process=False, distributed_type="NO")  # in place of an accelerator


def derived(images: int, *argv: str, **facts: Any) -> TrainingArguments:
    return derive(parse_arguments(["--dataset=any.csv", *argv]), replace(TOWERS, images=images, **facts))[0]


@pytest.mark.parametrize(
    ("images", "argv", "batch_size", "epochs", "warm_up"),
    [
        (500, ["--freeze=both"], 128, 20, 8),  # 4 steps per epoch: 80
        (999, ["--freeze=both"], 128, 12, 9),  # 8 steps per epoch: 96
        (1500, ["--freeze=both"], 256, 14, 8),  # 6 steps per epoch: 84
        (6000, ["--freeze=both"], 512, 12, 10),
        (60, [], 16, 20, 8),  # 4 steps per epoch; at most half of the images
        (100, ["--freeze=none"], 32, 12, 4),  # 4 steps per epoch, 48 in all
        (500, [], 64, 12, 8),  # 8 steps per epoch, 96 in all
        (1500, [], 128, 12, 12),  # 12 steps per epoch, 144 in all
        (3000, [], 128, 12, 25),  # 24 steps per epoch, 288 in all
        (6000, [], 128, 12, 50),  # 47 steps per epoch, 564 in all
        (24000, [], 128, 6, 101),  # 188 steps per epoch, 1,128 in all
        (100_000, [], 128, 5, 351),  # 782 steps per epoch, 3,910 in all
        (1, ["--preset=scenes_tiny"], 2, 30, 2),
        (21, ["--preset=scenes_tiny"], 8, 30, 8),  # 3 steps per epoch, 90 in all
        (6000, ["--preset=scenes_tiny"], 128, 6, 25),  # 47 steps per epoch, 282 in all
    ],
)
def test_batches_epochs_and_warm_up_follow_the_images(
    images: int, argv: list[str], batch_size: int, epochs: int, warm_up: int
) -> None:
    found = derived(images, *argv)
    assert (found.batch_size, found.num_train_epochs, found.warmup_steps) == (batch_size, epochs, warm_up)
    assert found.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("recipe", "argv", "others"),
    [
        ("heads", ["--freeze=both"], {"augmentation", "text_pooling"}),
        ("full", [], {"text_pooling"}),
    ],
)
def test_defaults_at_6000_images_are_the_recipes(recipe: str, argv: list[str], others: set[str]) -> None:
    own = read_recipe(ROOT / "configuration" / "recipes" / f"{recipe}.yaml")
    sources = {"vision_model", "text_model", "text_pooling", "model_name_or_path", "output_dir"}
    assert set(own) <= {*DERIVED, *sources}, "nothing else makes the recipe what it is"
    own = {name: value for name, value in own.items() if name in DERIVED and name not in others}
    found = asdict(derived(6000, *argv))
    for values in (own, found):
        if values.get("augmentation") is not None:
            values["augmentation"] = json.loads(values["augmentation"])
    assert {name: found[name] for name in own} == own and len(own) > 10


def test_few_images_leave_the_towers_frozen() -> None:
    assert [derived(images).freeze for images in (199, 200)] == ["both", "none"]
    assert derived(100, "--vision_learning_rate=1e-5").freeze == "none"
    assert derived(100, "--augmentation=[]").freeze == "none"
    assert derived(100, "--batch_size=64").freeze == "both"
    assert derived(100, "--model_name_or_path=any").freeze == derived(100, "--preset=any").freeze == "none"


def test_trained_heads_go_on_at_lower_rates_than_new_ones() -> None:
    new, trained = derived(6000), derived(6000, "--model_name_or_path=any", tower_size=288)
    assert (new.head_learning_rate, trained.head_learning_rate, trained.num_train_epochs) == (1e-3, 2e-4, 10)
    assert (new.vision_learning_rate, new.text_learning_rate) == (2e-4, 5e-5)
    assert (trained.vision_learning_rate, trained.text_learning_rate) == (2e-4, 5e-5)


def test_a_clip_is_trained_at_low_rates() -> None:
    found = derived(6000, "--model_name_or_path=any", is_clip=True, takes_other_sizes=False)
    assert (found.head_learning_rate, found.vision_learning_rate, found.text_learning_rate) == (1e-5, 1e-5, 1e-5)
    assert (found.num_train_epochs, found.layer_decay, found.frozen_vision_fraction) == (10, 1.0, 0.0)


def test_sizes_of_images_depend_on_what_the_tower_takes() -> None:
    def sizes(*argv: str, **facts: Any) -> tuple[int | None, float | None, int | None]:
        found = derived(6000, *argv, **facts)
        return found.image_size, found.crop_pct, found.train_image_size

    assert sizes() == (288, 1.0, 224)
    assert sizes(tower_size=256) == (320, 1.0, 256)
    assert sizes(takes_other_sizes=False) == (None, 1.0, None)
    assert sizes(tower_size=None) == (None, 1.0, None)
    assert sizes("--image_size=288") == (288, None, 224), "with the tower's own crop"
    assert sizes("--train_image_size=192") == (256, 1.0, 192)
    assert sizes("--freeze=vision") == (288, 1.0, None), "not augmented"
    assert sizes("--augmentation=[{name: Blur}]") == (288, 1.0, None), "which does not enlarge objects"
    assert sizes("--model_name_or_path=any", tower_size=288) == (None, None, 224)
    assert sizes("--preset=any") == (None, None, None)


def test_values_that_do_not_work_are_not_derived() -> None:
    unknown = derived(6000, knows_layers=False)
    assert (unknown.layer_decay, unknown.frozen_vision_fraction) == (1.0, 0.0)
    assert derived(6000, spreads_weights=True).ema_decay == 0 and derived(6000).ema_decay == 0.99
    assert derived(6000, "--dropout=0.3").projection_dropout is None
    assert derived(6000, captions=1.0).captions_per_image == 1 and derived(100, captions=2.4).captions_per_image == 3
    assert derived(6000, "--freeze=vision").frozen_vision_fraction == 0
    assert augmentation_list(derived(6000, "--preset=any")) == DEFAULT_AUGMENTATION


@pytest.mark.parametrize(
    "argv",
    [
        [], ["--freeze=both"], ["--freeze=text"], ["--preset=p"], ["--model_name_or_path=m"], ["--image_size=224"],
        ["--time_limit=20m"], ["--dropout=0.2"], ["--train_image_size=192"], ["--max_steps=3"], ["--recipe=flickr8k"],
    ],
)  # fmt: skip
def test_derived_arguments_derive_themselves(tmp_path: Path, argv: list[str]) -> None:
    arguments = parse_arguments(["--dataset=any.csv", *argv])
    for images in (1, 2, 3, 21, 100, 500, 1999, 10**6, 6000):
        facts = replace(TOWERS, images=images)
        first, _ = derive(arguments, facts)
        assert derive(first, facts) == (first, [])
        assert first.batch_size >= 2 and first.warmup_steps >= 0
    save_arguments(first, tmp_path / "arguments.yaml")
    again, _ = derive(parse_arguments([f"--recipe={tmp_path / 'arguments.yaml'}"]), facts)
    assert replace(again, recipe=first.recipe) == first, "the run is repeated"


def test_a_time_limit_leaves_the_end_open() -> None:
    found = derived(6000, "--time_limit=20m")
    assert (found.num_train_epochs, found.max_steps, found.warmup_steps) == (None, None, 10)
    recipe = parse_arguments(["--recipe=full", "--dataset=a", "--time_limit=20m"])
    assert recipe.num_train_epochs is recipe.warmup_steps is None and recipe.batch_size == 128


def test_only_derived_values_are_said() -> None:
    _, lines = derive(parse_arguments(["--dataset=a", "--batch_size=64"]), replace(TOWERS, images=100))
    head = "settings for 100 images, heads on two frozen towers: freeze both, captions_per_image 5, "
    assert lines[0].startswith(head)
    assert "batch_size" not in lines[0] and "head_learning_rate 0.003" in lines[0]
    assert lines[1] == (
        "settings of model and images: projection_dim 1024, projection_dropout 0.7, crop_pct 1, image_size 288"
    )
    _, lines = derive(parse_arguments(["--dataset=a"]), TOWERS)
    assert lines[1].endswith("train_image_size 224, augmentation RandomResizedCrop+HorizontalFlip")


# --- facts and checkpoints -------------------------------------------------------------------------------------------


def test_facts_are_those_of_data_and_tower(tiny_towers: tuple[Path, Path], tiny_export: Path, tmp_path: Path) -> None:
    splits: Any = {"train": Dataset.from_dict({"captions": [["a"], ["b", "c"], ["d", "e", "f"]]})}
    towers = parse_arguments(["--dataset=a", f"--vision_model={tiny_towers[0]}", f"--text_model={tiny_towers[1]}"])
    expected = Facts(3, 2.0, PIXELS, takes_other_sizes=True, knows_layers=True, spreads_weights=False)
    assert facts_of(splits, towers, NOBODY) == expected
    export = parse_arguments(["--dataset=a", f"--model_name_or_path={tiny_export}"])
    assert facts_of(splits, export, NOBODY) == expected
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text('{"model_type": "clip"}')
    assert facts_of(splits, parse_arguments(["--dataset=a", f"--model_name_or_path={clip}"]), NOBODY).is_clip
    missing = parse_arguments(["--dataset=a", "--vision_model=./nowhere", "--text_model=./nowhere"])
    assert facts_of(splits, missing, NOBODY).tower_size is None, "create_model says what is wrong"


def test_the_tower_is_looked_at_only_if_a_rule_asks(
    tiny_towers: tuple[Path, Path], tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = [f"--vision_model={tiny_towers[0]}", f"--text_model={tiny_towers[1]}"]
    sources = {"towers": towers, "preset": ["--preset=scenes_tiny"], "export": [f"--model_name_or_path={tiny_export}"]}
    further: list[list[str]] = [[], ["--crop_pct=0.9"], ["--lora_rank=4"]]
    asked = set()
    for source, freeze, size, more in product(sources, ("none", "text", "both", None), (None, 64), further):
        flags = [*sources[source], *more, *(f"--{name}={value}" for name, value in (("freeze", freeze),
                 ("image_size", size)) if value is not None)]  # fmt: skip
        try:
            arguments = parse_arguments(["--dataset=a", *flags])
        except UsageError:  # not all of them go together
            continue
        if asks_about_tower(arguments):
            asked.add((source, freeze, size))
            continue
        kinds = [Facts(500, 2.0), Facts(500, 2.0, 96, takes_other_sizes=True, knows_layers=False)]
        assert len({repr(derive(arguments, facts)[0]) for facts in kinds}) == 1, "no rule depends on the tower"
    assert ("towers", "both", 64) not in asked and {("towers", "both", None), ("export", "both", 64)} <= asked
    splits: Any = {"train": Dataset.from_dict({"captions": [["a"]]})}
    arguments = parse_arguments(["--dataset=a", *towers, "--freeze=both", "--image_size=64"])
    monkeypatch.setattr(settings, "vision_tower_config", lambda name: pytest.fail("the tower is looked at"))
    assert facts_of(splits, arguments, NOBODY).images == 1


def test_a_process_that_cannot_read_the_tower_has_the_settings_of_the_others(
    tiny_towers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = parse_arguments(["--dataset=a", f"--vision_model={tiny_towers[0]}", f"--text_model={tiny_towers[1]}"])
    splits: Any = {"train": Dataset.from_dict({"captions": [["a"]] * 400})}
    of_main = facts_of(splits, arguments, NOBODY)
    monkeypatch.setattr(settings, "vision_tower_config", lambda name: 1 / 0)
    assert facts_of(splits, arguments, NOBODY) != of_main
    monkeypatch.setattr(settings, "compute_on_main", lambda compute, is_main: of_main)
    assert choose_settings(splits, None, arguments, NOBODY) == derive(arguments, of_main)[0]


def test_resumed_runs_keep_what_was_derived(tmp_path: Path) -> None:
    saved = recorded_flags(replace(derived(6000), time_limit=None))
    now = parse_arguments(["--dataset=a", "--num_train_epochs=20"])
    kept = saved_settings(now, saved)
    assert (kept.num_train_epochs, kept.batch_size, kept.image_size, kept.max_steps) == (20, 128, 288, None)
    planned = recorded_flags(plain_arguments(time_limit="20m", num_train_epochs=3, max_steps=7))
    for argv in ([], ["--time_limit=20m"]):
        kept = saved_settings(parse_arguments(["--dataset=a", *argv]), planned)
        assert (kept.time_limit, kept.num_train_epochs, kept.max_steps) == ("20m", 3, 7)
    longer = saved_settings(parse_arguments(["--dataset=a", "--num_train_epochs=5"]), planned)
    assert (longer.num_train_epochs, longer.max_steps) == (5, None)


def test_nothing_is_looked_up_if_all_is_given() -> None:
    whole = derived(6000)
    assert choose_settings(None, None, whole, NOBODY) == whole  # type: ignore[arg-type]


def test_a_run_uses_and_saves_derived_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    open_flags = dict.fromkeys(("batch_size", "captions_per_image", "num_train_epochs", "warmup_steps", "best_metric"))
    run = prepare(parse_arguments(flags(tmp_path, **open_flags)))
    assert "settings for 21 images, from random weights: batch_size 8, captions_per_image 2" in capsys.readouterr().out
    assert (run.arguments.batch_size, run.last_step, run.arguments.best_metric) == (8, 90, "rsum")
    saved = read_recipe(tmp_path / "run" / "arguments.yaml")
    assert (saved["batch_size"], saved["num_train_epochs"], saved["warmup_steps"]) == (8, 30, 8)
