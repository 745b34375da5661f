"""`train`: the training script as a function, for programs and notebooks."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

from ..errors import UsageError
from ..training.command_line.parsing import keyword_arguments
from ..training.reports.callbacks import Callback, Callbacks
from .clean_process import clean_process
from .describe_keywords import show_keywords
from .keywords import TrainingKeywords
from .result import TrainResult
from .sources import named_sources


def train(
    dataset: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    validation: Any = None,
    on_step: Callback | None = None,
    on_validation: Callback | None = None,
    **flags: Unpack[TrainingKeywords],
) -> TrainResult:
    """Train a CLIP, as `train_miniclip.py` does: equal arguments give equal weights.

    Interrupting it (Ctrl-C, or the kernel of a notebook) ends it after the current step and returns the best model so
    far; a second time stops it at once. The process is left as it was before: seeds, threads, environment, signal
    handlers. It also runs outside the main thread, where nothing can interrupt it, and in the processes of
    `accelerate.notebook_launcher`, where [`TrainResult.load`] gives the result.

    Args:
        dataset: captioned images. A path or name, as for the script; a DataFrame of pandas or polars, a
            `datasets.Dataset` or `DatasetDict`, a list of dictionaries, or a dictionary with one of these for each
            split, with the columns of a caption file, and images as paths, PIL images, encoded images (bytes) or
            arrays; or a list of several of these. Without a dataset, the built-in scenes.
        output_dir: folder for the results ("miniclip-output").
        validation: the same for all validation images, the script's `validation_dataset`; by default they are a part
            of the dataset. Weights are for training only.
        on_step: function called after each step with its number and the training metrics that were logged last, every
            `logging_steps` steps; if it returns False, the run ends as after an interrupt.
        on_validation: function called after each validation with the step and the metrics; if it returns False, the
            run ends with the best model so far.
        **flags: the flags of the script, by their names; None is the same as leaving one out.

    Returns:
        The best model with its processor, metrics, history and folder.

    Raises:
        UsageError: an argument is wrong, or `train` is running in another thread; the message is that of the script.
        MiniClipError: the data or a model is wrong, or the disk is full; the message says where, and how to fix it.

    Examples:
        >>> result = train("captions.csv", "my-clip", time_limit="20m")  # doctest: +SKIP
        >>> result.metrics["rsum"], result.model  # doctest: +SKIP
    """
    started = time.perf_counter()
    given: dict[str, Any] = {**flags, "output_dir": output_dir}
    wanted = [str(given[name]) for name in ("image_column", "caption_column") if given.get(name) is not None]
    with clean_process(), ExitStack() as stack:
        from train_miniclip import run_training  # within `clean_process`, as it changes the environment

        further = given.get("validation_dataset") if validation is None else validation  # as the script calls it
        for name, source in (("dataset", dataset), ("validation_dataset", further)):
            if source is not None:
                given[name], weights = stack.enter_context(named_sources(source, wanted))
                if weights is not None and name != "dataset":
                    raise UsageError(
                        "validation: only datasets to train on have weights; pass a list of paths and names"
                    )
                if weights is not None:
                    given["dataset_weights"] = weights
        arguments = keyword_arguments(given)
        run_training(arguments, started, Callbacks(on_step, on_validation))
    folder = Path(arguments.output_dir)
    is_logged = (folder / "metrics.jsonl").is_file() and not arguments.overfit_batch  # not on another machine
    return TrainResult.load(folder) if is_logged else TrainResult(folder)


show_keywords(train, TrainingKeywords)
