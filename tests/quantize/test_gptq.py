"""Rounding with error feedback: what it buys, and on what odd layers and inputs it has to hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from compress.errors import UserError
from compress.quantize.weights import gptq
from compress.quantize.weights.gptq import input_products, round_with_feedback
from compress.quantize.weights.rounding import round_weight
from compress.quantize.weights.scheme import Scheme
from tests.tiny import tiny_pipeline

SCHEMES = [
    *(Scheme(bits=bits, granularity="group", group_size=32, symmetric=False) for bits in (2, 3, 4, 8)),
    Scheme(bits=3),
    Scheme(bits=4, granularity="tensor"),
    Scheme(format="nf4", bits=4, granularity="group", group_size=48),
    Scheme(format="fp4", bits=4, granularity="group"),
    Scheme(format="fp8", bits=8),
    Scheme(format="palette", bits=2, granularity="tensor"),
    Scheme(format="palette", bits=3, granularity="channel"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(*shape: int) -> Tensor:
    """Normal values whose neighbors in the last dimension are alike."""
    mixing = 0.9 ** (torch.arange(shape[-1])[:, None] - torch.arange(shape[-1])).abs()
    return torch.randn(*shape, generator=generator()) @ mixing


def images(channels: int) -> Tensor:
    return correlated(6, 12, 12, channels).permute(0, 3, 1, 2)


LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(160, 24), correlated(4, 400, 160)),
    "conv": (lambda: nn.Conv2d(20, 24, 3, padding=1), images(20)),
    "strided conv": (lambda: nn.Conv2d(20, 24, (3, 2), (2, 1), (1, 0), (2, 1), padding_mode="circular"), images(20)),
}


def learned(layer: Any, inputs: Tensor, scheme: Scheme) -> Tensor:
    with input_products({"layer": layer}) as products:
        layer(inputs)
    rounded = round_with_feedback(layer.weight, products["layer"], scheme)
    assert rounded.codes.dtype == torch.uint8 and int(rounded.codes.max()) < 2**scheme.bits
    return rounded.weights(scheme).view(layer.weight.shape)


def output(layer: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    return F.linear(inputs, weight) if isinstance(layer, nn.Linear) else layer._conv_forward(inputs, weight, None)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_outputs_of_correlated_inputs_change_less_than_by_nearest_levels(name: str, scheme: Scheme) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer = make()
    exact = output(layer, layer.weight, inputs)
    found = learned(layer, inputs, scheme)
    nearest = round_weight(layer.weight, scheme).weights(scheme).view(layer.weight.shape)
    error, plain = ((output(layer, weight, inputs) - exact).square().mean() for weight in (found, nearest))
    assert error < 0.7 * plain
    assert torch.equal(found, learned(layer, inputs, scheme))
    assert torch.equal(layer.weight, make_again(make).weight), "the layer stays as it was"


def make_again(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


@torch.no_grad()
def test_products_are_those_of_the_unfolded_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = nn.Conv2d(20, 4, 3, padding=1), images(20)
    rows = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
    monkeypatch.setattr(gptq, "ROWS", 10_000)
    with input_products({"layer": layer, "unused": nn.Linear(2, 2)}) as products:
        layer(inputs[:2])
        layer(inputs[2:])
    assert products.keys() == {"layer"} and len(products["layer"]) == 1
    assert torch.allclose(products["layer"][0], rows.T @ rows, rtol=1e-4, atol=1e-2)
    monkeypatch.setattr(gptq, "COLUMNS", 100)
    with input_products({"layer": layer}) as products:
        layer(inputs)
    assert [len(block) for block in products["layer"]] == [100, 80]
    assert torch.allclose(products["layer"][1], rows[:, 100:].T @ rows[:, 100:], rtol=1e-4, atol=1e-2)
    layer(inputs * float("nan"))  # the hooks are gone
    scheme = SCHEMES[1]
    exact = layer(inputs) - layer.bias[:, None, None]
    weights = [rounded.weights(scheme).view_as(layer.weight) for rounded in (
        round_with_feedback(layer.weight, products["layer"], scheme), round_weight(layer.weight, scheme))]  # fmt: skip
    error, plain = ((output(layer, weight, inputs) - exact).square().mean() for weight in weights)
    assert error < 0.7 * plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_dead_columns_and_zero_inputs_get_the_nearest_levels(scheme: Scheme) -> None:
    layer, inputs = nn.Linear(96, 8), correlated(50, 96)
    inputs[:, 10:40] = 0
    nearest = round_weight(layer.weight, scheme).weights(scheme)
    assert torch.equal(learned(layer, inputs, scheme)[:, 10:40], nearest[:, 10:40])
    assert torch.equal(learned(layer, inputs * 0, scheme), nearest)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_odd_weights_stay_finite(scheme: Scheme) -> None:
    for factor in (0, 1e-30, 1e25):
        layer = nn.Linear(96, 8)
        layer.weight *= factor
        found = learned(layer, correlated(50, 96), scheme)
        assert found.isfinite().all() and (found.abs().max() <= 1.1 * layer.weight.abs().max())


@torch.no_grad()
def test_inputs_that_are_not_finite_are_refused_and_grouped_convolutions_left_out() -> None:
    layer, grouped = nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2)
    with input_products({"grouped": grouped}) as products:
        grouped(images(4))
    assert not products
    with pytest.raises(UserError, match="the input of layer is NaN"), input_products({"layer": layer}):
        layer(torch.full((2, 4), float("inf")))


def test_the_stage_rounds_every_layer_so_and_reports_it(tiny_parquet: Path) -> None:
    keys: dict[str, Any] = {"data": tiny_parquet, "calibration": {"examples": 2, "steps": 2}, "layers": {}, "bits": 3}
    first, report = compress.quantize(tiny_pipeline(), "int4", rounding="gptq", **keys)
    second, _ = compress.quantize(tiny_pipeline(), "int4", rounding="gptq", **keys)
    nearest, plain = compress.quantize(tiny_pipeline(), "int4", **keys)
    assert report.details["gptq"] == report.coverage["modules"] and report.details["nearest"] == []
    assert plain.details["gptq"] == 0
    tensors, again, other = (pipeline.unet.state_dict() for pipeline in (first, second, nearest))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    codes = [name for name in tensors if name.endswith(".codes")]
    assert sum(not torch.equal(tensors[name], other[name]) for name in codes) > 0.9 * len(codes)
    assert all(torch.equal(tensors[name], other[name]) for name in tensors if not name.endswith(".codes"))
