"""Levels, scales and packing of every scheme, on ordinary and on odd weights."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.compressed_model import levels, pack, pack_layer, unpack
from compress.quantize.packed import packing
from compress.quantize.weights.rounding import SEARCHES, round_weight
from compress.quantize.weights.scheme import Scheme

SCHEMES = [
    *(Scheme(bits=bits) for bits in (2, 3, 4, 6, 8)),
    *(Scheme(bits=bits, granularity="group", group_size=32, symmetric=False) for bits in (2, 3, 4, 5, 7, 8)),
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=4, granularity="group", group_size=48),  # the last group of a row is smaller
    Scheme(format="fp8", bits=8),
    Scheme(format="nf4", bits=4, granularity="group"),
    Scheme(format="fp4", bits=4, granularity="group"),
    *(Scheme(format="palette", bits=bits, granularity="tensor") for bits in (1, 2, 4, 6, 8)),
    Scheme(format="palette", bits=3, granularity="channel"),
]


def weights() -> Tensor:
    return torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(0))


def decoded(weight: Tensor, scheme: Scheme, search: str = "mse") -> Tensor:
    return round_weight(weight, scheme, search).weights(scheme).view(weight.shape)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_without_gaps(bits: int) -> None:
    for count in (1, 7, 64, 1001):
        codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        data = pack(codes, bits)
        assert torch.equal(unpack(data, bits, count), codes)
        assert len(data) * 8 - count * bits < 8 * bin(bits).count("1")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_packed_layer_holds_what_was_rounded(scheme: Scheme) -> None:
    layer = nn.Conv2d(20, 24, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias
    rounded = round_weight(weight, scheme)
    pack_layer(layer, packing(scheme), rounded.tensors(scheme.bits))
    expected = rounded.weights(scheme).view(weight.shape)
    assert torch.equal(layer.weight, expected)
    inputs = torch.randn(2, 20, 8, 8)
    assert torch.equal(layer(inputs), nn.functional.conv2d(inputs, expected, bias))
    assert layer(inputs.bfloat16().float()).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_nearest_level_is_taken(scheme: Scheme) -> None:
    weight = weights()
    rounded = round_weight(weight, scheme)
    rows = weight.flatten(1)
    if rounded.palette is not None:
        choices = rounded.palette.expand(24, -1)[:, None].expand(-1, rows.shape[1], -1)
    else:
        size = {"tensor": 10**6, "channel": 10**6, "group": scheme.group_size}[scheme.granularity]
        assert rounded.scale is not None
        shared = {"scale": rounded.scale, "zero": rounded.zero if rounded.zero is not None else rounded.scale * 0}
        wide = {
            key: t.expand(24, -1).repeat_interleave(size if t.shape[1] > 1 else 180, 1) for key, t in shared.items()
        }
        table = levels(asdict(scheme))
        table = table[table.isfinite()]
        if scheme.format == "int" and scheme.symmetric:
            table = table[1:]
        choices = (table - wide["zero"][:, :180, None]) * wide["scale"][:, :180, None]
    nearest = (choices - rows[..., None]).abs().amin(2)
    error = (rounded.weights(scheme) - rows).abs()
    assert (error - nearest).max() <= 1e-6 + 2e-3 * rows.abs().max() * (scheme.format == "fp8")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", SEARCHES)
def test_odd_weights_stay_finite(scheme: Scheme, search: str) -> None:
    odd = {
        "zeros": torch.zeros(4, 96),
        "constant": torch.full((4, 96), 0.37),
        "huge": weights().view(-1)[:384].view(4, 96) * 1e30,
        "denormal": weights().view(-1)[:384].view(4, 96) * 1e-40,
        "outlier": torch.cat([weights().view(-1)[:380], torch.tensor([90.0] * 4)]).view(4, 96),
    }
    for name, weight in odd.items():
        found = decoded(weight, scheme, search)
        assert found.isfinite().all(), name
        assert found.abs().max() <= 1.02 * weight.abs().max() + 1e-37, name
    assert torch.equal(decoded(odd["zeros"], scheme, search), odd["zeros"])
    if scheme.format != "fp8" or search == "absmax":
        assert torch.allclose(decoded(odd["constant"], scheme, "absmax"), odd["constant"], rtol=5e-3)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.format != "palette"], ids=str)
def test_a_search_for_the_least_error_finds_no_more_than_the_full_range_leaves(scheme: Scheme) -> None:
    weight = weights()
    error = {search: (decoded(weight, scheme, search) - weight).square().mean() for search in SEARCHES}
    assert error["mse"] <= error["absmax"] * (1 + 1e-6)
    assert error["hqq"] <= error["mse"] * (1 + 1e-6)
    if scheme.bits <= 3 and scheme.granularity != "group":
        assert error["mse"] < 0.8 * error["absmax"]


def test_more_bits_leave_less_error() -> None:
    weight = weights()
    for keys in ({}, {"granularity": "group", "symmetric": False}, {"format": "palette", "granularity": "tensor"}):
        made: Any = keys
        errors = [(decoded(weight, Scheme(bits=bits, **made)) - weight).square().mean() for bits in (2, 3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


def test_a_palette_finds_the_values_that_there_are() -> None:
    values = torch.tensor([-3.0, -0.5, 0.25, 7.0])
    weight = values[torch.randint(4, (8, 40), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(decoded(weight, Scheme(format="palette", bits=2, granularity="tensor")), weight)


def test_fp8_is_torchs() -> None:
    weight = weights()
    scale = (weight.flatten(1).abs().amax(1) / 448).bfloat16().float().view(-1, 1, 1, 1)
    expected = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(decoded(weight, Scheme(format="fp8", bits=8), "absmax"), expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"format": "int5"},
        {"bits": 1},
        {"bits": 9},
        {"format": "nf4", "bits": 8},
        {"granularity": "row"},
        {"group_size": 1},
        {"activations": "int8"},
        {"format": "fp8", "symmetric": False},
    ],
)
def test_a_scheme_checks_its_values(keys: dict[str, Any]) -> None:
    key = "symmetric" if "symmetric" in keys else "bits" if "bits" in keys else next(iter(keys))
    with pytest.raises(UserError, match=f"^{key}="):
        Scheme(**keys)
