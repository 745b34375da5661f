"""A step that does not fit into memory is repeated in chunks, as if `--chunk_size` had been given."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from modeling_miniclip import MiniClipError, MiniClipModel
from modeling_miniclip.inference.fit import PER_OUTPUT
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.command_line.recipes import read_recipe
from modeling_miniclip.training.memory import steps
from modeling_miniclip.training.memory.activations import (
    PER_KEPT,
    bytes_of_pixels,
    bytes_to_come,
    most_of_step,
    step_within,
)
from modeling_miniclip.training.memory.sizes import StepSizes, size_of
from modeling_miniclip.training.memory.steps import compute_step, describe_chunks
from modeling_miniclip.training.resuming.resume_rules import changed_flags, recorded_flags
from modeling_miniclip.training.settings import saved_settings
from tests.helpers.forks import fork, train_in_processes
from tests.helpers.runs import assert_same_log, assert_same_weights, flags, launch, metrics_of, plain_arguments
from train_miniclip import main

# Dropout and trained batch norms: what a failed attempt draws and updates must be undone.
RANDOM: dict[str, Any] = {"num_train_epochs": 1, "captions_per_image": 2, "dropout": 0.1}
EXACT: dict[str, Any] = {"num_train_epochs": 1, "captions_per_image": 2, "dropout": 0, "freeze_batch_norm": "true"}


def limit_steps(patch: pytest.MonkeyPatch, most: int, where: str = "forward", trains: bool = True) -> None:
    """Let the model run out of memory with more than `most` images, after its forward pass or in its backward pass.

    Args:
        patch: what to patch the model with.
        most: most images that fit.
        where: `forward` or `backward`.
        trains: whether steps of training fail, or else forward passes without gradients.
    """
    forward = MiniClipModel.forward

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    @wraps(forward)
    def limited(self: Any, *args: Any, **inputs: Any) -> Any:
        output = forward(self, *args, **inputs)
        pixels = inputs.get("pixel_values")
        if torch.is_grad_enabled() == trains and pixels is not None and len(pixels) > most:
            if where == "forward":
                fail(pixels)
            output.image_embeds.register_hook(fail)
        return output

    patch.setattr(MiniClipModel, "forward", limited)


# --- a run in one process --------------------------------------------------------------------------------------------


def test_run_repeats_a_step_as_if_the_chunk_was_given(
    tmp_path: Path, without_finish: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags(tmp_path, "given", chunk_size=4, **RANDOM))
    assert "not enough memory" not in capsys.readouterr().out
    for where in ("forward", "backward"):
        with pytest.MonkeyPatch.context() as patch:
            limit_steps(patch, 4, where)
            main(flags(tmp_path, where, **RANDOM))
        assert re.findall("not enough memory.*", capsys.readouterr().out) == [
            "not enough memory for 8 images at a time: 4 from now on (--chunk_size 4), each computed twice, which "
            "changes the run: batch norms see 4 images at a time and dropout draws other masks"
        ]
        assert read_recipe(tmp_path / where / "arguments.yaml")["chunk_size"] == 4
        assert_same_log(tmp_path / "given", tmp_path / where)
        assert_same_weights(tmp_path / "given" / "export", tmp_path / where / "export", 0)


def test_run_in_chunks_trains_as_the_whole_step(
    tmp_path: Path, without_finish: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(flags(tmp_path, "whole", **EXACT))
    limit_steps(monkeypatch, 3)
    main(flags(tmp_path, "chunks", **EXACT))
    line = "not enough memory for 8 images at a time: 2 from now on .*with the gradients of the whole step"
    assert re.search(line, capsys.readouterr().out)
    whole, chunks = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "chunks")
    assert len(whole) == len(chunks) == 4
    for one, other in zip(whole, chunks, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_step_that_never_fits_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_steps(monkeypatch, 1)
    with pytest.raises(MiniClipError, match="even with 2 images at a time: lower --image_size"):
        main(flags(tmp_path, **EXACT))


def test_check_on_one_batch_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_steps(monkeypatch, 4)
    with pytest.raises(MiniClipError, match="in 2 steps on one batch"):
        main(flags(tmp_path, overfit_batch=True, max_steps=2))
    assert not (tmp_path / "run").exists()


def test_validation_does_not_depend_on_parts(
    tiny_run: Path, tmp_path: Path, without_finish: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    limit_steps(monkeypatch, 2, trains=False)
    main(flags(tmp_path))
    assert "not enough memory for 5 images with their texts at a time: 2 from now on" in capsys.readouterr().out
    assert_same_log(tiny_run, tmp_path / "run")


def test_resumed_runs_keep_the_chunk() -> None:
    saved = recorded_flags(plain_arguments(chunk_size=4))
    now = parse_arguments(["--dataset=a"])
    assert saved_settings(now, saved).chunk_size == 4
    assert "chunk_size" not in changed_flags(saved, now, "applied")
    larger = saved_settings(parse_arguments(["--dataset=a", "--chunk_size=16"]), saved)
    assert larger.chunk_size == 16 and changed_flags(saved, larger, "applied")["chunk_size"] == (4, 16)


# --- several processes -----------------------------------------------------------------------------------------------


def limit_rank_1(where: str, rank: int) -> None:
    """Let only the second of two processes run out of memory."""
    if rank == 1:
        limit_steps(pytest.MonkeyPatch(), 2, where)


def leave_nothing_to_rank_1(rank: int) -> None:
    """Let only the second of two processes find no free memory."""
    if rank == 1:
        pytest.MonkeyPatch().setattr(steps, "free_memory", lambda: 0)


@pytest.mark.slow
def test_all_processes_repeat_a_step_that_failed_in_one(tmp_path: Path) -> None:
    values = RANDOM | {"image_size": 64}  # batch norms need several numbers per channel, also of a single image
    train_in_processes(flags(tmp_path, "given", chunk_size=2, **values), 2, tmp_path / "given.log")
    causes: dict[str, Callable[[int], object]] = {
        "forward": partial(limit_rank_1, "forward"),
        "backward": partial(limit_rank_1, "backward"),
        "estimate": leave_nothing_to_rank_1,
    }
    for name, before in causes.items():
        output = train_in_processes(flags(tmp_path, name, **values), 2, tmp_path / f"{name}.log", before=before)
        assert output.count("not enough memory for 4 images at a time: 2 from now on") == 1, name
        assert_same_log(tmp_path / "given", tmp_path / name)
        assert_same_weights(tmp_path / "given" / "export", tmp_path / name / "export", 0)


# --- on a CPU, nothing fails -----------------------------------------------------------------------------------------


def test_what_autograd_keeps_is_counted() -> None:
    x = torch.full((1000,), 0.1, requires_grad=True)

    def step() -> Tensor:
        y = x.exp()  # keeps its result, 4,000 bytes
        return y.sin().exp().sum()  # keep y, which is counted, and the result of exp

    step().backward()
    expected, x.grad = x.grad, None
    most = int(PER_KEPT * 8000)
    with step_within(most, nn.Identity()):
        for _ in range(3):  # what a backward pass has used does not count any more
            x.grad = None
            step().backward()
            assert x.grad is not None and torch.equal(x.grad, expected)
    with pytest.raises(MemoryError, match=f"more than {most - 1} bytes"), step_within(most - 1, nn.Identity()):
        step()
    with pytest.raises(MemoryError), step_within(most, nn.Identity(), at_once=most + 1):
        pytest.fail("the pixels alone are too much")


def test_parameters_do_not_count() -> None:
    tower = nn.Linear(100, 100)
    rows = torch.ones(1, 100, requires_grad=True)
    most = int(PER_KEPT * 400 + PER_OUTPUT * 400)
    with step_within(most, tower):  # the rows, and the output; the weight is kept, too
        tower(rows).sum().backward()
    with pytest.raises(MemoryError), step_within(most, nn.Identity()):
        tower(rows)


def test_outputs_of_frozen_layers_count() -> None:
    tower = nn.Linear(1, 100).requires_grad_(False)
    with step_within(PER_OUTPUT * 400, tower):
        tower(torch.ones(1, 1))
    with pytest.raises(MemoryError), step_within(PER_OUTPUT * 400 - 1, tower):
        tower(torch.ones(1, 1))


def test_budget_is_what_the_parameters_leave() -> None:
    assert most_of_step(1000, 2, 50) == 450 - 50  # 9 tenths of it, in two processes
    assert most_of_step(1000, 2, 451) == 0
    tower = nn.Linear(2, 1)  # three numbers
    assert [bytes_to_come(tower, has_moments) for has_moments in (True, False)] == [12, 36]
    assert bytes_to_come(tower.requires_grad_(False), False) == 0
    batch = {"pixel_values": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)}
    assert bytes_of_pixels(batch, 3) == 3 * 12 * 4 * 2 and bytes_of_pixels({}, 3) == 0


@pytest.mark.parametrize(
    ("chunk_size", "free", "expected"),
    [
        (None, 2**50, None),
        (None, 0, 2),  # the smallest chunk, which is never stopped
        (4, 0, 4),  # the user's choice
    ],
)
def test_run_takes_what_the_machine_leaves(
    chunk_size: int | None, free: int, expected: int | None, tmp_path: Path, without_finish: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(steps, "free_memory", lambda: free)
    main(flags(tmp_path, max_steps=1, chunk_size=chunk_size, **EXACT))
    assert read_recipe(tmp_path / "run" / "arguments.yaml")["chunk_size"] == expected


# --- a process with a limit ------------------------------------------------------------------------------------------


def plain_run(lines: list[str], **values: Any) -> Any:
    """What `compute_step` needs of a run in one process."""
    model = nn.Linear(1, 1)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, distributed_type=DistributedType.NO, is_main_process=True
    )
    return SimpleNamespace(
        accelerator=accelerator, model=model, unwrapped_model=model, optimizer=torch.optim.AdamW(model.parameters()),
        arguments=plain_arguments(overfit_batch=True, **values), fingerprint=None, say=lines.append,
        sizes=StepSizes(is_given=True),
    )  # fmt: skip


def batch_of(images: int) -> dict[str, Any]:
    return {"image_id": torch.arange(images), "text_image_id": torch.arange(images)}


def chunk_under_limit(left: int, per_image: int) -> tuple[int | None, list[str]]:
    """The chunk of a step of eight images that takes some bytes per image, in a process with a limit."""
    import resource

    import psutil

    def compute(run: Any, batch: Any, model: Any, exchange: Any) -> Tensor:
        images = min(run.arguments.chunk_size or 8, 8)
        return torch.ones(images * per_image, dtype=torch.uint8)[:1]

    lines: list[str] = []
    run = plain_run(lines)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + left, hard))
    compute_step(run, batch_of(8), compute)
    return run.arguments.chunk_size, lines


def test_failed_allocation_halves_the_chunk() -> None:
    process = fork(chunk_under_limit, 200 * 2**20, 64 * 2**20)
    process.join(60)
    chunk_size, lines = process.result
    assert chunk_size == 2, "four images take 256 MiB"
    assert len(lines) == 1 and lines[0].startswith("not enough memory for 8 images at a time: 2 from now on")


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A new control group with a limit in bytes, in the one that `MINICLIP_CONTROL_GROUP` names; skips without it.

    A test makes none without being asked: groups belong to whoever runs this machine.
    """
    parent = os.environ.get("MINICLIP_CONTROL_GROUP")
    if parent is None:
        pytest.skip("MINICLIP_CONTROL_GROUP names no control group in which tests may make their own")
    group = Path(parent, f"miniclip-{os.getpid()}")
    group.mkdir()
    try:
        is_first = (group / "memory.limit_in_bytes").exists()  # version 1
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(limit), encoding="utf-8")
        yield group
    finally:
        group.rmdir()


@pytest.mark.long
def test_run_stays_within_a_control_group(tmp_path: Path) -> None:
    argv = flags(tmp_path, image_size=1024, max_steps=1, **EXACT)  # eight images would take about 5 GiB
    with control_group(3 * 2**30) as group:
        done = launch(argv, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert "not enough memory for 8 images at a time" in done.stdout


# --- parts of it -----------------------------------------------------------------------------------------------------


def test_other_errors_end_the_step() -> None:
    def compute(run: Any, batch: Any, model: Any, exchange: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        compute_step(plain_run([]), batch_of(8), compute)


def test_processes_that_spread_weights_name_the_flag() -> None:
    def compute(run: Any, batch: Any, model: Any, exchange: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = plain_run([], batch_size=64)
    run.accelerator.distributed_type, run.accelerator.num_processes = DistributedType.FSDP, 2
    with pytest.raises(MiniClipError, match="32 images at a time: .*--chunk_size 16 and --resume_from_checkpoint"):
        compute_step(run, batch_of(32), compute)


def test_step_without_moments_of_the_optimizer_is_not_known() -> None:
    def compute(run: Any, batch: Any, model: Any, exchange: Any) -> Tensor:
        return torch.zeros(())

    run = plain_run([])
    compute_step(run, batch_of(8), compute)
    assert run.sizes.known == []
    run.model(torch.ones(1, 1)).sum().backward()
    run.optimizer.step()
    compute_step(run, batch_of(8), compute)
    assert run.sizes.known == [(8, 8, 0)]


def test_sizes_within_one_that_fitted_fit() -> None:
    sizes = StepSizes()
    assert not sizes.fits((1, 1, 1))
    for size in ((8, 16, 10), (8, 12, 20), (8, 8, 8)):
        sizes.add(size)
    assert sizes.known == [(8, 16, 10), (8, 12, 20)]
    assert sizes.fits((8, 12, 20)) and sizes.fits((2, 16, 3)) and not sizes.fits((8, 13, 11))
    sizes.add((8, 16, 20))
    assert sizes.known == [(8, 16, 20)]
    batch = batch_of(3) | {"input_ids": torch.zeros(3, 7)}
    assert (size_of(batch), size_of(batch_of(2))) == ((3, 3, 7), (2, 2, 0))


def test_log_says_what_chunks_change() -> None:
    assert describe_chunks(64, 16, draws=False, has_norms=False) == (
        "not enough memory for 64 images at a time: 16 from now on (--chunk_size 16), each computed twice, with the "
        "gradients of the whole step"
    )
    assert describe_chunks(64, 16, draws=True, has_norms=False).endswith(
        "each computed twice, which changes the run: dropout draws other masks"
    )
