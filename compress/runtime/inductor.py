"""torch.compile: the same arithmetic in fused kernels, in bfloat16 where that is faster.

Linear layers may multiply 8-bit weights by inputs that are rounded at each call, in torchao's tensors.
"""

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import UserError
from compress.models.quantized import DYNAMIC, channel_scales, quantized_layers, replace_layer
from compress.models.quiet import hide_notices
from compress.runtime.fake import FakeQuantized, float_model
from compress.system.bf16 import bf16_pays

FEW_ROWS = ("*emb*", "*norm*")
"""Layers that may see one row an image: kernels of 8-bit products want more than 16."""


def missing(device: torch.device) -> str | None:
    """What torch.compile lacks to run here; None if nothing."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "needs a C++ compiler: install g++, or name one in CXX"
    return None


def precision(asked: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; ``auto`` is bfloat16 where that is faster."""
    if asked == "auto":
        asked = "bf16" if bf16_pays(device.type) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]


@dataclass
class InductorModule:
    """Runs a module's calls; each new shape of its arguments is compiled once.

    Attributes:
        module: Stays as it was.
        name: Of the component, for messages.
        dtype: Of matrix products and convolutions.
        ranges: Of the inputs of quantized layers; only those that are found at each call are used.
        linear: ``int8`` or ``fp8``, for Linear layers with float weights too, or None.
    """

    module: nn.Module
    name: str
    dtype: torch.dtype
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    linear: str | None = None

    def __deepcopy__(self, memo: Any) -> "InductorModule":
        return self

    @cached_property
    def _compiled(self) -> Any:
        plain = float_model(self.module, {name: ends for name, ends in self.ranges.items() if ends == DYNAMIC})
        if plain is self.module:
            plain = copy.deepcopy(plain)
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layers = quantized_layers(self.module)
        scales = {name: scale for name in layers if (scale := channel_scales(layers[name])) is not None}
        if self.linear or DYNAMIC in self.ranges.values():
            changed = round_linears(plain, scales, self.linear)
            if self.linear and not changed:
                why = f"the {self.name} has no Linear in multiples of 16 channels"
                raise UserError(f"linear={self.linear}: {why}")
        return torch.compile(plain, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            UserError: The module cannot be compiled.
        """
        kind = next(self.module.parameters()).device.type
        try:
            with torch.no_grad(), torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
                found = self._compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:  # the latter from the compiler
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"engine=inductor: the {self.name} cannot be run: {why}") from error
        dtype = next(self.module.parameters()).dtype
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, found)


def round_linears(model: nn.Module, scales: Mapping[str, Tensor], linear: str | None) -> list[str]:
    """Gives Linear layers torchao's 8-bit weights, whose inputs are rounded at each call, in place.

    An input has a step for each token with int8, and one for all of it with fp8.

    Args:
        model: With plain or fake-quantized layers, see :func:`compress.runtime.fake.float_model`.
        scales: Of int8 weights, ``(out,)``, by name of the layer.
        linear: ``int8`` or ``fp8``, for all of them; None: int8, for those alone that are fake-quantized so.

    Returns:
        The names of those that changed.
    """
    hide_notices()
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8Tensor, PerRow, quantize_
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    changed = []
    for name, module in list(model.named_modules()):
        fake = isinstance(module, FakeQuantized) and module.dynamic and name in scales
        layer: Any = module.layer if fake else module
        if type(layer) is not nn.Linear or not (fake or linear):
            continue
        if layer.in_features % 16 or layer.out_features % 16 or any(fnmatchcase(name, rows) for rows in FEW_ROWS):
            continue
        weight: Any = module.weight
        if linear == "fp8":
            layer.weight = weight
            quantize_(layer, Float8DynamicActivationFloat8WeightConfig())
        else:
            scale = scales[name][:, None] if name in scales else None
            inputs = QuantizeTensorToInt8Kwargs(PerRow())
            rounded = Int8Tensor.from_hp(weight.detach(), PerRow(), scale=scale, act_quant_kwargs=inputs)
            layer.weight = nn.Parameter(rounded, requires_grad=False)
        replace_layer(model, name, layer)
        changed.append(name)
    return changed
