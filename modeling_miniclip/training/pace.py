"""How long the steps, validations and checkpoints of a run take, and how many steps fit into a time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FEWEST_STEPS = 3  # to measure; the first step of a run, which also starts the loader processes, is not one of them
MEASURED_STEPS, MEASURED_SECONDS = 10, 5.0  # of these, whichever is reached first


@dataclass
class Pace:
    """Times of a run, measured by this process.

    Args:
        started: `time.perf_counter()` at the start of the command.
    """

    started: float = field(default_factory=time.perf_counter)
    first_step: float | None = field(default=None, init=False)  # when it ended
    steps: int = field(default=0, init=False)  # after the first one
    left_out: float = field(default=0.0, init=False)  # seconds since the first step that are no steps
    validations: list[float] = field(default_factory=list, init=False)  # seconds of each, with its export
    checkpoints: list[float] = field(default_factory=list, init=False)
    is_reported: bool = field(default=False, init=False)

    def count_step(self) -> None:
        """Count a step that has just ended."""
        if self.first_step is None:
            self.first_step = time.perf_counter()
        else:
            self.steps += 1

    def add_validation(self, seconds: float) -> None:
        """Add the time of a validation and of the export after it."""
        self.validations.append(seconds)
        self._leave_out(seconds)

    def add_checkpoint(self, seconds: float) -> None:
        """Add the time of a checkpoint."""
        self.checkpoints.append(seconds)
        self._leave_out(seconds)

    def _leave_out(self, seconds: float) -> None:
        if self.first_step is not None:
            self.left_out += seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start of the command."""
        return time.perf_counter() - self.started

    @property
    def in_steps(self) -> float:
        """Seconds of the measured steps."""
        return 0.0 if self.first_step is None else time.perf_counter() - self.first_step - self.left_out

    @property
    def is_known(self) -> bool:
        """Whether enough steps were measured to say how long the others will take."""
        enough = self.steps >= MEASURED_STEPS or self.in_steps >= MEASURED_SECONDS
        return self.steps >= FEWEST_STEPS and enough

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, including the wait for its images."""
        return self.in_steps / max(1, self.steps)


@dataclass(frozen=True)
class Rest:
    """The rest of a run after a step whose validation, if it ends an epoch, is still to come.

    Args:
        done: number of steps so far.
        steps_per_epoch: steps of an epoch.
        step: seconds of a step.
        validation: seconds of a validation with its export.
        checkpoint: seconds of a checkpoint.
        end: seconds of what comes after the last validation.
        eval_steps: interval of further validations, in steps.
        checkpointing_steps: interval of checkpoints, in steps; None is one per epoch.
    """

    done: int
    steps_per_epoch: int
    step: float
    validation: float = 0.0
    checkpoint: float = 0.0
    end: float = 0.0
    eval_steps: int | None = None
    checkpointing_steps: int | None = None

    def seconds(self, last: int) -> float:
        """Seconds until the end of a run whose last step has this number."""
        epochs = self._multiples(self.steps_per_epoch, last)
        validations, checkpoints = epochs + (last % self.steps_per_epoch > 0), epochs
        if self.eval_steps is not None:
            at_both = math.lcm(self.eval_steps, self.steps_per_epoch)
            validations += self._multiples(self.eval_steps, last) - self._multiples(at_both, last)
        if self.checkpointing_steps is not None:
            checkpoints = self._multiples(self.checkpointing_steps, last)
        checkpoints += last % (self.checkpointing_steps or self.steps_per_epoch) > 0  # at the end of the run
        others = validations * self.validation + checkpoints * self.checkpoint
        return (last - self.done) * self.step + others + self.end

    def _multiples(self, interval: int, last: int) -> int:
        # From `done` on: what is due at that step is still to come.
        return last // interval - (self.done - 1) // interval

    def last_step(self, seconds: float) -> int:
        """Number of the last step if the run is to end within this time; at least `done`."""
        most = self.done + math.ceil(seconds / self.step)
        return largest(lambda last: self.seconds(last) <= seconds, self.done, most)


def largest(is_right: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in `low..high` for which a condition is true that holds up to some number; at least `low`."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_right(middle) else (low, middle - 1)
    return low


def in_words(seconds: float) -> str:
    """A time for people: `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 2 * 60 else f"{max(2, round(seconds))} seconds"
