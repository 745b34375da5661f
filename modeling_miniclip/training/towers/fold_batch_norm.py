"""Fold batch norms into the convolutions before them, for a tower that is run but not trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Exactly these classes: a subclass may normalise its weights first. Each norm maps to what is left of it when folded.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.BatchNorm2d: lambda norm, hidden: hidden,
    BatchNormAct2d: lambda norm, hidden: norm.act(norm.drop(hidden)),
}
TOLERANCE = 1e-4  # of the largest component: float32 gives about 1e-6, a wrong fold about 1


@contextmanager
@torch.no_grad()
def folded_batch_norms(tower: nn.Module, pixel_shape: tuple[int, int]) -> Iterator[int]:
    """Within the block, batch norms are part of the convolutions before them, which saves passes over memory.

    In evaluation mode a batch norm multiplies and shifts each channel by constants, which the convolution's weights
    can do as well (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2). The pairs are found by running the tower on one image of noise.
    If the folded tower's output differs by more than float32's rounding, nothing is folded: this happens with 16-bit
    weights, and may happen on GPUs that round convolutions to TF32. Do not train, save or use the tower in another
    thread within the block; afterwards it has its own weights again.

    Args:
        tower: image tower in evaluation mode, called with `[B, 3, H, W]`, whose output has a `pooler_output`.
        pixel_shape: `(H, W)` of the images in pixels.

    Yields:
        Number of folded batch norms; 0 for a tower without any.
    """
    if not any(type(module) in NORMS for module in tower.modules()):
        yield 0
        return
    some = next(tower.parameters())
    noise = torch.randn(1, 3, *pixel_shape, generator=torch.Generator().manual_seed(0)).to(some)
    pairs, plain = _pairs_of(tower, noise)
    weights = [(conv, conv.weight, conv.bias) for conv, _ in pairs]
    try:
        for conv, norm in pairs:
            _fold(conv, norm)
        folded = tower(noise).pooler_output
        if not torch.allclose(folded, plain, rtol=0, atol=TOLERANCE * float(plain.abs().max())):
            _unfold(pairs, weights)
            pairs = []
        yield len(pairs)
    finally:
        _unfold(pairs, weights)


def _pairs_of(tower: nn.Module, pixel_values: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.Module]], Tensor]:
    """Convolutions with the batch norm that gets their output, each run once; and the tower's pooled feature."""
    outputs: list[tuple[nn.Conv2d, Tensor]] = []  # kept alive, as tensors are compared by identity
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []
    runs: dict[nn.Module, int] = {}

    def after(conv: Any, _: Any, output: Tensor) -> None:
        outputs.append((conv, output))
        runs[conv] = runs.get(conv, 0) + 1

    def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, norm) for conv, output in outputs if output is inputs[0])
        runs[norm] = runs.get(norm, 0) + 1

    hooks = []
    for module in tower.modules():
        if "forward" in module.__dict__:  # set by accelerate, to fetch offloaded weights
            continue
        if type(module) in CONVOLUTIONS:
            hooks.append(module.register_forward_hook(after))
        elif type(module) in NORMS and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(before))
    try:
        plain = tower(pixel_values).pooler_output
    finally:
        for hook in hooks:
            hook.remove()
    return [(conv, norm) for conv, norm in pairs if runs[conv] == runs[norm] == 1], plain


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    norm.forward = partial(NORMS[type(norm)], norm)


def _unfold(pairs: list[tuple[nn.Conv2d, nn.Module]], weights: list[tuple[nn.Conv2d, Any, Any]]) -> None:
    for conv, weight, bias in weights:
        conv.weight, conv.bias = weight, bias
    for _, norm in pairs:
        norm.__dict__.pop("forward", None)
