"""Fake-quantized layers compute what integer arithmetic computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.models.quantized import DYNAMIC
from compress.quantize.int8 import quantize_weights
from compress.runtime.fake import FakeQuantized, activation_step, float_model
from compress.runtime.inductor import InductorModule, round_linears
from compress.runtime.openvino import OpenVINOModule


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


@pytest.fixture
def dynamic() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model with int8 weights, inputs of it, and what it computed in float."""
    torch.manual_seed(0)
    model = Small(nn.Linear(32, 48)).requires_grad_(False)
    inputs = torch.randn(2, 20, 32)
    inputs[0, 3], inputs[1, 5] = 0, 1000 * inputs[1, 5]
    expected = model(inputs)
    quantize_weights(model)
    return model, inputs, expected


def test_a_row_of_dynamic_inputs_does_not_depend_on_the_others(dynamic: tuple[nn.Module, ...]) -> None:
    model, inputs, expected = dynamic
    fake = float_model(model, {"0": DYNAMIC})
    assert torch.allclose(fake(inputs)[:1], fake(inputs[:1]), rtol=1e-5, atol=1e-5)
    assert 0 < ((fake(inputs) - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.03
    conv = FakeQuantized(nn.Conv2d(4, 4, 3), torch.randn(4, 4, 3, 3), None, *DYNAMIC)
    images = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    assert torch.allclose(conv(images)[:1], conv(images[:1]), rtol=1e-4, atol=1e-4)


def test_dynamic_inputs_in_inductor_are_integers(
    dynamic: tuple[nn.Module, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, _ = dynamic
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    module = InductorModule(model, "unet", torch.float32, {"0": DYNAMIC})
    found = module(inputs)
    assert type(module._compiled[0]) is nn.Linear and module._compiled[0].weight.qdata.dtype == torch.int8
    assert torch.allclose(found, float_model(model, {"0": DYNAMIC})(inputs), rtol=1e-5, atol=1e-5)


def test_dynamic_inputs_in_openvino(dynamic: tuple[nn.Module, ...]) -> None:
    model, inputs, _ = dynamic
    found = OpenVINOModule(model, "unet", "f32", {"0": DYNAMIC})(inputs)
    expected = float_model(model, {"0": DYNAMIC})(inputs)
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.max() < 0.01 and off.median() < 1e-5, "the largest value of a token may take another level"


def test_float_linears_in_int8() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"ff": nn.Linear(64, 32), "time_embed": nn.Linear(64, 32), "odd": nn.Linear(64, 7)})
    inputs = torch.randn(3, 64)
    expected = model["ff"](inputs)
    assert round_linears(model, {}, "int8") == ["ff"]
    assert 0 < (model["ff"](inputs) - expected).norm() / expected.norm() < 0.02
