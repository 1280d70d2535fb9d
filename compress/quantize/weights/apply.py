"""Quantizes the weights of chosen layers and reports what was done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn

from compress.errors import UserError, bad_value
from compress.models.inputs import Inputs, known_inputs
from compress.models.macs import count_macs
from compress.models.quantized import float_weight, is_quantized
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageReport, one_line

Layer: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class QuantizeReport:
    """What was quantized.

    Attributes:
        modules: Names of the modules with quantized weights.
        skipped: Modules left in float, with the reason.
        params: Share of the model's parameters that are quantized, in [0, 1].
        macs: Share of the MACs with quantized weights, in [0, 1]; None if the model's inputs are unknown.
        left_float: Kind of parameter to ``{"params": number, "why": reason}``, outside of the modules.
        rounding: Module to the largest rounding error of a weight, relative to the largest weight of its channel.
        zero_channels: Number of output channels that are all zero; they stay exactly zero.
    """

    modules: list[str]
    skipped: dict[str, str]
    params: float
    macs: float | None
    left_float: dict[str, dict[str, Any]]
    rounding: dict[str, float]
    zero_channels: int

    def __repr__(self) -> str:
        shares = {"params": self.params} | ({} if self.macs is None else {"macs": self.macs})
        return one_line(self, len(self.modules), **shares)


def quantize_layers(
    model: nn.Module,
    quantize: Callable[[str, Layer], None],
    skip: Sequence[str] = (),
    inputs: Inputs | None = None,
    kept: Mapping[str, str] | None = None,
) -> QuantizeReport:
    """Quantizes the weights of every Conv2d and Linear but some, in place.

    Args:
        model: With float weights.
        quantize: Changes a layer, given with its name, so that its weight is quantized, or puts another in its place.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if its inputs
            are known.
        kept: Further layers that stay in float, with the reason.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: The weights are quantized already or not finite, a pattern matches no Conv2d or Linear, or none is
            left to quantize. The model is then unchanged.
    """
    refuse_quantized(model)
    layers, skipped = choose_layers(model, skip, kept)
    chosen = {name: module for name, module in layers.items() if name not in skipped}
    for name, module in chosen.items():
        if not torch.isfinite(module.weight).all():
            raise UserError(
                f"{name} has weights that are NaN or infinite, from the model or from a training that diverged"
            )

    total, floats = _count_floats(model, layers)
    skipped |= {name: why for name, (_, why) in floats.items() if name not in ("bias", "norm")}
    inputs = inputs or known_inputs(model)
    macs = None
    if inputs is not None:
        by_layer = count_macs(model, inputs).by_module
        macs = sum(by_layer.get(name, 0) for name in chosen) / by_layer[""]

    weights = sum(module.weight.numel() for module in chosen.values())
    rounding, zero_channels = {}, 0
    for name, module in chosen.items():
        before = module.weight.detach().float()
        largest = before.abs().flatten(1).amax(1)
        quantize(name, module)
        error = (float_weight(model.get_submodule(name)).float() - before).abs().flatten(1).amax(1)
        rounding[name] = (error / largest.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
        zero_channels += int((largest == 0).sum())
    return QuantizeReport(
        modules=list(chosen),
        skipped=skipped,
        params=weights / total,
        macs=macs,
        left_float={name: {"params": count, "why": why} for name, (count, why) in floats.items()},
        rounding=rounding,
        zero_channels=zero_channels,
    )


def stage_report(report: QuantizeReport, scheme: Scheme, **details: Any) -> StageReport:
    """The report of a stage that quantized weights.

    Args:
        report: Of :func:`quantize_layers`.
        scheme: Of the layers.
        details: More of them.
    """
    worst = sorted(report.rounding, key=lambda name: -report.rounding[name])
    return StageReport(
        coverage={
            "params": report.params,
            "macs": report.macs,
            "modules": len(report.modules),
            "skipped": report.skipped,
        },
        details={
            "scheme": {field: value for field, value in asdict(scheme).items() if field in Scheme.__annotations__},
            "quantized": report.modules,
            "float": report.left_float,
            "rounding": {
                "largest": report.rounding[worst[0]],
                "mean": sum(report.rounding.values()) / len(report.rounding),
                "worst_modules": {name: report.rounding[name] for name in worst[:5]},
            },
            "zero_channels": report.zero_channels,
            **details,
        },
    )


def refuse_quantized(model: nn.Module) -> None:
    """Checks that a model's weights are float.

    Raises:
        UserError: They are quantized.
    """
    if is_quantized(model):
        raise UserError(f"the {type(model).__name__} is quantized already: quantize it once, from float weights")


def check_patterns(key: str, patterns: Sequence[str]) -> None:
    """Checks that shell patterns are texts.

    Raises:
        UserError: Naming the key.
    """
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise bad_value(key, list(patterns), 'a list of patterns of module names, such as ["conv_in"]')


def choose_layers(
    model: nn.Module, skip: Sequence[str], kept: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every Conv2d and Linear by name, and the reason of each that stays in float.

    Args:
        model: Any model; it may be on the meta device.
        skip: Shell patterns of names.
        kept: Further layers that stay in float, with the reason.

    Raises:
        UserError: A pattern matches none of them, or none is left.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    check_matches("skip", skip, layers)
    skipped = dict(kept or {})
    for name in layers:
        asked = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
        if asked is not None:
            skipped[name] = f"asked for by skip: {asked}"
    if layers.keys() <= skipped.keys():
        raise bad_value("skip", list(skip), "patterns that leave a Conv2d or Linear to quantize")
    return layers, skipped


def check_skip(config: Any, denoiser: nn.Module, outline: Any) -> nn.Module:
    """The ``check`` of methods with a key ``skip``: refuses patterns that match no layer; layers keep their shapes.

    Raises:
        UserError: See :func:`choose_layers`.
    """
    choose_layers(denoiser, config.skip)
    return denoiser


def check_matches(key: str, patterns: Sequence[str], names: Mapping[str, Any]) -> None:
    """Checks that every pattern matches a name.

    Raises:
        UserError: Naming the key and the first pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise bad_value(key, pattern, "a pattern that matches the name of a Conv2d or Linear of the denoiser")


def _count_floats(unet: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[int, dict[str, tuple[int, str]]]:
    """Number of parameters, and those outside of Conv2d and Linear weights: ``{kind: (number, why)}``."""
    total = 0
    floats: dict[str, tuple[int, str]] = {}
    for name, parameter in unet.named_parameters():
        total += parameter.numel()
        owner, _, last = name.rpartition(".")
        if owner in layers and last == "weight":
            continue
        if last == "bias" and owner in layers:
            kind, why = "bias", "added to the outputs: so few that rounding them saves nothing"
        elif parameter.dim() == 1:
            kind, why = "norm", "scales and shifts of normalizations: few, and every value passes through them"
        else:
            kind, why = owner or name, f"{type(unet.get_submodule(owner)).__name__}: neither Conv2d nor Linear"
        floats[kind] = (floats.get(kind, (0, why))[0] + parameter.numel(), why)
    return total, floats
