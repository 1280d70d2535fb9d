"""Layers with quantized weights, and the ranges that the inputs of such layers lie in.

Stock weights have no place for the ranges, so they stand in a file beside the denoiser's weights. Stock diffusers
ignores it and computes with float activations; an engine with int8 arithmetic uses it.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "activation_ranges.safetensors"
_NAME = "input_range"
_OF_CODES = (
    "__tensor_flatten__",
    "quant_state",
    "SCB",
)  # of weights: torchao, optimum-quanto; bitsandbytes

Ranges = dict[str, tuple[float, float]]
"""Name of a layer to the lowest and highest value of its input, as floats of float32."""
DYNAMIC = (-math.inf, math.inf)
"""The range of an input whose int8 levels are found at each call."""


def set_ranges(model: "nn.Module", ranges: Mapping[str, tuple[float, float]]) -> None:
    """Keeps the ranges at the layers; they follow copies of the model and any change of dtype or device."""
    for name, module in model.named_modules():
        module.__dict__.pop(_NAME, None)
        if name in ranges:
            setattr(module, _NAME, ranges[name])


def ranges_of(model: "nn.Module") -> Ranges:
    """The ranges at the layers; where there are none, those in the folder that stock diffusers loaded the model from.

    Raises:
        UserError: The file there is damaged or names layers that the model does not have.
    """
    found = {name: getattr(module, _NAME) for name, module in model.named_modules() if hasattr(module, _NAME)}
    if not found and is_quantized(model):
        return read_ranges(model, Path(model.config.get("_name_or_path") or ""))  # type: ignore[operator, union-attr]
    return found


def is_quantized(model: "nn.Module") -> bool:
    """Whether a model of diffusers or transformers says that it has quantized weights."""
    packed = getattr(getattr(model, "config", None), "packed_layers", None)
    return getattr(model, "hf_quantizer", None) is not None or bool(packed)


def quantized_layers(model: "nn.Module") -> dict[str, Any]:
    """Layers whose weights are quantized, by name."""
    return {name: module for name, module in model.named_modules() if has_codes(module)}


def has_codes(layer: "nn.Module") -> bool:
    """Whether a layer's weight is a quantized tensor, or codes that the layer can decode."""
    if hasattr(layer, "packing") or hasattr(layer, "sdnq_dequantizer"):
        return True
    weight = getattr(layer, "weight", None)
    return any(hasattr(weight, name) for name in _OF_CODES)


def float_weight(layer: Any) -> "Tensor":
    """The weight (out, in, ...) of a Conv2d or Linear as a plain tensor: its own, or what its codes stand for."""
    if hasattr(layer, "packing"):  # ours
        return layer.dequantize()
    weight = layer.weight
    if hasattr(weight, "__tensor_flatten__"):  # torchao, optimum-quanto
        return weight.dequantize().detach()
    if hasattr(layer, "sdnq_dequantizer"):
        return copy.deepcopy(layer).dequantize().weight.detach()
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        import bitsandbytes.functional as bnb

        if hasattr(weight, "quant_state"):
            return bnb.dequantize_4bit(weight.data, weight.quant_state)
        scale = layer.state.SCB if weight.SCB is None else weight.SCB  # the layer's after its first call
        return bnb.int8_vectorwise_dequant(weight.data, scale)
    return weight.detach()


def replace_layer(model: "nn.Module", name: str, new: "nn.Module") -> None:
    """Puts a layer in the place of another, under every name that it has."""
    old = model.get_submodule(name)
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
        owner, _, child = path.rpartition(".")
        setattr(model.get_submodule(owner), child, new)


def channel_scales(layer: Any) -> "Tensor | None":
    """Of a quantized layer with symmetric integers: the step of each output channel, ``(out,)``, float32; else None."""
    packing = getattr(layer, "packing", None)
    if packing is None:
        scale = getattr(layer.weight, "scale", None)
        return None if scale is None else scale.float().flatten()
    if packing["format"] != "int" or not packing["symmetric"] or packing["granularity"] == "group":
        return None
    return layer.scales("scale").expand(layer.shape[0], 1).flatten()


def plain_tensors(model: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
    """The tensors of ``state_dict``; quantized ones as the plain tensors that they consist of."""
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                yield f"{name}.{part}", getattr(tensor, part)
        else:
            yield name, tensor


def write_ranges(model: "nn.Module", folder: Path) -> None:
    """Writes the file, if there are ranges."""
    import torch

    from compress.system.files import write_tensors

    if ranges := ranges_of(model):
        write_tensors(folder / FILE, {name: torch.tensor(pair) for name, pair in ranges.items()})


def read_ranges(model: Any, folder: Path) -> Ranges:
    """The ranges in a folder; empty if it has none.

    Raises:
        UserError: The file is damaged or names layers that the model does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = {name: (float(pair[0]), float(pair[1])) for name, pair in load_file(file).items()}
    except (SafetensorError, OSError, IndexError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): quantize the model again") from error
    layers = dict(model.named_modules())
    if wrong := [name for name, (low, high) in found.items() if name not in layers or not low <= 0 <= high]:
        raise UserError(f"{file} does not fit the model: {wrong[0]}: quantize the model again")
    return found
