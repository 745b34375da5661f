"""`--blend`: at the end of a run, weights between those before training and those of the best model.

Fine-tuning gains on the new data and loses elsewhere; weights in between often have most of the gain and little of the
loss (WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"). Rank 0 mixes the weights of plain
models, without adapters, and sends them to all processes: the result depends neither on their number nor on how they
share the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import ModelError, one_line
from ...evaluation.metrics import is_better
from ...inference.loading import load_export
from ...modeling_miniclip import MiniClipModel
from ..command_line.check_arguments import blends, chosen_blend
from ..processes.deepspeed import changed_on_main
from ..processes.distributed import check_on_main, process_count
from ..publish import export_best
from ..reports.measure import (
    classify_images,
    embed_validation_split,
    measure_embeddings,
    measure_retention,
    metric_intervals,
)
from ..reports.reporting import describe_validation
from ..reports.shared_captions import recall_with_shared
from ..reports.short_embeddings import report_lengths
from ..run import TrainingRun
from .lora import ADAPTER, adapted_layers, merged_weights, plain_name

SPLIT = "blend"  # in metrics.jsonl


@dataclass(frozen=True)
class Blend:
    """A measured blend.

    Args:
        share: share of the best model, in [0, 1]; the rest is the model before training.
        metrics: on the validation split.
        retained: on `--retention_dataset`; None without it.
    """

    share: float
    metrics: dict[str, float]
    retained: dict[str, float] | None = None


def blend_with_start(run: TrainingRun) -> None:
    """Measure the blends that `--blend` names, and export the chosen one. Every process must call it.

    Nothing happens without the flag, or if the run was interrupted: a resumed run blends at its end.

    Raises:
        ModelError: the best model cannot be read.
    """
    shares, is_main = blends(run.arguments), run.accelerator.is_main_process
    if not shares:
        return
    if run.signals.agreed is not None:
        run.say("not blended with the model before training, as the run was interrupted; it will be if you resume it")
        return
    best: dict[str, Tensor] = {}
    check_on_main(lambda: best.update(exported_weights(run)), is_main)
    blended = partial(_load_blend, run, best)
    found = [measure_blend(run, share, blended) for share in shares]
    share, metric = chosen_blend(run.arguments), str(run.arguments.best_metric)
    why = ""
    if share is None:
        share = best_blend(found, metric)
        both = f"the best mean of {metric} here and on {run.retention.name}" if run.retention else f"the best {metric}"
        why = f", {both}"
    blended(share)
    run.log.write(run.progress.step, run.epoch, f"chosen {SPLIT}", {"share": share})
    export_blend(run, {"share": share, "is_auto": bool(why), "rows": [vars(one) for one in found]})
    run.say(f"exported: {share:.0%} of the best model and {1 - share:.0%} of that before training{why}")


def exported_weights(run: TrainingRun) -> dict[str, Tensor]:
    """The weights of the best model so far, on the CPU.

    Raises:
        ModelError: they cannot be read.
    """
    try:
        return dict(load_export(str(run.export_dir), "export")[0].state_dict())
    except (OSError, ValueError) as error:
        raise ModelError(f"{run.export_dir} is wrong: {one_line(error)}; resume the run") from error


def measure_blend(run: TrainingRun, share: float, load: Callable[[float], None]) -> Blend:
    """Measure a blend, for the log and metrics.jsonl.

    Args:
        run: the run.
        share: share of the best model.
        load: function that gives the run's model the weights for a share.
    """
    load(share)
    metrics = measure_embeddings(run, embed_validation_split(run)) | classify_images(run)[0]
    retained = measure_retention(run)
    of_both = metrics | {f"retained_{name}": value for name, value in (retained or {}).items()}
    run.log.write(run.progress.step, run.epoch, SPLIT, {"share": share} | of_both)
    run.say(describe_validation(f"blend {share:g}", metrics))
    if retained is not None:
        run.say(describe_validation("  retained", retained))
    return Blend(share, metrics, retained)


def export_blend(run: TrainingRun, blended: dict[str, Any]) -> None:
    """Measure the weights that the run's model has now, and export them.

    Args:
        run: the run.
        blended: what was measured and chosen, for the model card.
    """
    embeddings, is_main = embed_validation_split(run), run.accelerator.is_main_process
    classified, class_ranks = classify_images(run)
    metrics = measure_embeddings(run, embeddings) | classified
    retained = measure_retention(run)
    by_length = report_lengths(run, embeddings)
    intervals = metric_intervals(run, embeddings, class_ranks) if is_main else {}
    with_shared = recall_with_shared(run, embeddings) if is_main else None
    run.progress.best_value = metrics[str(run.arguments.best_metric)]
    export_best(run, metrics, intervals, with_shared, by_length, retained, blended)
    run.exported.record(*embeddings)


# --- the choice ------------------------------------------------------------------------------------------------------


def best_blend(found: Sequence[Blend], metric: str) -> float:
    """The share with the best value on the validation split or, with a second dataset, the best mean on both.

    For the mean, each value is relative to the best one on its dataset. Among equal shares, the largest wins.

    Args:
        found: measured blends.
        metric: `--best_metric`; on a second dataset that lacks it, rsum counts.
    """
    scores = relative_values([one.metrics[metric] for one in found], metric)
    retained = [one.retained for one in found if one.retained is not None]
    if retained:
        name = metric if metric in retained[0] else "rsum"
        kept = relative_values([metrics[name] for metrics in retained], name)
        scores = [(gained + left) / 2 for gained, left in zip(scores, kept, strict=True)]
    return max(zip(scores, (one.share for one in found), strict=True))[1]


def relative_values(values: Sequence[float], metric: str) -> list[float]:
    """Values of a metric relative to the best of them: 1 for the best one, less for the others."""
    best = values[0]
    for value in values:
        best = value if is_better(metric, value, best) else best
    if best == 0:
        return [float(value == 0) for value in values]
    smaller_is_better = is_better(metric, 0.0, 1.0)
    return [best / value if smaller_is_better else value / best for value in values]


# --- the weights -----------------------------------------------------------------------------------------------------


def weights_to_change(model: MiniClipModel) -> dict[str, Tensor]:
    """Copies of the weights and buffers that training may change, by the names of the plain model.

    Args:
        model: model before its first step, whose weights are whole in each process.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    plain = merged_weights(model.state_dict(), model)  # those below adapters have another name in `frozen`
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in plain.items()
        if tensor.is_floating_point() and name not in frozen
    }


def blend_weights(before: Mapping[str, Tensor], best: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """All weights of a model between two others.

    Args:
        before: weights that training may change, before it.
        best: all weights after it.
        share: share of `best`, in [0, 1]; at both ends, the weights are exactly those of one of the two.
    """
    return {
        name: torch.lerp(before[name], tensor, share) if name in before else tensor for name, tensor in best.items()
    }


def _load_blend(run: TrainingRun, best: Mapping[str, Tensor], share: float) -> None:
    is_main = run.accelerator.is_main_process
    load_plain_weights(run.unwrapped_model, blend_weights(run.before_training, best, share) if is_main else {})


@torch.no_grad()
def load_plain_weights(model: MiniClipModel, weights: Mapping[str, Tensor]) -> None:
    """Give the model of a run the weights of a plain one. Every process must call it.

    Adapters then change nothing. Each process gets its part of a weight that FSDP or ZeRO-3 has spread.

    Args:
        model: model of the run, without what wraps it.
        weights: all weights by the names of the plain model, on rank 0; empty elsewhere.
    """
    layers = adapted_layers(model)
    state = model.state_dict()  # with FSDP, this also spreads again what a forward pass has gathered
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in state:
        held = parameters.get(name, state[name])
        layer, is_adapter, _ = name.partition(".lora_")
        if not (is_adapter and layer in layers):
            _receive(held, weights[plain_name(name, layers)] if weights else None)
        elif f".lora_B.{ADAPTER}." in name:
            held.zero_()


def _receive(held: Tensor, value: Tensor | None) -> None:
    """Copy rank 0's value into a tensor that each process holds, whole or a part of it."""
    if process_count() == 1 and not isinstance(held, DTensor):
        assert value is not None, "rank 0 has all weights"
        held.copy_(value)
        return
    with changed_on_main(held):
        whole = torch.empty(held.shape, dtype=held.dtype, device=held.device)
        if value is not None:
            whole.copy_(value)
        dist.broadcast(whole, 0)
        if isinstance(held, DTensor):
            held.copy_(distribute_tensor(whole, held.device_mesh, held.placements))
        else:
            held.copy_(whole)
