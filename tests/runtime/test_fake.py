"""Fake-quantized layers compute what integer arithmetic computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.quantize.int8 import quantize_weights
from compress.runtime.fake import FakeQuantized, activation_step, float_model


def integers(layer: nn.Linear, inputs: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The layer in integers: products and sums of int64, scaled once at the end."""
    scale = layer.weight.abs().amax(1) / 127
    weights = (layer.weight / scale[:, None]).round().long()
    step, zero = activation_step(low, high)
    levels = ((inputs / step).round() + zero).clamp(0, 255).long()
    sums = (levels - zero) @ weights.T
    return sums.double() * step * scale.double() + layer.bias.double()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 1000), low=st.floats(-8, 0), high=st.floats(0.1, 8))
def test_a_linear_layer_equals_integer_arithmetic(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(9, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 9, generator=generator))
    inputs = 3 * torch.randn(4, 9, generator=generator)
    scale = layer.weight.detach().abs().amax(1) / 127
    fake = FakeQuantized(layer, layer.weight.detach(), scale, low, high)
    expected = integers(layer, inputs, low, high)
    assert torch.allclose(fake(inputs).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-1e-40, 1e-40), (-3e38, 3e38), (0.0, 5.0), (-5.0, 0.0)])
def test_zero_stays_zero_and_values_stay_in_range(low: float, high: float) -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    fake = FakeQuantized(layer, torch.ones(1, 1, 1, 1), torch.tensor([1 / 127]), low, high)
    inputs = torch.tensor([0.0, low, high]).reshape(3, 1, 1, 1)
    found = fake(inputs).flatten()
    assert found.isfinite().all() and found[0] == 0
    step = activation_step(low, high)[0]
    assert low - step <= found.min() and found.max() <= high + step


class Small(nn.Sequential):
    """Two layers that save as a model of diffusers would."""

    def register_to_config(self, **_: object) -> None: ...


def test_only_layers_with_a_range_get_int8_inputs() -> None:
    model = Small(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    assert float_model(model, {}) is model
    quantize_weights(model)
    fake = float_model(model, {"2": (-1.0, 4.0)})
    assert isinstance(fake[2], FakeQuantized) and type(fake[0]) is nn.Linear
    inputs, hidden = torch.randn(4, 8), torch.linspace(-2, 5, 32).reshape(4, 8)
    with torch.no_grad():
        assert torch.allclose(fake[0](inputs), model[0](inputs), atol=1e-5)
        assert torch.equal(fake[2](hidden), fake[2](hidden.clamp(-1, 4)))
        assert not torch.equal(model[2](hidden), model[2](hidden.clamp(-1, 4)))
