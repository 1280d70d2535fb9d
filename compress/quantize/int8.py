"""int8 weights for every Conv2d and Linear, in torchao's tensors, which stock diffusers loads.

A weight w of output channel c becomes q = round(w / s_c) in [-127, 127] with s_c = max |w| / 127 over the channel:
symmetric, one scale per output channel, float activations (Jacob et al. 2018, https://arxiv.org/abs/1712.05877,
section 2). No rounding error exceeds s_c / 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.errors import UserError, bad_value
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs, known_inputs
from compress.models.macs import count_macs
from compress.models.quiet import hide_notices
from compress.stage import Stage, StageContext, StageReport, one_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = Stage(
    version=1,
    leaves="quantized",
    by_names=True,
    exact=True,
    libraries=("torchao",),
    tag="quantized",
    usage="Always give `torch_dtype`: without it a torchao checkpoint comes up mixed, a bfloat16 denoiser beside a "
    "float32 text encoder and VAE, and fails at the first step.",
    limits=("Its int8 weights save memory and disk; without a compiler they are not faster than float.",),
)

LEVELS = 127  # largest magnitude of a quantized weight; -128 is unused, so the levels are symmetric


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        bits: Bits per weight: 8.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
    """

    bits: int = 8
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: If a value is out of range.
        """
        if self.bits != 8 or isinstance(self.bits, bool):
            raise bad_value("bits", self.bits, "8")
        check_patterns("skip", self.skip)


@dataclass(frozen=True)
class QuantizeReport:
    """Result of :func:`quantize_weights`.

    Attributes:
        modules: Names of the modules with int8 weights.
        skipped: Modules left in float, with the reason.
        params: Share of the denoiser's parameters that are int8, in [0, 1].
        macs: Share of the MACs with int8 weights, in [0, 1]; None if the denoiser's inputs are unknown.
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


def check_patterns(key: str, patterns: Sequence[str]) -> None:
    """Checks that shell patterns are texts.

    Raises:
        UserError: Naming the key.
    """
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise bad_value(key, list(patterns), 'a list of patterns of module names, such as ["conv_in"]')


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Quantizes the pipeline's denoiser in place; see :func:`quantize_weights`."""
    report = quantize_weights(denoiser(pipeline), config.skip, captured_inputs(pipeline))
    return stage_report(report, str(context.dtype).removeprefix("torch."))


def stage_report(report: QuantizeReport, activations: str) -> StageReport:
    """The report of a stage that quantized weights.

    Args:
        report: Of :func:`quantize_weights`.
        activations: What layers compute in: a dtype, or what the scheme says.
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
            "scheme": {
                "weights": "int8",
                "granularity": "output channel",
                "symmetric": True,
                "activations": activations,
            },
            "quantized": report.modules,
            "float": report.left_float,
            "rounding": {
                "largest": report.rounding[worst[0]],
                "mean": sum(report.rounding.values()) / len(report.rounding),
                "worst_modules": {name: report.rounding[name] for name in worst[:5]},
            },
            "zero_channels": report.zero_channels,
        },
    )


def quantize_weights(unet: nn.Module, skip: Sequence[str] = (), inputs: Inputs | None = None) -> QuantizeReport:
    """Gives every Conv2d and Linear int8 weights, in place; ``save_pretrained`` then writes what diffusers loads.

    Args:
        unet: A denoiser of diffusers with float weights.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: The weights are quantized already or not finite, a pattern matches no Conv2d or Linear, or none is
            left to quantize. The denoiser is then unchanged.
    """
    if getattr(unet, "hf_quantizer", None) is not None:
        raise UserError("the denoiser is quantized already: quantize it once, from float weights")
    layers, skipped = choose_layers(unet, skip)
    chosen = {name: module for name, module in layers.items() if name not in skipped}
    for name, module in chosen.items():
        if not torch.isfinite(module.weight).all():
            raise UserError(f"{name} has weights that are NaN or infinite: a stage before diverged; lower its rate")

    total, floats = _count_floats(unet, layers)
    skipped |= {name: why for name, (_, why) in floats.items() if name not in ("bias", "norm")}
    inputs = inputs or known_inputs(unet)
    macs = None
    if inputs is not None:
        by_layer = count_macs(unet, inputs).by_module
        macs = sum(by_layer.get(name, 0) for name in chosen) / by_layer[""]

    weights = sum(module.weight.numel() for module in chosen.values())
    rounding, zero_channels = {}, 0
    for name, module in chosen.items():
        weight = module.weight.detach()
        largest = weight.float().abs().flatten(1).amax(1)
        quantized = _int8(weight, largest)
        error = (quantized.dequantize().float() - weight.float()).abs().flatten(1).amax(1)
        rounding[name] = (error / largest.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
        zero_channels += int((largest == 0).sum())
        module.weight = nn.Parameter(quantized, requires_grad=False)
    _tell_diffusers(unet, [name for name in skipped if isinstance(layers.get(name), nn.Linear)])
    return QuantizeReport(
        modules=list(chosen),
        skipped=skipped,
        params=weights / total,
        macs=macs,
        left_float={name: {"params": count, "why": why} for name, (count, why) in floats.items()},
        rounding=rounding,
        zero_channels=zero_channels,
    )


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer; every layer keeps its shape.

    Raises:
        UserError: See :func:`quantize_weights`.
    """
    choose_layers(denoiser, config.skip)
    return denoiser


def choose_layers(unet: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every Conv2d and Linear by name, and the reason of each that stays in float.

    Raises:
        UserError: A pattern matches none of them, or none is left.
    """
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise bad_value("skip", pattern, "a pattern that matches the name of a Conv2d or Linear of the denoiser")
    skipped = {}
    for name in layers:
        asked = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
        if asked is not None:
            skipped[name] = f"asked for by skip: {asked}"
    if len(skipped) == len(layers):
        raise bad_value("skip", list(skip), "patterns that leave a Conv2d or Linear to quantize")
    return layers, skipped


def _int8(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The weight (out, in, ...) as torchao's int8 tensor, given the largest magnitude (out,) of each channel."""
    hide_notices()
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

    # In float32, with our scales: torchao's are at least the epsilon of the weight's dtype, which in bfloat16 is
    # coarser than most weights.
    dtype = weight.dtype
    shape = (-1, *[1] * (weight.dim() - 1))
    if weight.dim() == 2:
        scale = _scale(largest, torch.float32).reshape(shape)
        quantized = Int8Tensor.from_hp(weight.float().contiguous(), PerRow(), scale=scale)
        return Int8Tensor(quantized.qdata, scale, quantized.block_size, dtype, zero_point=quantized.zero_point)
    # Loading casts the scales to the requested dtype, so they must be representable in it.
    scale = _scale(largest, dtype).float().reshape(shape)
    return IntxUnpackedToInt8Tensor.from_hp(
        weight.float().contiguous(),
        (1, *weight.shape[1:]),  # one scale per output channel
        torch.int8,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
    ).to(dtype)


def _scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in ``dtype``, rounded up so that no weight is clipped."""
    numbers = torch.finfo(dtype)
    # A channel of zeros needs any scale but zero. Only float16 needs its smallest numbers for scales.
    lowest = numbers.tiny * numbers.eps if dtype == torch.float16 else numbers.tiny
    exact = (largest / LEVELS).clamp(min=lowest)
    scale = exact.to(dtype)
    low = scale.float() < exact
    scale[low] = (scale[low].view(torch.int16) + 1).view(dtype)  # the next number: only 16 bits can be too low
    return scale


def _tell_diffusers(unet: Any, float_linears: list[str]) -> None:
    """Marks ``unet`` as quantized by torchao, as diffusers does, so that it saves and loads."""
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    # It tells diffusers that the weights are torchao's; the weight file holds their types. FqnToConfig avoids a
    # warning, wrong here, against loading int8 in another dtype than bfloat16.
    config = TorchAoConfig(FqnToConfig({"re:.*": Int8WeightOnlyConfig()}), modules_to_not_convert=float_linears or None)
    quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    quantizer.validate_environment()
    unet.hf_quantizer = quantizer
    unet.register_to_config(quantization_config=config)


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
