"""What a denoiser's prediction loses when layers have fewer bits."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.data.calls import Call
from compress.quantize.weights.rounding import Rounded
from compress.quantize.weights.scheme import Scheme

MOST = 200.0
"""Largest PSNR in dB, also for equal predictions."""


class Predictions:
    """What a float denoiser predicted while images were sampled.

    Args:
        model: The denoiser; its weights are changed for a moment by :meth:`error`.
        calls: Recorded calls of it.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        """Keeps both."""
        self.model, self.calls = model, calls
        outputs = [call.output.float() for call in calls]
        self.range = float(max(output.max() for output in outputs) - min(output.min() for output in outputs))

    @torch.no_grad()
    def error(self, weights: Mapping[str, tuple[Rounded, Scheme]]) -> float:
        """Mean squared error of the prediction with rounded weights in some layers, by their names."""
        with _replaced(self.model, weights):
            found = [self.model(**call.inputs)[0].float() - call.output.float() for call in self.calls]
        return sum(float(part.double().square().sum()) for part in found) / sum(part.numel() for part in found)

    def psnr(self, error: float) -> float:
        """In dB, at most :data:`MOST`; the peak is the range of the float denoiser's predictions."""
        return min(10 * math.log10(self.range**2 / error), MOST) if error else MOST


def bytes_of(rounded: Rounded, bits: int) -> int:
    """Bytes on disk of a rounded weight, with its scales."""
    return sum(tensor.numel() * tensor.element_size() for tensor in rounded.tensors(bits).values())


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, tuple[Rounded, Scheme]]) -> Iterator[None]:
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in weights}
    before = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, (rounded, scheme) in weights.items():
            layers[name].weight.data = rounded.weights(scheme).view_as(before[name]).to(before[name].dtype)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = before[name]
