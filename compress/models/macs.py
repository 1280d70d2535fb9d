"""Parameters and multiply-accumulates of the model that a denoiser's config describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.models.inputs import Inputs, map_tensors

# Where torch's counter puts attention's products: batched matrix products, or one of the fused kernels.
ATTENTION = ("bmm", "baddbmm", "scaled_dot_product", "flash_attention", "efficient_attention")
PRODUCTS = "attention products"


@dataclass(frozen=True)
class Count:
    """What a denoiser has and does.

    Attributes:
        params: Parameters.
        params_by_type: The same by the class of the module that holds them (``Conv2d``, ``Linear``, ...), most first.
        macs: Multiply-accumulates of one pass: products in convolutions, linear layers and attention.
        macs_by_type: The same by the class of the module that does them, most first; ``"attention products"``
            (queries with keys, scores with values) are no module's own.
        macs_without_attention: Without the two products (query with key, weights with value) of every attention.
    """

    params: int
    params_by_type: dict[str, int]
    macs: int
    macs_by_type: dict[str, int]
    macs_without_attention: int


def count(model: torch.nn.Module, inputs: Inputs) -> Count:
    """Counts the model that the denoiser's config describes, for one pass.

    Counted on the meta device, on a model in float: quantized weights count as the numbers that they stand for, and
    attention is counted, which a CPU's fused kernel would hide. Norms, activations and additions do not count.

    Args:
        model: The denoiser; its weights are not touched.
        inputs: Positional and keyword arguments of the pass.

    Raises:
        RuntimeError: The model's parameters are not those of its config.
    """
    from torch.utils.flop_counter import FlopCounterMode

    settings = {key: value for key, value in model.config.items() if key != "quantization_config"}  # type: ignore
    with torch.device("meta"):
        empty = type(model).from_config(settings).eval().to("meta", torch.float32)  # type: ignore[attr-defined]
    params = sum(p.numel() for p in empty.parameters())
    plain = "quantization_config" not in model.config  # type: ignore[operator]
    if plain and params != (found := sum(p.numel() for p in model.parameters())):
        raise RuntimeError(f"the denoiser has {found} parameters, but its config describes {params}")
    args, kwargs = map_tensors(inputs, lambda t: t.to("meta", torch.float32 if t.is_floating_point() else t.dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty(*args, **kwargs)
    macs = {str(name).removeprefix("aten."): flops // 2 for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(value for name, value in macs.items() if name.lstrip("_").startswith(ATTENTION))
    total = sum(macs.values())
    by_type = _macs_by_type(empty, counter.get_flop_counts(), total, attention)
    return Count(params, _by_type(empty), total, by_type, total - attention)


def _by_type(model: torch.nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    seen: set[torch.nn.Parameter] = set()  # a parameter that two modules share counts once
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                found[type(module).__name__] = found.get(type(module).__name__, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _macs_by_type(
    model: torch.nn.Module, counts: Mapping[str, Mapping[Any, int]], total: int, attention: int
) -> dict[str, int]:
    """Those of the modules that hold no others, attention's products, and what else there is."""
    macs = {str(name).partition(".")[2]: sum(ops.values()) // 2 for name, ops in counts.items()}
    found: dict[str, int] = {PRODUCTS: attention}
    for name, module in model.named_modules():
        if macs.get(name) and not any(True for _ in module.children()):
            found[type(module).__name__] = found.get(type(module).__name__, 0) + macs[name]
    found["other"] = total - sum(found.values())
    return dict(sorted(((kind, count) for kind, count in found.items() if count), key=lambda item: -item[1]))
