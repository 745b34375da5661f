"""Defaults that depend on the data and the model: stated rules for each kind of run.

[`derive`] fills in every flag of `DERIVED` that neither the command line nor the recipe sets. The same arguments and
facts always give the same values, in any number of processes, and what is filled in already stays. So the
`arguments.yaml` of a run repeats it.

A rule is a value, or a function of the facts and of the values so far, in the order of `DERIVED`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .arguments import DERIVED, PART_RATES, TrainingArguments

# With fewer training images than this, two pretrained towers stay frozen (benchmarks/defaults.md).
FEW_IMAGES = 200
# Flags that matter only to towers that are trained: given one of them, a run trains its towers.
OF_TRAINED_TOWERS = (
    "vision_learning_rate", "text_learning_rate", "layer_decay", "frozen_vision_fraction", "train_image_size",
    "augmentation", "lora_rank",
)  # fmt: skip
# Whole images have 9/7 of the pixels per side that the tower was trained with, such as 288 for 224.
LARGER = 9 / 7
STRIDE = 32  # of most image towers: sizes are multiples of it
WARM_UP_WITH_LIMIT = 10  # steps, as the number of all steps is not known yet

Values = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the rules depend on, besides flags. The number of processes is not part of it.

    Args:
        images: number of training images.
        captions: mean number of captions per training image.
        tower_size: pixels per side of what the image tower takes by default; for an export, of what it was trained to
            be used with. None if it is not known, or no square.
        takes_other_sizes: whether the image tower takes images of other sizes.
        knows_layers: whether timm knows the layers of the image tower.
        spreads_weights: whether FSDP or DeepSpeed spreads the weights over processes, so that they cannot be averaged.
        is_clip: whether the model to start from is a published CLIP, or has an image tower of transformers as most do.
    """

    images: int
    captions: float = 1.0
    tower_size: int | None = None
    takes_other_sizes: bool = False
    knows_layers: bool = True
    spreads_weights: bool = False
    is_clip: bool = False


Rule = Callable[[Facts, Values], Any]


# --- rules -----------------------------------------------------------------------------------------------------------


def power_of_two(number: float) -> int:
    """The largest power of two that is at most this number, and at least 2."""
    return 2 ** max(1, math.floor(math.log2(max(2, number))))


def quarter_of_images(least: int, most: int) -> Rule:
    """A batch of about a quarter of the images: a power of two within these bounds, and at most half of the images."""

    def rule(facts: Facts, values: Values) -> int:
        lowest = min(least, power_of_two(facts.images / 2))
        return max(lowest, min(most, power_of_two(facts.images / 4)))

    return rule


def at_most(captions: int) -> Rule:
    """That many captions of each image, or as many as images have on average."""
    return lambda facts, values: max(1, min(captions, math.ceil(facts.captions)))


def steps_per_epoch(facts: Facts, values: Values) -> int:
    """Optimizer steps of an epoch."""
    return -(-facts.images // values["batch_size"])


def epochs_for_steps(steps: int, least: int, most: int) -> Rule:
    """As many epochs as that many steps take, within bounds."""
    return lambda facts, values: max(least, min(most, math.ceil(steps / steps_per_epoch(facts, values))))


def epochs_up_to(epochs: int, images: int, least: int) -> Rule:
    """That many epochs for up to that many images; fewer for more of them, by the square root."""
    return lambda facts, values: max(least, min(epochs, round(epochs * math.sqrt(images / facts.images))))


def share_of_steps(share: float, most: int) -> Rule:
    """That share of all steps, at most that many; with a time limit, a fixed number."""

    def rule(facts: Facts, values: Values) -> int:
        if values["num_train_epochs"] is None:
            return WARM_UP_WITH_LIMIT
        steps = values["num_train_epochs"] * steps_per_epoch(facts, values)
        return min(most, int(share * min(steps, values["max_steps"] or steps)))

    return rule


def if_layers_are_known(value: float, otherwise: float) -> Rule:
    """A value that needs the layers of an image tower that is trained."""

    def rule(facts: Facts, values: Values) -> float:
        return value if facts.knows_layers else otherwise

    return rule


def unless_frozen(value: float) -> Rule:
    """A fraction of the image tower to freeze, if it is trained and timm knows its layers."""

    def rule(facts: Facts, values: Values) -> float:
        return value if facts.knows_layers and values["freeze"] in ("none", "text") else 0.0

    return rule


def unless_spread(decay: float) -> Rule:
    """Averaged weights, where each process has all of them."""
    return lambda facts, values: 0.0 if facts.spreads_weights else decay


def unless_dropout_is_given(dropout: float) -> Rule:
    """Dropout of the heads, unless `--dropout` sets that of the whole model."""
    return lambda facts, values: dropout if values["dropout"] is None else None


def whole_images(facts: Facts, values: Values) -> float | None:
    """No crop, unless the size of the images is given; None is the tower's own crop."""
    return 1.0 if values["image_size"] is None else None


def larger_images(facts: Facts, values: Values) -> int | None:
    """9/7 of the tower's own size, or of `--train_image_size`; None is the tower's own."""
    if not facts.takes_other_sizes or facts.tower_size is None:
        return None
    return multiple_of_stride((values["train_image_size"] or facts.tower_size) * LARGER)


def smaller_crops(facts: Facts, values: Values) -> int | None:
    """Crops of 7/9 of the size of whole images, unless the augmentation is given; None is that size."""
    size = values["image_size"] or facts.tower_size
    is_cropped = values["augmentation"] is None and values["freeze"] in ("none", "text")
    if not is_cropped or not facts.takes_other_sizes or size is None:
        return None
    return multiple_of_stride(size / LARGER)


def multiple_of_stride(size: float) -> int:
    """The nearest multiple of the stride of most image towers."""
    return STRIDE * max(1, round(size / STRIDE))


def crops_and_flips(facts: Facts, values: Values) -> str | None:
    """Crops of at least half of the image, and flips; None for a frozen tower."""
    if values["freeze"] in ("vision", "both"):
        return None
    crop = {"name": "RandomResizedCrop", "scale": [0.5, 1.0], "ratio": [0.8, 1.25]}
    return json.dumps([crop, {"name": "HorizontalFlip", "p": 0.5}])


# --- kinds of runs ---------------------------------------------------------------------------------------------------

COMMON: Values = {
    "freeze": "none",
    "lr_scheduler_type": "cosine",
    "warmup_steps": share_of_steps(0.09, 500),
    "vision_learning_rate": 2e-4,
    "text_learning_rate": 5e-5,
    "layer_decay": 1.0,
    "frozen_vision_fraction": 0.0,
    "weight_decay": 0.1,
    "ema_decay": 0.0,
    "best_metric": "rsum",
    "projection_dim": None,
    "projection_dropout": None,
    "image_size": None,
    "train_image_size": None,
    "crop_pct": None,
    "augmentation": None,
}
NEW_HEADS: Values = {
    "projection_dim": 1024,
    "projection_dropout": unless_dropout_is_given(0.7),
    "image_size": larger_images,
    "crop_pct": whole_images,
}
TRAINED_TOWERS: Values = {
    "batch_size": quarter_of_images(32, 128),
    "captions_per_image": at_most(2),
    "layer_decay": if_layers_are_known(0.8, otherwise=1.0),
    "frozen_vision_fraction": unless_frozen(0.5),
    "ema_decay": unless_spread(0.99),
    "train_image_size": smaller_crops,
    "augmentation": crops_and_flips,
}
# Kind of run: what is trained, for the log, and its rules.
KINDS: dict[str, tuple[str, Values]] = {
    "frozen": (
        "heads on two frozen towers",
        COMMON
        | NEW_HEADS
        | {
            "freeze": "both",
            "batch_size": quarter_of_images(128, 512),
            "captions_per_image": at_most(5),
            "num_train_epochs": epochs_for_steps(80, least=12, most=20),
            "warmup_steps": share_of_steps(0.1, 10),
            "head_learning_rate": 3e-3,
        },
    ),
    "full": (
        "heads and pretrained towers",
        COMMON
        | NEW_HEADS
        | TRAINED_TOWERS
        | {"num_train_epochs": epochs_up_to(12, 6000, least=5), "head_learning_rate": 1e-3},
    ),
    "continue": (
        "from a trained model",
        COMMON | TRAINED_TOWERS | {"num_train_epochs": epochs_up_to(10, 6000, least=5), "head_learning_rate": 2e-4},
    ),
    # Rates and weight decay of FLYP (Goyal et al. 2023, "Finetune like you pretrain"): higher rates undo what a CLIP
    # has learned from millions of images.
    "clip": (
        "from a CLIP",
        COMMON
        | TRAINED_TOWERS
        | {
            "num_train_epochs": epochs_up_to(10, 6000, least=5),
            **dict.fromkeys(PART_RATES, 1e-5),
            "layer_decay": 1.0,
            "frozen_vision_fraction": 0.0,
        },
    ),
    "scratch": (
        "from random weights",
        COMMON
        | {
            "batch_size": quarter_of_images(32, 128),
            "captions_per_image": at_most(2),
            "num_train_epochs": epochs_for_steps(280, least=6, most=30),
            "head_learning_rate": 1e-3,
            "vision_learning_rate": 1e-3,
            "text_learning_rate": 1e-3,
            "weight_decay": 0.05,
        },
    ),
}

# Rates of adapters, as published for CLIP (CLIP-LoRA, Zanella & Ben Ayed 2024), instead of those of the towers. The
# layers of the towers stay as they are, so none has to be protected.
ADAPTERS: Values = {
    "vision_learning_rate": 2e-4,
    "text_learning_rate": 2e-4,
    "layer_decay": 1.0,
    "frozen_vision_fraction": 0.0,
}


def kind_of_run(arguments: TrainingArguments, facts: Facts) -> str:
    """The key in `KINDS`."""
    if arguments.preset is not None:
        return "scratch"
    if arguments.model_name_or_path is not None:
        return "clip" if facts.is_clip else "continue"
    if arguments.freeze is not None:
        return "frozen" if arguments.freeze == "both" else "full"
    trains_towers = any(getattr(arguments, name) is not None for name in OF_TRAINED_TOWERS)
    return "full" if trains_towers or facts.images >= FEW_IMAGES else "frozen"


def asks_about_tower(arguments: TrainingArguments) -> bool:
    """Whether a rule depends on the image tower: not for heads on frozen towers and images of a given size."""
    frozen = arguments.freeze == "both" and arguments.model_name_or_path is None
    return arguments.preset is None and not (frozen and arguments.image_size is not None)


def derive(arguments: TrainingArguments, facts: Facts) -> tuple[TrainingArguments, list[str]]:
    """Arguments with every derived flag, and lines that say which values were derived.

    With a time limit, `num_train_epochs` stays None until the time of a step is known.

    Args:
        arguments: checked arguments; a flag of `DERIVED` that is None was not given.
        facts: what the rules depend on.
    """
    what, rules = KINDS[kind_of_run(arguments, facts)]
    if arguments.lora_rank is not None:
        what, rules = f"{what}, with adapters", rules | ADAPTERS
    values: Values = dict(vars(arguments))
    derived: Values = {}
    for name in DERIVED:
        is_open = name == "num_train_epochs" and arguments.time_limit is not None
        if values[name] is None and not is_open:
            rule = rules[name]
            derived[name] = values[name] = rule(facts, values) if callable(rule) else rule
    return replace(arguments, **derived), describe(derived, f"{facts.images:,} images, {what}")


def describe(derived: Values, what: str) -> list[str]:
    """Lines for the log with the values that were derived, those of the schedule first; none if there are none.

    Args:
        derived: values by flag; those that are None are the model's own.
        what: what they were derived for.
    """
    shown = {name: _shown(name, value) for name, value in derived.items() if value is not None}
    of_model = DERIVED[DERIVED.index("projection_dim") :]
    parts = [", ".join(f"{name} {text}" for name, text in shown.items() if (name in of_model) is is_model)
             for is_model in (False, True)]  # fmt: skip
    heads = (f"settings for {what}: ", "settings of model and images: ")
    return [f"{head}{part}" for head, part in zip(heads, parts, strict=True) if part]


def _shown(name: str, value: Any) -> str:
    if name == "augmentation":
        return "+".join(step["name"] for step in json.loads(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
