"""Layers that compute what their quantized ones will, for training: rounded forward, straight through backward.

Gradients pass the rounding as if it were not there (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), and scales and
ranges are trained with the weights by the gradients of LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153). What is
trained is the logarithm of their growth, as in TQT (Jain et al. 2020, https://arxiv.org/abs/1903.08066): Adam moves every
parameter by about the learning rate a step, which would be far for a small scale and nothing for a wide range.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

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


class LearnedScale(nn.Module):
    """Rounds a weight to symmetric integers, with scales that are trained.

    Args:
        weight: ``(out, ...)``, float32; its scales are searched for at the beginning.
        scheme: Symmetric integers.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
    """

    start: Tensor

    def __init__(self, weight: Tensor, scheme: Scheme, search: str) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("start", round_weight(weight, scheme, search).scale)
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> Tensor:
        """``(rows or 1, groups)``, float32, rounded to bfloat16 as it will be stored."""
        scale = self.start * (RATE * self.growth).exp()
        return _straight(scale, scale.bfloat16().float())

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        scale = spread(self.scale(), asdict(self.scheme), weight[0].numel())
        scale = scale.reshape(-1, *(weight.shape[1:] if scale.shape[1] > 1 else [1] * (weight.dim() - 1)))
        most = largest_level(self.scheme)
        values = (weight / scale.masked_fill(scale == 0, 1)).clamp(-most, most)
        return _straight(values, values.round()) * scale

    def rounded(self, weight: Tensor) -> Rounded:
        """Codes and scales of the weight."""
        return round_with(weight, self.scheme, self.scale().detach())


class TrackedScale(nn.Module):
    """Rounds a weight to any levels, which are searched for anew as the weight moves.

    Args:
        weight: ``(out, ...)``, float32.
        scheme: Any.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
        every: Passes in training between two searches, at least 1.
    """

    passes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    palette: Tensor | None

    def __init__(self, weight: Tensor, scheme: Scheme, search: str, every: int) -> None:
        super().__init__()
        self.scheme, self.search, self.every = scheme, search, every
        found = round_weight(weight, scheme, search)
        for name in ("scale", "zero", "palette"):
            self.register_buffer(name, getattr(found, name))
        # In a buffer, so that a training that is continued searches at the same steps.
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            if self.passes % self.every == 0:
                self.rounded(weight)
        found = round_with(weight, self.scheme, self.scale, self.zero, self.palette)
        return _straight(weight, found.weights(self.scheme).view(weight.shape))

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Rounded:
        """Codes and levels of the weight, searched for anew and kept."""
        found = round_weight(weight, self.scheme, self.search)
        for name, buffer in self.named_buffers():
            if name != "passes":
                buffer.copy_(getattr(found, name))
        return found


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
    """Rounds ``(...)`` to the levels between two ends ``(2,)``, as :class:`compress.runtime.fake.FakeQuantized` does."""

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

    levels: "Levels"
    input_levels: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """As a Linear's."""
        return F.linear(self.input_levels(input), self.levels(self.weight), self.bias)


class FakeConv2d(nn.Conv2d):
    """A Conv2d with a rounded weight and perhaps a rounded input."""

    levels: "Levels"
    input_levels: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """As a Conv2d's."""
        return self._conv_forward(self.input_levels(input), self.levels(self.weight), self.bias)


Levels: TypeAlias = LearnedScale | TrackedScale
FAKE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FakeLinear, nn.Conv2d: FakeConv2d}


@contextmanager
def fake_quantized(
    model: nn.Module, schemes: Mapping[str, Scheme], ranges: Ranges, search: str = "mse", every: int | None = None
) -> Iterator[None]:
    """Makes layers compute with rounded weights and inputs, in float32, inside the block.

    The layers' parameters stay under their names. Scales and ranges are new parameters beside them.

    Args:
        model: With float weights.
        schemes: Name of a Conv2d or Linear to its scheme.
        ranges: Of the inputs that are rounded, by name of the layer.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
        every: Passes in training between two searches for scales; None: scales are searched for once and then trained.
    """
    layers = {name: model.get_submodule(name) for name in schemes}
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    classes = {name: type(layer) for name, layer in layers.items()}
    model.float()
    for name, layer in layers.items():
        weight, scheme = layer.weight.detach(), schemes[name]  # type: ignore[union-attr, operator]
        layer.__class__ = FAKE[type(layer)]
        learned = every is None
        layer.levels = LearnedScale(weight, scheme, search) if learned else TrackedScale(weight, scheme, search, every)
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
