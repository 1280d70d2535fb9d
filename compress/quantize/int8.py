"""int8 weights for every Conv2d and Linear, in torchao's tensors, which stock diffusers loads.

A weight w of output channel c becomes q = round(w / s_c) in [-127, 127] with s_c = max |w| / 127 over the channel:
symmetric, one scale per output channel, float activations (Jacob et al. 2018, https://arxiv.org/abs/1712.05877,
section 2). No rounding error exceeds s_c / 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs
from compress.models.quiet import hide_notices
from compress.quantize.weights.apply import (
    Layer,
    QuantizeReport,
    check_patterns,
    check_skip,
    quantize_layers,
    stage_report,
)
from compress.quantize.weights.rounding import Rounded
from compress.quantize.weights.scheme import Scheme
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Quantizes the pipeline's denoiser in place; see :func:`quantize_weights`."""
    return stage_report(quantize_weights(denoiser(pipeline), config.skip, captured_inputs(pipeline)), Scheme())


def quantize_weights(
    unet: nn.Module,
    skip: Sequence[str] = (),
    inputs: Inputs | None = None,
    rounded: Mapping[str, Rounded] | None = None,
) -> QuantizeReport:
    """Gives every Conv2d and Linear int8 weights, in place; ``save_pretrained`` then writes what diffusers loads.

    Args:
        unet: A denoiser of diffusers with float weights.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.
        rounded: Weights of layers that are rounded to int8 already, one scale per output channel, by name.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: The weights are quantized already or not finite, a pattern matches no Conv2d or Linear, or none is
            left to quantize. The denoiser is then unchanged.
    """

    def to_int8(name: str, layer: Layer) -> None:
        weight, given = layer.weight.detach(), (rounded or {}).get(name)
        if given is not None and given.scale is not None:
            values, exact = given.weights(Scheme()).view(weight.shape), given.scale.flatten()
        else:
            values, exact = weight.float(), weight.float().abs().flatten(1).amax(1) / LEVELS
        # Loading casts the scales of convolutions to the requested dtype, so they must be representable in it.
        dtype = torch.float32 if weight.dim() == 2 else weight.dtype
        layer.weight = nn.Parameter(_int8(values, _scale(exact, dtype).float(), weight.dtype), requires_grad=False)

    report = quantize_layers(unet, to_int8, skip, inputs)
    quantized = set(report.modules)
    linears = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    _tell_diffusers(unet, [name for name in linears if name not in quantized])
    return report


check = check_skip


def _int8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 weight (out, in, ...) as torchao's int8 tensor of a dtype, with scales (out,) in float32."""
    hide_notices()
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

    # In float32, with our scales: torchao's are at least the epsilon of the weight's dtype, which in bfloat16 is
    # coarser than most weights.
    scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    if weight.dim() == 2:
        quantized = Int8Tensor.from_hp(weight.contiguous(), PerRow(), scale=scale)
        return Int8Tensor(quantized.qdata, scale, quantized.block_size, dtype, zero_point=quantized.zero_point)
    return IntxUnpackedToInt8Tensor.from_hp(
        weight.contiguous(),
        (1, *weight.shape[1:]),  # one scale per output channel
        torch.int8,
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
    ).to(dtype)


def _scale(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in ``dtype``, rounded up so that no weight is clipped."""
    numbers = torch.finfo(dtype)
    # A channel of zeros needs any scale but zero. Only float16 needs its smallest numbers for scales.
    lowest = numbers.tiny * numbers.eps if dtype == torch.float16 else numbers.tiny
    exact = exact.clamp(min=lowest)
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
