"""Counts multiply-accumulates and parameters of a denoiser on the meta device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.models.inputs import Inputs, on_meta
from compress.models.meta import meta_model

# Torch's operations for the products of attention: batched matrix products, or a fused kernel.
ATTENTION = ("bmm", "baddbmm", "scaled_dot_product", "flash_attention", "efficient_attention")
PRODUCTS = "attention products"
QUANTIZED = ("quantization_config", "packed_layers")  # keys of configs; such a model counts as the float one


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one pass: products in convolutions, linear layers and attention.

    Attributes:
        total: Of the whole pass.
        attention: Of the two products (queries with keys, scores with values) of every attention.
        by_module: Name of a module to its MACs with those of its submodules; ``""`` is the model.
    """

    total: int
    attention: int
    by_module: Mapping[str, int]


def count_macs(model: Any, inputs: Inputs) -> Macs:
    """Counts one pass of the model that a denoiser's config describes.

    Quantized weights count like float weights, and attention counts, which a CPU's fused kernel would hide. Norms,
    activations and additions do not count.

    Args:
        model: The denoiser, on any device; its weights are not used.
        inputs: Keyword arguments of the pass, on any device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    empty = plain_copy(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty(**on_meta(inputs))
    flops = counter.get_flop_counts()
    root = type(empty).__name__
    by_module = {str(name).partition(".")[2]: sum(ops.values()) // 2 for name, ops in flops.items() if name != root}
    by_module[""] = sum(flops["Global"].values()) // 2
    by_kind = {str(name).removeprefix("aten."): found // 2 for name, found in flops["Global"].items()}
    attention = sum(count for name, count in by_kind.items() if name.lstrip("_").startswith(ATTENTION))
    return Macs(sum(by_kind.values()), attention, by_module)


def plain_copy(model: Any) -> Any:
    """The model of a denoiser's config in float32 on the meta device, in evaluation mode; such a model itself."""
    if not getattr(model, "is_loaded_in_8bit", False) and all(p.is_meta for p in model.parameters()):
        return model.eval()
    config = {key: value for key, value in model.config.items() if key not in QUANTIZED}
    return meta_model(type(model), config).eval().to(torch.float32)


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-accumulates of a denoiser.

    Attributes:
        params: Parameters.
        params_by_type: The same by class of module (``Conv2d``, ``Linear``, ...), most first.
        macs: Multiply-accumulates of one pass, see :class:`Macs`.
        macs_by_type: The same by class of module, most first; ``"attention products"`` belong to no module.
        macs_without_attention: Without the two products of every attention.
    """

    params: int
    params_by_type: dict[str, int]
    macs: int
    macs_by_type: dict[str, int]
    macs_without_attention: int


def count(model: Any, inputs: Inputs) -> Count:
    """Counts parameters and multiply-accumulates by the type of layer.

    Args:
        model: The denoiser; its weights are not used.
        inputs: Keyword arguments of the pass.

    Raises:
        RuntimeError: The model's parameters differ from those of its config.
    """
    empty = plain_copy(model)
    params = sum(p.numel() for p in empty.parameters())
    if not any(key in model.config for key in QUANTIZED) and params != (
        found := sum(p.numel() for p in model.parameters())
    ):
        raise RuntimeError(f"the denoiser has {found} parameters, but its config describes {params}")
    macs = count_macs(empty, inputs)
    return Count(params, _params_by_type(empty), macs.total, _macs_by_type(empty, macs), macs.total - macs.attention)


def _params_by_type(model: torch.nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    seen: set[torch.nn.Parameter] = set()  # a shared parameter counts once
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found[type(module).__name__] = found.get(type(module).__name__, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _macs_by_type(model: torch.nn.Module, macs: Macs) -> dict[str, int]:
    """MACs of leaf modules by class, of attention's products, and the rest."""
    found: dict[str, int] = {PRODUCTS: macs.attention}
    for name, module in model.named_modules():
        if macs.by_module.get(name) and not any(True for _ in module.children()):
            found[type(module).__name__] = found.get(type(module).__name__, 0) + macs.by_module[name]
    found["other"] = macs.total - sum(found.values())
    return dict(sorted(((kind, count) for kind, count in found.items() if count), key=lambda item: -item[1]))
