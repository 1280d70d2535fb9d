"""Fake-quantized layers: float layers that compute what int8 arithmetic computes.

The weight and, where its range is known, the input are rounded to their int8 levels and kept in float (Jacob et al.
2018, https://arxiv.org/abs/1712.05877). An engine that understands the two operations replaces them by int8 kernels.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models.quantized import DYNAMIC, channel_scales, float_weight, quantized_layers, replace_layer

LEVELS = 127  # of a weight, on either side of 0
STEPS = 255  # of an activation, from the lowest to the highest


class FakeQuantized(nn.Module):
    """A Conv2d or Linear with rounded weight and input.

    Args:
        layer: Gives its bias and its way to compute.
        weight: Float, each output channel a multiple of its scale.
        scale: Of each output channel, ``(out,)``; None: the weight is computed with as it is.
        low: Lowest value of the input, at most 0; minus infinity: the input's levels are found at each call.
        high: Highest, at least 0; infinity with such a ``low``.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, weight: Tensor, scale: Tensor | None, low: float, high: float
    ) -> None:
        """See the class."""
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        self.dynamic = (low, high) == DYNAMIC
        self.step, self.zero = (0.0, 0) if self.dynamic else activation_step(low, high)

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        return self.layer.bias

    def forward(self, inputs: Tensor, *_: Any) -> Tensor:
        """As the layer's."""
        if self.dynamic:
            inputs = round_at_call(inputs, (1, 2, 3) if isinstance(self.layer, nn.Conv2d) else (-1,))
        else:
            inputs = torch.fake_quantize_per_tensor_affine(inputs, self.step, self.zero, 0, STEPS)
        weight: Tensor = self.weight
        if self.scale is not None:
            weight = torch.fake_quantize_per_channel_affine(weight, self.scale, self.zeros, 0, -LEVELS, LEVELS)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(inputs, weight, self.layer.bias)
        return F.linear(inputs, weight, self.layer.bias)


def round_at_call(inputs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Rounds to 256 levels around 0 whose step comes from the largest magnitude, as torchao's dynamic int8 inputs are.

    Args:
        inputs: Any.
        dims: Over which a step is shared. A token of a Linear's input has a step of its own, and an image of a
            Conv2d's: what one row of a batch computes does not depend on the others.
    """
    inputs = inputs.float()
    step = (inputs.abs().amax(dims, keepdim=True) / (STEPS / 2)).clamp(min=torch.finfo(torch.float32).eps)
    # Divided by the step, the largest, in the middle of two levels, may take the other one.
    return (inputs * (1 / step)).round().clamp(-LEVELS - 1, LEVELS) * step


def activation_step(low: float, high: float) -> tuple[float, int]:
    """Distance of two levels, and the level of 0."""
    step = max((high - low) / STEPS, torch.finfo(torch.float32).tiny)
    return step, round(-low / step)


def float_model(model: nn.Module, ranges: Mapping[str, tuple[float, float]]) -> nn.Module:
    """The model with plain float32 tensors, and fake-quantized layers where weights are quantized and ranges are known.

    Args:
        model: Stays as it was; returned itself where it is plain float32 already.
        ranges: Of the inputs of layers, see :mod:`compress.models.quantized`.
    """
    if not quantized_layers(model) and all(
        t.dtype == torch.float32 for t in model.parameters() if t.is_floating_point()
    ):
        return model
    shared = {id(layer.weight): layer.weight for layer in quantized_layers(model).values()}
    made = copy.deepcopy(model, shared)  # optimum-quanto's tensors cannot be copied, and all are replaced below
    vars(made).pop("hf_quantizer", None)  # it would forbid the change of dtype
    made.is_quantized = False  # type: ignore[assignment]
    for name, layer in quantized_layers(made).items():
        weight, scale = float_weight(layer).float(), channel_scales(layer)
        plain = new = _plain(layer, weight)
        if name in ranges:
            new = FakeQuantized(plain, weight, scale, *ranges[name])
            plain.register_parameter("weight", None)
        replace_layer(made, name, new)
    return made.float()


def _plain(layer: Any, weight: Tensor) -> Any:
    """A Conv2d or Linear with a layer's geometry and bias, of whatever class that is."""
    with torch.device("meta"):
        if isinstance(layer, nn.Conv2d):
            made: Any = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                padding_mode=layer.padding_mode,
            )
        else:
            made = nn.Linear(layer.in_features, layer.out_features)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made
