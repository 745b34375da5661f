"""`--matryoshka_dims`: short embeddings, which are the first dimensions of an embedding, normalised again.

Kusupati et al. 2022, "Matryoshka Representation Learning": the loss is the mean of those of several lengths, the full
one included.
"""

from inspect import signature

from ..configuration_miniclip import MiniClipConfig
from ..errors import MiniClipError, UsageError
from ..utils.resources import named_file
from .command_line.arguments import TrainingArguments
from .command_line.check_arguments import matryoshka_dims
from .command_line.derived import NEW_HEADS
from .towers.create_model import read_preset

DEFAULT_DIM = signature(MiniClipConfig.__init__).parameters["projection_dim"].default


def check_lengths(arguments: TrainingArguments) -> None:
    """Check before the data are read that the model will have as many dimensions as `--matryoshka_dims` names.

    What cannot be read now, [`choose_lengths`] checks when the model is there.

    Raises:
        UsageError: a length is above the dimensions of the model.
    """
    dims = matryoshka_dims(arguments)
    if dims and (width := _planned_dim(arguments)) is not None:
        _check_fits(dims, width)


def choose_lengths(config: MiniClipConfig, arguments: TrainingArguments) -> None:
    """Set `matryoshka_dimensions` of a model: those of the flag, without it those that the model has already.

    The full length alone means ordinary training.

    Raises:
        UsageError: a length is above the dimensions of the model.
    """
    dims = matryoshka_dims(arguments)
    if dims:
        _check_fits(dims, config.projection_dim)
        lengths = [dim for dim in dims if dim < config.projection_dim]
        config.matryoshka_dimensions = [*lengths, config.projection_dim] if lengths else None


def short_lengths(config: MiniClipConfig) -> list[int]:
    """The trained lengths below the full one, ascending."""
    return list(config.matryoshka_dimensions or [])[:-1]


def loss_prefixes(config: MiniClipConfig) -> dict[int, float] | None:
    """The weight of each trained length in the loss, all the same; None for the full length alone."""
    return dict.fromkeys(config.matryoshka_dimensions, 1.0) if config.matryoshka_dimensions else None


def describe_lengths(config: MiniClipConfig) -> str | None:
    """One line about the trained lengths; None for the full length alone."""
    if not config.matryoshka_dimensions:
        return None
    *lengths, full = config.matryoshka_dimensions
    return f"short embeddings of {', '.join(map(str, lengths))} dimensions are trained, too, in addition to all {full}"


def _planned_dim(arguments: TrainingArguments) -> int | None:
    """Dimensions of the model that the arguments describe; None if its configuration cannot be read."""
    if arguments.projection_dim is not None:
        return arguments.projection_dim
    try:
        if arguments.preset is not None:
            return read_preset(named_file(arguments.preset, "presets", ".json")).projection_dim
        if arguments.model_name_or_path is not None:
            values = MiniClipConfig.get_config_dict(arguments.model_name_or_path)[0]
            is_ours = values.get("model_type") == MiniClipConfig.model_type
            return int(values.get("projection_dim", DEFAULT_DIM)) if is_ours else None
    except (MiniClipError, OSError, ValueError, TypeError):  # create_model reports it
        return None
    # A resumed run has the dimensions of its checkpoint.
    return NEW_HEADS["projection_dim"] if arguments.resume_from_checkpoint is None else None


def _check_fits(dims: list[int], width: int) -> None:
    if dims[-1] > width:
        raise UsageError(
            f"--matryoshka_dims {dims[-1]}: the embeddings of this model have {width} dimensions; name lengths of at "
            f"most {width}"
        )
