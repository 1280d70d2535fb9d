"""Denoisers with Conv2d and Linear layers of optimum-quanto, as diffusers loads them once ``compress`` is imported.

Stock diffusers knows optimum-quanto's Linear layers alone, and would start convolutions from random weights. So these
checkpoints name a quantization of their own, :data:`METHOD`, which stock diffusers refuses with an error.
"""

from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from compress.models.quantized import replace_layer

WEIGHTS = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "fp8": "qfloat8_e4m3fn"}
"""Our name of a format to optimum-quanto's."""


class Method(StrEnum):
    """The name in ``config.json``; diffusers asks for its ``value``."""

    QUANTO_LAYERS = "quanto_layers"


METHOD = Method.QUANTO_LAYERS


class QuantoLayersConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a denoiser.

    Args:
        weights: A key of :data:`WEIGHTS`.
        modules: Names of the layers, all others are in float.
        quant_method: Always :data:`METHOD`.
    """

    def __init__(self, weights: str, modules: list[str], quant_method: str = METHOD) -> None:
        """See the class."""
        self.quant_method, self.weights, self.modules = METHOD, weights, list(modules)

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing is a default."""
        return self.to_dict()


class QuantoLayersQuantizer(DiffusersQuantizer):
    """Loads such a denoiser: what diffusers calls before, during and after it reads the weights."""

    def __init__(self, quantization_config: QuantoLayersConfig, **kwargs: Any) -> None:
        """See :class:`QuantoLayersConfig`."""
        super().__init__(quantization_config, **kwargs)
        self._read: dict[str, dict[str, Tensor]] = {name: {} for name in quantization_config.modules}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ``ImportError`` without the package, and before its weights would be taken for float ones."""
        try:
            version("optimum-quanto")
        except PackageNotFoundError:
            raise ImportError('this model needs optimum-quanto: pip install "compress[quanto]"') from None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name in self._read:
            replace_layer(model, name, quanto_layer(model.get_submodule(name), self.quantization_config.weights))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ``ValueError`` where diffusers would draw random weights."""
        if missing_keys:
            raise ValueError(f"the weight files lack {sorted(missing_keys)[0]}: copy or download the model again")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor of the file belongs to one of the layers."""
        return self._layer(param_name) is not None

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps a part of a layer until all are there."""
        layer = self._layer(param_name)
        assert layer is not None
        self._read[layer][param_name.removeprefix(layer + ".")] = param_value.to(target_device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, parts in self._read.items():
            model.get_submodule(name).load_state_dict(parts, assign=True)
            parts.clear()
        return model.requires_grad_(False)

    def _layer(self, param_name: str) -> str | None:
        owner = param_name
        while owner and owner not in self._read:
            owner = owner.rpartition(".")[0]
        return owner or None

    @property
    def is_serializable(self) -> bool:
        """Saved by ``save_pretrained``."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradient passes through these layers as they are."""
        return False


def quanto_layer(layer: Any, weights: str) -> nn.Module:
    """A Conv2d or Linear with its weight rounded, as a layer of optimum-quanto on the same device.

    Args:
        layer: In float; on the meta device the new one is there too.
        weights: A key of :data:`WEIGHTS`.
    """
    from optimum import quanto

    linear = _int8_linear() if weights == "int8" else quanto.QLinear
    kind = quanto.QConv2d if isinstance(layer, nn.Conv2d) else linear
    made = kind.from_module(layer, weights=getattr(quanto, WEIGHTS[weights]))
    with torch.no_grad():
        made.freeze()
    return made.eval().requires_grad_(False)


@cache
def _int8_linear() -> Any:
    """optimum-quanto's Linear, but for the product: in bfloat16 on CPUs its kernel crashes, or computes nonsense."""
    from optimum.quanto import QLinear

    class Int8Linear(QLinear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.dequantize(), self.bias)

    return Int8Linear


def tell_diffusers(model: Any, weights: str, modules: list[str]) -> None:
    """Marks a model as quantized so, so that it saves and loads."""
    config = QuantoLayersConfig(weights, modules)
    model.hf_quantizer = QuantoLayersQuantizer(config)
    model.register_to_config(quantization_config=config)
