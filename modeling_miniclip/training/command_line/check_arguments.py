"""Check the values of a run's arguments, and interpret those that are more than a number or a word."""

import importlib.util
import math
import re
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from ...data.loading.augmentation import DEFAULT_AUGMENTATION
from ...data.word_swaps.swaps import SWAP_KINDS
from ...errors import MiniClipError, UsageError
from ...utils.plain_yaml import load_yaml
from .arguments import LOWER_BOUNDS, MODEL_SOURCES, PART_RATES, TrainingArguments

# Keys of --lr_scheduler_kwargs for each schedule, with their defaults.
SCHEDULE_DETAILS: dict[str, dict[str, Any]] = {"plateau": {"patience": 1, "factor": 0.8}, "cosine": {"hold_steps": 0}}
# Keys of --lora_kwargs with their defaults; those of alpha and targets depend on other flags and on the model.
LORA_DETAILS: dict[str, Any] = {"alpha": None, "dropout": 0.0, "targets": None}
BLENDS = tuple(tenth / 10 for tenth in range(11))  # that --blend auto tries
# Keys of --teacher_kwargs, with their defaults; without a temperature, it is the teacher's own.
TEACHER_DETAILS: dict[str, float | None] = {"weight": 1.0, "temperature": None}
LONGEST_NUMBER = 9  # digits of a number of dimensions


def check_arguments(arguments: TrainingArguments) -> None:
    """Check ranges and combinations that the parser cannot know.

    Raises:
        UsageError: a value is out of range or excluded by another one; names the flag.
        MiniClipError: the tracker is not installed.
    """
    _check_text_and_numbers(arguments)
    _check_ranges(arguments)
    _check_combinations(arguments)
    if arguments.best_metric is not None:
        _check_best_metric(arguments.best_metric, arguments.zero_shot_dataset)
    matryoshka_dims(arguments)
    checkpoint_interval(arguments)
    limit_in_seconds(arguments)
    schedule_details(arguments)
    _check_finetuning(arguments)
    teacher_details(arguments)
    augmentation_list(arguments)
    tracker = arguments.report_to
    if tracker not in ("none", "all") and importlib.util.find_spec(tracker) is None:
        raise MiniClipError(f"--report_to {tracker}: {tracker} is not installed; pip install {tracker}")


def _check_text_and_numbers(arguments: TrainingArguments) -> None:
    for name, value in asdict(arguments).items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise UsageError(f"--{name} contains a null character, which no name or path can: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} must be a finite number, not {value}")


def _check_ranges(arguments: TrainingArguments) -> None:
    given = {name: value for name, value in asdict(arguments).items() if value is not None}
    for name, bound in LOWER_BOUNDS.items():
        if name in given and given[name] < bound:
            raise UsageError(f"--{name} must be at least {bound}, not {given[name]}")
    if arguments.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, not {arguments.seed}")
    for name in ("learning_rate", *PART_RATES, "max_grad_norm"):
        if name in given and given[name] <= 0:
            raise UsageError(f"--{name} must be positive, not {given[name]}")
    if not 0 < arguments.validation_fraction < 1:
        raise UsageError(f"--validation_fraction must be between 0 and 1, not {arguments.validation_fraction}")
    for name in ("dropout", "projection_dropout", "frozen_vision_fraction", "frozen_text_fraction", "ema_decay"):
        if name in given and not 0 <= given[name] < 1:
            raise UsageError(f"--{name} must be in [0, 1), not {given[name]}")
    for name in ("layer_decay", "crop_pct"):
        if name in given and not 0 < given[name] <= 1:
            raise UsageError(f"--{name} must be in (0, 1], not {given[name]}")
    if not 0 <= arguments.max_bad_image_fraction <= 1:
        raise UsageError(f"--max_bad_image_fraction must be in [0, 1], not {arguments.max_bad_image_fraction}")


def _check_combinations(arguments: TrainingArguments) -> None:
    sources = [[name for name in names if getattr(arguments, name) is not None] for names in MODEL_SOURCES]
    named = [names for names in sources if names]
    if len(named) > 1:
        clash = " and ".join(f"--{name}" for names in named for name in names)
        raise UsageError(f"{clash} exclude each other: a model comes from a preset, from an export or from two towers")
    _check_hard_negatives(arguments.hard_negatives or [])
    _check_datasets(arguments.dataset or [], arguments.dataset_weights)
    others = arguments.validation_dataset or []
    if twice := next((name for name in others if others.count(name) > 1), None):
        raise UsageError(f"--validation_dataset names {twice} twice; name it once")
    if arguments.time_limit is not None:
        excluded = [name for name in ("num_train_epochs", "max_steps") if getattr(arguments, name) is not None]
        if excluded:
            raise UsageError(
                f"--time_limit and --{excluded[0]} exclude each other: the time decides how many steps there are"
            )
    if arguments.num_views is not None and arguments.freeze not in ("vision", "both"):
        raise UsageError("--num_views needs a frozen image tower: add --freeze vision or --freeze both")
    if arguments.num_views is not None and not augmentation_list(arguments):
        raise UsageError("--num_views needs an augmentation: with --augmentation [] all views are the same")
    if arguments.train_image_size is not None and not augmentation_list(arguments):
        raise UsageError(
            "--train_image_size is the size of augmented images, and there is no augmentation: set --augmentation, or "
            "leave out --train_image_size"
        )


def _check_datasets(datasets: list[str], weights: list[float] | None) -> None:
    if twice := next((name for name in datasets if datasets.count(name) > 1), None):
        raise UsageError(f"--dataset names {twice} twice; name it once, with a weight if it should be used more often")
    if weights is None:
        return
    if len(weights) != len(datasets):
        raise UsageError(f"--dataset_weights: {len(weights)} weights for {len(datasets)} datasets; give one for each")
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise UsageError(f"--dataset_weights must be positive numbers, not {bad[0]}")


def _check_hard_negatives(sources: list[str]) -> None:
    known = ("none", "column", "swap", *SWAP_KINDS)
    if unknown := next((source for source in sources if source not in known), None):
        raise UsageError(f"--hard_negatives {unknown}: choose from {', '.join(known)}")
    if "none" in sources and len(sources) > 1:
        raise UsageError(f"--hard_negatives {' '.join(sources)}: none excludes the others")


def _check_best_metric(name: str, zero_shot_dataset: str | None) -> None:
    if name == "loss":
        return
    from ...evaluation.metrics import METRIC_NAMES, ZERO_SHOT_METRICS  # loads torch

    if name in ZERO_SHOT_METRICS and zero_shot_dataset is None:
        raise UsageError(f"--best_metric {name} needs --zero_shot_dataset, a folder of class folders")
    if name not in METRIC_NAMES + ZERO_SHOT_METRICS:
        names = ", ".join(METRIC_NAMES + ZERO_SHOT_METRICS)
        raise UsageError(f"--best_metric {name}: choose from loss, {names}")


def checkpoint_interval(arguments: TrainingArguments) -> int | None:
    """Steps between two checkpoints; None for one after each epoch.

    Raises:
        UsageError: `--checkpointing_steps` is neither `epoch` nor a positive whole number.
    """
    if arguments.checkpointing_steps == "epoch":
        return None
    if not arguments.checkpointing_steps.isdecimal() or int(arguments.checkpointing_steps) < 1:
        raise UsageError(
            f"--checkpointing_steps must be 'epoch' or a whole number of steps, not {arguments.checkpointing_steps}"
        )
    return int(arguments.checkpointing_steps)


def limit_in_seconds(arguments: TrainingArguments) -> float | None:
    """Seconds of `--time_limit`; None without one.

    Raises:
        UsageError: it is no positive number with a unit s, m or h.
    """
    if arguments.time_limit is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", arguments.time_limit.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"--time_limit must be a time such as 90s, 20m or 1.5h, not {arguments.time_limit}")
    return seconds


def schedule_details(arguments: TrainingArguments) -> dict[str, Any]:
    """Details of the schedule: those in `--lr_scheduler_kwargs`, and [`SCHEDULE_DETAILS`] for the others.

    Raises:
        UsageError: no mapping, a key that the schedule does not have, or a value out of range.
    """
    flag, chosen = "--lr_scheduler_kwargs", arguments.lr_scheduler_type
    known = {name: value for kind, details in SCHEDULE_DETAILS.items() if chosen in (None, kind)
             for name, value in details.items()}  # fmt: skip
    given = mapping_in(flag, arguments.lr_scheduler_kwargs, known, "{hold_steps: 10}", chosen or "a schedule")
    for name, value in given.items():
        if name == "factor":
            if not isinstance(value, float) or not 0 < value < 1:
                raise UsageError(f"{flag}: factor must be between 0 and 1, not {value}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UsageError(f"{flag}: {name} must be a whole number of at least 0, not {value}")
    return known | given


def teacher_details(arguments: TrainingArguments) -> dict[str, float | None]:
    """Weight and temperature of the distillation: those in `--teacher_kwargs`, and [`TEACHER_DETAILS`] for the others.

    Raises:
        UsageError: no mapping, an unknown key, no positive number, or no `--teacher`.
    """
    flag = "--teacher_kwargs"
    given = mapping_in(flag, arguments.teacher_kwargs, TEACHER_DETAILS, "{weight: 2}", "a teacher")
    if given and arguments.teacher is None:
        raise UsageError(f"{flag} needs --teacher, a CLIP to learn from")
    for name, value in given.items():
        given[name] = _number(value)
        if not 0 < given[name] < math.inf:
            raise UsageError(f"{flag}: {name} must be a positive number, not {value}")
    return TEACHER_DETAILS | given


def mapping_in(flag: str, text: str | None, known: Collection[str], example: str, owner: str) -> dict[str, Any]:
    """The mapping that a flag holds as JSON or YAML; empty without the flag.

    Args:
        flag: name of the flag.
        text: its value, or None.
        known: keys that it may have.
        example: a right value, for error messages.
        owner: what takes these keys, for error messages.

    Raises:
        UsageError: it is no mapping, or has another key.
    """
    try:
        given: Any = load_yaml(text or "{}")
    except ValueError as error:
        raise UsageError(f"{flag} is neither JSON nor YAML: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f"{flag} must be a mapping such as {example}, not {text}")
    for name in given:
        if name not in known:
            raise UsageError(f"{flag}: unknown key {name!r}; {owner} takes {', '.join(known)}")
    return given


def _number(value: Any) -> float:
    """A number of a YAML file, to which 1e-2 is a text; NaN if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def lora_details(arguments: TrainingArguments) -> dict[str, Any]:
    """Details of the adapters: those in `--lora_kwargs`, and [`LORA_DETAILS`] for the others; alpha is 2 ranks.

    Raises:
        UsageError: no mapping, an unknown key, or a value of the wrong type or out of range.
    """
    flag = "--lora_kwargs"
    given = mapping_in(flag, arguments.lora_kwargs, LORA_DETAILS, "{alpha: 16}", "an adapter")
    details = LORA_DETAILS | {"alpha": 2 * (arguments.lora_rank or 1)} | given
    for name, is_right, what in (
        ("alpha", lambda value: 0 < value < math.inf, "a positive number"),
        ("dropout", lambda value: 0 <= value < 1, "a number in [0, 1)"),
    ):
        value = details[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not is_right(value):
            raise UsageError(f"{flag}: {name} must be {what}, not {value}")
    targets = details["targets"]
    are_names = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
    if targets is not None and not are_names:
        raise UsageError(f"{flag}: targets must be a list of names such as [q_proj, v_proj], not {targets}")
    return details


def blends(arguments: TrainingArguments) -> tuple[float, ...]:
    """Shares of the best model that `--blend` measures, ascending, with those of both ends; none without the flag.

    Raises:
        UsageError: the flag is neither `auto` nor a number in [0, 1].
    """
    share = chosen_blend(arguments)
    if arguments.blend is None:
        return ()
    return BLENDS if share is None else tuple(sorted({0.0, share, 1.0}))


def chosen_blend(arguments: TrainingArguments) -> float | None:
    """The number in `--blend`; None for `auto`, and without the flag.

    Raises:
        UsageError: as in [`blends`].
    """
    if arguments.blend in (None, "auto"):
        return None
    try:
        share = float(str(arguments.blend))
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UsageError(f"--blend must be auto or a number in [0, 1], not {arguments.blend}")
    return share


def _check_finetuning(arguments: TrainingArguments) -> None:
    for name, why in (
        ("blend", "the weights before training, to which it goes back"),
        ("retention_dataset", "a trained model, which may forget something"),
    ):
        if getattr(arguments, name) is not None and arguments.model_name_or_path is None:
            raise UsageError(f"--{name} needs --model_name_or_path: {why}")
    blends(arguments)
    lora_details(arguments)
    if arguments.lora_rank is None:
        if arguments.lora_kwargs is not None:
            raise UsageError("--lora_kwargs needs --lora_rank, the rank of the adapters")
        return
    if arguments.preset is not None:
        raise UsageError("--lora_rank needs trained weights, and those of a --preset are random: leave it out")
    if arguments.freeze == "both":
        raise UsageError("--lora_rank and --freeze both: no tower is left for adapters; leave out one of them")
    if importlib.util.find_spec("peft") is None:
        raise MiniClipError("--lora_rank: PEFT is not installed; pip install peft")


def matryoshka_dims(arguments: TrainingArguments) -> list[int]:
    """The lengths in `--matryoshka_dims`, separated by commas or spaces; empty without the flag.

    Raises:
        UsageError: one of them is not a positive whole number, or they do not ascend.
    """
    words = [word.strip() for part in arguments.matryoshka_dims or [] for word in part.split(",")]
    wrong = [word for word in words if not (word.isascii() and word.isdecimal() and len(word) <= LONGEST_NUMBER)]
    if wrong or any(int(word) < 1 for word in words):
        named = wrong[0] if wrong else "0"
        raise UsageError(f"--matryoshka_dims {named!r}: expected whole numbers of at least 1, such as 64,128,256")
    dims = [int(word) for word in words]
    ascending = sorted(set(dims))
    if dims != ascending:
        given, right = (",".join(map(str, some)) for some in (dims, ascending))
        raise UsageError(f"--matryoshka_dims {given}: name each length once, the shortest first: {right}")
    return dims


def augmentation_list(arguments: TrainingArguments) -> list[dict[str, Any]]:
    """The transforms in `--augmentation`, or the default ones.

    By default a frozen image tower gets none, so that its features are computed only once; `--num_views` turns the
    default ones on.

    Raises:
        UsageError: `--augmentation` is not a list of mappings with a name each.
    """
    if arguments.augmentation is None:
        is_run_once = arguments.freeze in ("vision", "both") and arguments.num_views is None
        return [] if is_run_once else list(DEFAULT_AUGMENTATION)
    try:
        transforms: Any = load_yaml(arguments.augmentation)
    except ValueError as error:
        raise UsageError(f"--augmentation is neither JSON nor YAML: {error}") from error
    if not isinstance(transforms, list) or not all(isinstance(t, dict) and "name" in t for t in transforms):
        raise UsageError(f"--augmentation must be a list of mappings with a name each, not {arguments.augmentation}")
    return list(transforms)
