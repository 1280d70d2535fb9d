"""Layers that compute what their quantized ones will, for training: rounded forward, straight through backward.

Gradients pass the rounding as if it were not there (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Scales and
ranges are trained with the weights by the gradients of LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153). What
is trained is the logarithm of their growth, as in TQT (Jain et al. 2020, https://arxiv.org/abs/1903.08066): Adam moves
every parameter by about the learning rate a step, which would be far for a small scale and nothing for a wide range.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models.compressed_model import spread
from compress.models.quantized import Ranges
from compress.quantize.weights.rounding import Rounded, largest_level, round_weight, round_with
from compress.quantize.weights.scheme import Scheme
from compress.runtime.fake import STEPS

RATE = 10.0
"""How much faster than a weight the logarithm of a scale or of a range moves."""


class LearnedLevels(nn.Module):
    """Rounds a weight to levels that are trained: by their scales, or by the entries of a palette.

    Args:
        weight: ``(out, ...)``, float32; its levels are searched for at the beginning.
        scheme: Any.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
    """

    start: Tensor
    zero: Tensor | None

    def __init__(self, weight: Tensor, scheme: Scheme, search: str) -> None:
        super().__init__()
        self.scheme = scheme
        found = round_weight(weight, scheme, search)
        self.register_buffer("start", found.scale if found.palette is None else found.palette)
        self.register_buffer("zero", found.zero)
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        trained, rounded = self._trained(), self.rounded(weight)
        if rounded.palette is not None:
            values = trained.expand(len(weight), -1).gather(1, rounded.codes.long()).view(weight.shape)
            return values + (weight - weight.detach())
        scale = self._spread(trained.masked_fill(trained == 0, 1), weight)
        most = largest_level(self.scheme)
        low: float | Tensor = -most
        high: float | Tensor = most
        if self.zero is not None:
            zero = self._spread(self.zero, weight)
            low, high = -zero, 2**self.scheme.bits - 1 - zero
        # What is clipped does not move, but its scale does.
        values = (weight / scale).clamp(low, high)  # type: ignore[arg-type]
        levels = rounded.weights(self.scheme).view(weight.shape) / scale
        return _straight(values, levels) * scale

    def rounded(self, weight: Tensor) -> Rounded:
        """Codes and levels of the weight."""
        trained = self._trained().detach()
        if self.scheme.format == "palette":
            return round_with(weight, self.scheme, palette=trained)
        return round_with(weight, self.scheme, trained, self.zero)

    def _trained(self) -> Tensor:
        """Scales, rounded to bfloat16 as they will be stored, or a palette in order; shaped as in :class:`Rounded`."""
        grown = self.start * (RATE * self.growth).exp()
        return grown.sort(1).values if self.scheme.format == "palette" else _straight(grown, grown.bfloat16().float())

    def _spread(self, shared: Tensor, weight: Tensor) -> Tensor:
        """What groups share, ``(rows or 1, groups)``, such that it broadcasts to the weight."""
        if self.scheme.granularity != "group":
            return shared.view(-1, *[1] * (weight.dim() - 1))
        return spread(shared, asdict(self.scheme), weight[0].numel()).view(weight.shape)


class LearnedRange(nn.Module):
    """Rounds an input to 256 levels of a range that is trained.

    Args:
        low: Lowest value at the beginning, at most 0.
        high: Highest, at least 0.
    """

    start: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor([low, high]))
        self.growth = nn.Parameter(torch.zeros(2))

    def ends(self) -> Tensor:
        """Lowest and highest value, ``(2,)``, float32; 0 is between them."""
        return self.start * (RATE * self.growth).exp()

    def forward(self, inputs: Tensor) -> Tensor:
        """The rounded input, float32."""
        return _RoundInput.apply(inputs.float(), self.ends())  # type: ignore[no-untyped-call, no-any-return]


class _RoundInput(torch.autograd.Function):
    """Rounds inputs to the levels between two ends ``(2,)``, as :class:`compress.runtime.fake.FakeQuantized` does."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, ends: Tensor) -> Tensor:
        low, high = ends.double()
        step = ((high - low) / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / step).round()
        ctx.save_for_backward(inputs, step.float(), zero.float())
        return torch.fake_quantize_per_tensor_affine(inputs, step.float(), zero.int(), 0, STEPS)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inputs, step, zero = ctx.saved_tensors
        values = inputs / step
        levels = values.round()
        below, above = levels < -zero, levels > STEPS - zero
        inside = gradient.masked_fill(below | above, 0)
        # Beyond the range the output is its end; within, a wider step moves the output by its rounding error.
        step_gradient = (inside * (levels - values)).sum() / STEPS
        ends = [(gradient * below).sum() - step_gradient, (gradient * above).sum() + step_gradient]
        return inside, torch.stack(ends)


class FakeLinear(nn.Linear):
    """A Linear with a rounded weight and perhaps a rounded input."""

    levels: LearnedLevels
    input_levels: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """As a Linear's."""
        return F.linear(self.input_levels(input), self.levels(self.weight), self.bias)


class FakeConv2d(nn.Conv2d):
    """A Conv2d with a rounded weight and perhaps a rounded input."""

    levels: LearnedLevels
    input_levels: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """As a Conv2d's."""
        return self._conv_forward(self.input_levels(input), self.levels(self.weight), self.bias)


FAKE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FakeLinear, nn.Conv2d: FakeConv2d}


@contextmanager
def fake_quantized(
    model: nn.Module, schemes: Mapping[str, Scheme], ranges: Ranges, search: str = "mse"
) -> Iterator[None]:
    """Makes layers compute with rounded weights and inputs, in float32, inside the block.

    The layers' parameters stay under their names. Scales and ranges are new parameters beside them.

    Args:
        model: With float weights.
        schemes: Name of a Conv2d or Linear to its scheme.
        ranges: Of the inputs that are rounded, by name of the layer.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
    """
    layers = {name: model.get_submodule(name) for name in schemes}
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    classes = {name: type(layer) for name, layer in layers.items()}
    model.float()
    for name, layer in layers.items():
        weight, scheme = layer.weight.detach(), schemes[name]  # type: ignore[union-attr, operator]
        layer.__class__ = FAKE[type(layer)]
        layer.levels = LearnedLevels(weight, scheme, search)
        layer.input_levels = LearnedRange(*ranges[name]).to(weight.device) if name in ranges else nn.Identity()
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.levels, layer.input_levels
            layer.__class__ = classes[name]
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


def rounded_layers(model: nn.Module) -> tuple[dict[str, Rounded], Ranges]:
    """The rounded weights of the layers inside of :func:`fake_quantized`, and the ranges of their inputs."""
    rounded, ranges = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, (FakeLinear, FakeConv2d)):
            rounded[name] = layer.levels.rounded(layer.weight.detach())
            if isinstance(layer.input_levels, LearnedRange):
                low, high = layer.input_levels.ends().tolist()
                ranges[name] = (low, high)
    return rounded, ranges


def _straight(value: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value, with the gradient of the value itself."""
    return value + (rounded - value).detach()
