"""Moves the spread of input channels into the weights (SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438).

One range for the whole input of a layer suits no channel if a few are far larger than the others. Where a LayerNorm
feeds linear layers alone, its scale and shift are divided by a factor for each channel and the columns of the layers'
weights are multiplied by it: the layers compute what they did, from inputs that are more alike. The model keeps its
shape, so stock diffusers loads it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.data.calls import draw
from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs, predict
from compress.quantize.ranges.inputs import InputRanges
from compress.stage import StageContext

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def smooth_inputs(
    pipeline: "DiffusionPipeline", layers: Mapping[str, nn.Module], config: InputRanges, context: StageContext
) -> dict[str, Any]:
    """Smooths the inputs of layers of the pipeline's denoiser, in place, unless ``config.smooth`` is None.

    Args:
        pipeline: With float weights.
        layers: With int8 inputs, by name.
        config: Its ``smooth`` and ``calibration``.
        context: Its captions are sampled from.

    Returns:
        ``smoothed``: each norm that changed to its layers; ``not_smoothed``: each other LayerNorm, with the reason.

    Raises:
        UserError: No norm feeds such layers alone.
    """
    if config.smooth is None:
        return {}
    model = denoiser(pipeline)
    fed, left = fed_layers(model, layers, captured_inputs(pipeline))
    if not fed:
        raise bad_value("smooth", config.smooth, "null: no LayerNorm with a scale and a shift feeds int8 inputs alone")
    with _largest_inputs({norm: model.get_submodule(names[0]) for norm, names in fed.items()}) as largest:
        draw(pipeline, context.data.text, config.calibration, context.seed)
    for norm, names in fed.items():
        balance(model.get_submodule(norm), [model.get_submodule(name) for name in names], largest[norm], config.smooth)
    return {"smoothed": fed, "not_smoothed": left}


def check_norms(model: nn.Module, config: InputRanges) -> None:
    """Checks that something can be smoothed, as far as the kinds of layers tell; the model may be on the meta device.

    Raises:
        UserError: It is asked for, and no LayerNorm has a scale and a shift.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if config.smooth is not None and all(norm.weight is None or norm.bias is None for norm in norms):
        raise bad_value("smooth", config.smooth, "null: no LayerNorm of this denoiser has a scale and a shift")


@torch.no_grad()
def balance(norm: Any, linears: list[Any], largest: Tensor, alpha: float) -> None:
    """Divides a norm's output by a factor for each channel, and multiplies the columns of its layers by it, in place.

    Args:
        norm: A LayerNorm with weight and bias.
        linears: All that take its output.
        largest: Largest magnitude of each channel of the output, ``(channels,)``, finite.
        alpha: Share of the spread that moves into the weights, in [0, 1]: the factor of channel j is
            max |x_j|^alpha / max |w_j|^(1 - alpha). A channel or column of zeros keeps its size.
    """
    columns = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0).float()
    largest = largest.to(columns)
    factor = largest.pow(alpha) / columns.pow(1 - alpha)
    factor = torch.where((largest > 0) & (columns > 0), factor, 1.0)
    for tensor in (norm.weight, norm.bias):
        tensor.copy_(tensor / factor)
    for linear in linears:
        linear.weight.copy_(linear.weight * factor)


def fed_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """LayerNorms whose outputs go into linear layers alone, found in one pass.

    Args:
        model: With float weights.
        layers: That may be changed, by name.
        inputs: Keyword arguments of the pass.

    Returns:
        Name of a norm to its layers, in the order of their calls; and each other LayerNorm, with the reason.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    left = {
        name: "it has no scale and shift" for name, norm in norms.items() if norm.weight is None or norm.bias is None
    }
    uses = _Uses({id(module.weight): name for name, module in layers.items() if isinstance(module, nn.Linear)})
    handles = [
        norm.register_forward_hook(lambda module, args, output, name=name: uses.watch(name, output))
        for name, norm in norms.items()
        if name not in left
    ]
    try:
        with uses:
            predict(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    left |= {name: "its output goes elsewhere too" for name in norms if name not in left and not uses.of(name)}
    return {name: uses.of(name) for name in norms if name not in left}, left


class _Uses(TorchFunctionMode):
    """Sees which functions of torch take the outputs of norms.

    Args:
        weights: Identity of the weight of a linear layer to its name.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # held, so that no other tensor gets its identity
        self.found: dict[str, list[str | None]] = {}

    def watch(self, norm: str, output: Tensor) -> None:
        """Follows an output of a norm."""
        self.outputs[id(output)] = (norm, output)

    def of(self, norm: str) -> list[str]:
        """The layers that a norm's output goes into; empty if it also goes elsewhere."""
        found = self.found.get(norm, [])
        return [] if None in found else [name for name in dict.fromkeys(found) if name is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            entry = self.outputs.get(id(value))
            if entry is None or not isinstance(result, Tensor | tuple | list) or isinstance(result, torch.Size):
                continue
            norm, output = entry
            if output._version == 0 and result is output:
                continue  # a cast to the type that it has; not a change in place
            linear = func is F.linear and len(args) > 1
            self.found.setdefault(norm, []).append(self.weights.get(id(args[1])) if linear else None)
        return result


@contextmanager
def _largest_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yields a name to the largest magnitude of each channel of the layer's inputs, ``(channels,)``, float32."""
    largest: dict[str, Tensor] = {}

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].detach().flatten(0, -2).abs().amax(0).float()
            largest[name] = torch.maximum(largest.get(name, found), found)

        return hook

    handles = [layer.register_forward_pre_hook(watcher(name)) for name, layer in layers.items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
