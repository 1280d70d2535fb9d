"""What every method that quantizes weights holds to, whichever library it calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.evaluate.cost import count, memory_bytes, weight_bytes
from compress.models.inputs import predict, small_inputs
from compress.models.quantized import float_weight, quantized_layers
from compress.quantize.weights.apply import QuantizeReport
from compress.runtime.fake import float_model
from tests.tiny import tiny_unet

Quantize = Callable[..., QuantizeReport]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of Conv2d and Linear modules by name, as they are."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def refuses_what_it_cannot_do(quantize: Quantize, layer: str = "time_embedding.linear_1") -> None:
    """One message each, and the model stays as it was; ``layer`` is one that the method quantizes."""
    unet: Any = tiny_unet()
    before = weights_of(unet)
    for skip, words in ((["nothing.*"], "skip=nothing"), (["*"], "leave a Conv2d or Linear")):
        with pytest.raises(UserError, match=words):
            quantize(unet, skip=skip)
    weight = unet.get_submodule(layer).weight
    value = weight[0, 0].clone()
    weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=layer):
        quantize(unet)
    weight[0, 0] = value
    assert all(torch.equal(now, before[name]) for name, now in weights_of(unet).items())
    assert not quantized_layers(unet)
    quantize(unet)
    with pytest.raises(UserError, match="quantized already"):
        quantize(unet)


def rounds_within(quantize: Quantize, step: float) -> QuantizeReport:
    """No weight moves by more than ``step`` of the largest of its channel; what is skipped does not move at all."""
    unet: Any = tiny_unet()
    before = weights_of(unet)
    report = quantize(unet, skip=["conv_in", "*.to_k"])
    layers = quantized_layers(unet)
    assert layers.keys() == set(report.modules)
    for name, weight in before.items():
        now = float_weight(unet.get_submodule(name))
        if name in report.skipped:
            assert torch.equal(now, weight), name
            continue
        largest = weight.abs().flatten(1).amax(1)
        error = (now - weight).abs().flatten(1).amax(1)
        assert (error <= step * largest * (1 + 1e-3)).all(), name
        assert report.rounding[name] == pytest.approx((error / largest).max().item(), rel=1e-4)
    assert 0 < max(report.rounding.values()) <= step * (1 + 1e-3)
    assert report.skipped["conv_in"] == "asked for by skip: conv_in"
    return report


def counts_as_before(quantize: Quantize) -> None:
    """Parameters and MACs are those of the float model; memory is less."""
    unet, exact = tiny_unet(), tiny_unet()
    report = quantize(unet)
    inputs = small_inputs(exact)
    assert inputs is not None
    ours, theirs = count(unet, inputs), count(exact, inputs)
    assert ours == theirs
    shares = sum(exact.get_submodule(name).weight.numel() for name in report.modules) / theirs.params  # type: ignore
    assert report.params == pytest.approx(shares)
    assert memory_bytes(unet) < memory_bytes(exact) * (1 - 0.7 * report.params)


def computes_in_float(quantize: Quantize) -> None:
    """Engines get plain layers with the decoded weights."""
    unet: Any = tiny_unet()
    quantize(unet)
    inputs = small_inputs(unet)
    assert inputs is not None
    made = float_model(unet, {})
    assert not quantized_layers(made) and {type(m) for m in made.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert all(p.dtype == torch.float32 for p in made.parameters())
    ours, theirs = predict(made, inputs), predict(unet, inputs)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def shrinks_the_file(folder: Path, large: Path, most: float) -> None:
    """The denoiser's files take at most this share of those of another folder."""
    assert weight_bytes(folder / "unet")[0] <= most * weight_bytes(large / "unet")[0]
