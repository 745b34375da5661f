"""`--time_limit`: plan the rest of a run after its first steps; and say after the first steps of any run how long it
will take."""

import json
import sys
from dataclasses import replace

import torch

from .command_line.arguments import TrainingArguments
from .command_line.check_arguments import blends, checkpoint_interval, limit_in_seconds
from .command_line.recipes import save_arguments
from .hard_negatives import hard_negatives_of
from .optimizer import set_length
from .pace import Rest, in_words
from .processes.distributed import compute_on_main
from .resuming.resume_rules import recorded_flags
from .run import TrainingRun

# Share of the time after which the rest is planned. Until then the rates stay as they are after the warm-up, so that a
# run that knows its number of steps from the start takes the same steps.
PLANNED_AFTER = 0.1
NO_END = sys.maxsize  # number of the last step until it is known
END_SECONDS = 5.0  # curves, pictures, and loading the export again
FORWARD = 0.5  # time of an image in a validation, as a share of that in a step, until one is measured
BYTES_PER_SECOND = 2e8  # at which files are written, until it is measured


def last_step_of(arguments: TrainingArguments, steps_per_epoch: int) -> int:
    """Number of the step after which a run ends; [`NO_END`] until a time limit has decided it."""
    if arguments.num_train_epochs is None:
        return NO_END
    all_steps = arguments.num_train_epochs * steps_per_epoch
    return min(all_steps, arguments.max_steps or all_steps)


def keep_time(run: TrainingRun) -> None:
    """After a step: with a time limit, plan the rest once the time of a step is known; say how long the run will take.

    Every process must call it: rank 0 decides.
    """
    pace = run.pace
    pace.count_step()
    if run.last_step == NO_END:
        limit = limit_in_seconds(run.arguments) or 0.0
        is_main = run.accelerator.is_main_process
        last = compute_on_main(lambda: planned_last_step(run, limit), is_main)
        if last is not None:
            plan(run, last)
    elif not pace.is_reported and pace.is_known and run.accelerator.is_main_process:
        synchronize(run)
        run.say(f"about {in_words(rest_of(run).seconds(run.last_step))} left, {pace.step_seconds:.2g} s per step")
        pace.is_reported = True


def planned_last_step(run: TrainingRun, limit: float) -> int | None:
    """Number of the last step that fits into the limit; None if it is too early to say."""
    if run.pace.elapsed < PLANNED_AFTER * limit or not run.pace.is_known:
        return None
    synchronize(run)
    return rest_of(run).last_step(max(0.0, limit - run.pace.elapsed))


def plan(run: TrainingRun, last: int) -> None:
    """Let the run and its schedule end at a step; from now on its arguments say so, without a clock."""
    steps, done = run.steps_per_epoch, run.progress.step
    hold = max(0, done - run.arguments.warmup_steps)  # at the full rates so far
    run.arguments = replace(
        run.arguments,
        num_train_epochs=-(-last // steps),
        max_steps=last if last % steps else None,
    )
    if run.arguments.lr_scheduler_type == "cosine":
        run.arguments = replace(run.arguments, lr_scheduler_kwargs=json.dumps({"hold_steps": hold}))
    run.last_step = last
    set_length(run.scheduler, run.arguments, last)
    if run.fingerprint is not None:
        run.fingerprint.flags = recorded_flags(run.arguments)
    if run.accelerator.is_main_process:
        save_arguments(run.arguments, run.output_dir / "arguments.yaml")
    fits = f"--time_limit {run.arguments.time_limit}: {last} steps, {last / steps:.4g} epochs"
    run.say(f"{fits}, {run.pace.step_seconds:.2g} s per step")
    if last <= max(done, run.arguments.warmup_steps):
        run.say("warning: the time limit is too short for this data and model: there is little left to train")
    run.pace.is_reported = True


def rest_of(run: TrainingRun) -> Rest:
    """What is left of a run, by what was measured so far, and by estimates of what was not."""
    pace, step = run.pace, run.pace.step_seconds
    validation = _mean(pace.validations) or estimated_validation(run, step)
    checkpoint = _mean(pace.checkpoints) or written(run, 3)  # the weights, and the two moments of AdamW
    further = validation if hard_negatives_of(run.arguments) is not None else 0.0  # the test of word order
    if shares := blends(run.arguments):
        further += (len(shares) + 1) * validation
    return Rest(
        done=run.progress.step,
        steps_per_epoch=run.steps_per_epoch,
        step=max(step, 1e-6),
        validation=validation,
        checkpoint=checkpoint,
        end=END_SECONDS + further,
        eval_steps=run.arguments.eval_steps,
        checkpointing_steps=checkpoint_interval(run.arguments),
    )


def estimated_validation(run: TrainingRun, step: float) -> float:
    """Seconds of a validation with its export, from those of a step."""
    side = run.processor.image_processor.crop_size["height"]
    pixels = (side / (run.arguments.train_image_size or side)) ** 2
    batch = min(run.arguments.batch_size, len(run.train_loader.rows))
    return FORWARD * pixels * step * len(run.validation_split) / batch + written(run, 1)


def written(run: TrainingRun, copies: int) -> float:
    """Seconds that files take with the weights, and further copies of those that are trained."""
    parameters = list(run.unwrapped_model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    numbers = sum(parameter.numel() for parameter in parameters) + (copies - 1) * trained
    return 4 * numbers / BYTES_PER_SECOND


def synchronize(run: TrainingRun) -> None:
    """Wait for the steps that a GPU has not finished yet, which have not taken their time."""
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()


def _mean(seconds: list[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0
