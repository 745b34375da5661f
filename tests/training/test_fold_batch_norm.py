"""Folded batch norms: the same features with fewer operations, and the tower's own weights afterwards."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from modeling_miniclip.training.towers.fold_batch_norm import folded_batch_norms

SHAPE = (64, 48)


class Tower(nn.Module):
    """A timm model called as `MiniClipModel` calls its tower."""

    def __init__(self, name: str):
        super().__init__()
        self.timm_model = timm.create_model(name, num_classes=0).eval()

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.timm_model(pixel_values))


def with_statistics(tower: nn.Module) -> nn.Module:
    """Batch norms that multiply and shift by something, as trained ones do."""
    generator = torch.Generator().manual_seed(1)
    for norm in tower.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 2.0),
                (norm.weight.data, 0.5, 1.5),
                (norm.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return tower.eval()


def count_batch_norms(tower: nn.Module, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, int]:
    """The pooled features, and how many batch norms were computed for them."""
    calls: list[int] = []
    plain = functional.batch_norm
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(functional, "batch_norm", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
        return tower(pixels).pooler_output, len(calls)


@pytest.mark.parametrize(
    "name, before, left",
    [
        ("resnet18", 20, 0),  # batch norm and activation apart, two convolutions into one sum
        ("tf_efficientnet_lite0", 49, 0),  # in one module; padded as TensorFlow does
        ("mobilenetv3_small_050", 34, 0),  # gates on channels
        ("resnetv2_18", 17, 9),  # the first norm of a block takes a sum
        ("densenet121", 121, 62),  # that of a layer takes several layers' maps
    ],
)
def test_the_features_are_the_same_without_a_batch_norm(
    name: str, before: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tower, pixels = with_statistics(Tower(name)), torch.randn(3, 3, *SHAPE)
    weights = {key: value.clone() for key, value in tower.state_dict().items()}
    objects = dict(tower.named_parameters())
    plain, number = count_batch_norms(tower, pixels, monkeypatch)
    assert number == before
    with folded_batch_norms(tower, SHAPE) as count:
        folded, number = count_batch_norms(tower, pixels, monkeypatch)
        assert (count, number) == (before - left, left)
    assert not torch.equal(folded, plain)  # it was computed otherwise
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    after, number = count_batch_norms(tower, pixels, monkeypatch)
    assert torch.equal(after, plain) and number == before
    assert dict(tower.named_parameters()) == objects
    assert list(tower.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in tower.state_dict().items())


class Handmade(Tower):
    """A convolution and a batch norm, and what comes out of them as `pooled` says."""

    def __init__(self, conv: nn.Module, pooled: str):
        nn.Module.__init__(self)
        self.conv, self.norm, self.pooled = conv, nn.BatchNorm2d(4), pooled

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        maps = self.conv(pixel_values)
        if self.pooled == "past activation":
            maps = functional.relu(maps, inplace=True)
        normed = self.norm(maps)
        if self.pooled == "with conv":  # what the convolution gives is used twice
            normed = normed + maps
        if self.pooled == "norm twice":
            normed = self.norm(normed)
        return SimpleNamespace(pooler_output=normed.mean((2, 3)))


@pytest.mark.parametrize("pooled", ["with conv", "past activation", "norm twice"])
def test_inexact_folds_are_left_out(pooled: str) -> None:
    torch.manual_seed(0)
    tower, pixels = with_statistics(Handmade(nn.Conv2d(3, 4, 3), pooled)), torch.randn(3, 3, *SHAPE)
    with torch.no_grad():
        plain = tower(pixels).pooler_output
        with folded_batch_norms(tower, SHAPE) as count:
            assert count == 0
            assert torch.equal(tower(pixels).pooler_output, plain)


def test_convolution_with_changing_weights_keeps_its_norm() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, hidden: Tensor) -> Tensor:
            return self._conv_forward(hidden, 2 * self.weight, self.bias)

    with folded_batch_norms(with_statistics(Handmade(Doubled(3, 4, 3), "")), SHAPE) as count:
        assert count == 0
    with folded_batch_norms(with_statistics(Handmade(nn.Conv2d(3, 4, 3), "")), SHAPE) as count:
        assert count == 1


def test_a_tower_without_batch_norms_is_not_even_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower("test_vit")
    monkeypatch.setattr(tower, "forward", lambda _: pytest.fail("it was run"))
    with folded_batch_norms(tower, SHAPE) as count:
        assert count == 0


def test_random_numbers_and_interrupted_towers_are_restored() -> None:
    tower = with_statistics(Tower("resnet18"))
    pixels = torch.randn(1, 3, *SHAPE)
    with torch.no_grad():
        plain, state = tower(pixels).pooler_output, torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt), folded_batch_norms(tower, SHAPE) as count:
            assert count == 20
            raise KeyboardInterrupt
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(tower(pixels).pooler_output, plain)
    assert all(parameter.requires_grad for parameter in tower.parameters())
