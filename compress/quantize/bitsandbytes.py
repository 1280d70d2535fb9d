"""Linear weights in 8 or 4 bits by bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes).

``int8``: LLM.int8(), one symmetric scale per output channel; inputs are rounded to int8 at each call, but for the
columns with a value above 6 (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339). ``nf4`` and ``fp4``: blocks of 64
weights, each with a scale (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). Convolutions stay in float.

Stock diffusers loads these checkpoints where it finds a GPU, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.errors import UserError, bad_value
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs
from compress.models.quantized import replace_layer
from compress.quantize.weights.apply import (
    Layer,
    QuantizeReport,
    check_patterns,
    choose_layers,
    quantize_layers,
    stage_report,
)
from compress.quantize.weights.scheme import Scheme
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = Stage(
    version=1,
    leaves="quantized",
    by_names=True,
    exact=True,
    libraries=("bitsandbytes",),
    extra="bitsandbytes",
    tag="quantized",
    usage="It loads on a GPU alone: diffusers refuses weights of bitsandbytes elsewhere.",
)

BLOCK = 64
SCHEMES = {
    "int8": Scheme(activations="dynamic"),
    "nf4": Scheme("nf4", 4, "group", BLOCK),
    "fp4": Scheme("fp4", 4, "group", BLOCK),
}
"""By the key ``weights``. A block of 4 bits may span two output channels, where their size is no multiple of 64."""


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        weights: Format of a weight: ``int8``, ``nf4`` or ``fp4``.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
    """

    weights: str = "nf4"
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is none of those named above.
        """
        if self.weights not in SCHEMES:
            raise bad_value("weights", self.weights, "one of " + ", ".join(SCHEMES))
        check_patterns("skip", self.skip)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Quantizes the pipeline's denoiser in place; see :func:`quantize_weights`."""
    check_device()
    report = quantize_weights(denoiser(pipeline), config.weights, config.skip, captured_inputs(pipeline))
    return stage_report(report, SCHEMES[config.weights])


def quantize_weights(
    model: Any, weights: str = "nf4", skip: Sequence[str] = (), inputs: Inputs | None = None
) -> QuantizeReport:
    """Puts bitsandbytes' layers in the place of every Linear; ``save_pretrained`` then writes what diffusers loads.

    Args:
        model: A denoiser of diffusers with float weights; changed.
        weights: ``int8``, ``nf4`` or ``fp4``.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: As :func:`compress.quantize.weights.apply.quantize_layers`. The denoiser is then unchanged.
    """
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    def to_bitsandbytes(name: str, layer: Layer) -> None:
        replace_layer(model, name, _layer(layer, weights))

    report = quantize_layers(model, to_bitsandbytes, skip, inputs, kept(model, skip))
    left = [name for name in report.skipped if isinstance(model.get_submodule(name), nn.Linear)]
    if weights == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=left,
            bnb_4bit_quant_type=weights,
            bnb_4bit_compute_dtype=model.dtype,
        )
    model.hf_quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = weights == "int8", weights != "int8"
    model.register_to_config(quantization_config=config)
    return report


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses machines on which diffusers would not read the result back, and patterns that match no layer.

    Raises:
        UserError: See :func:`check_device` and :func:`quantize_weights`.
    """
    check_device()
    choose_layers(denoiser, config.skip, kept(denoiser, config.skip))
    return denoiser


def check_device() -> None:
    """Looks for a GPU.

    Raises:
        UserError: There is none, so that no checkpoint could be read back.
    """
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(
            "method=bitsandbytes: diffusers loads weights of bitsandbytes on a GPU alone, and this machine has none: "
            "use quantize=int8 or quantize=quanto_int4"
        )


def kept(model: nn.Module, skip: Sequence[str]) -> dict[str, str]:
    """Layers that stay in float besides those asked for, with the reason.

    They are the convolutions, and what diffusers cannot tell from a layer that was asked for: it leaves out a Linear
    whose own name, or a part of whose path, is in its list.
    """
    layers, skipped = choose_layers(model, skip)
    found = {}
    for name, module in layers.items():
        if isinstance(module, nn.Conv2d):
            found[name] = "a Conv2d: bitsandbytes knows Linear layers alone"
            continue
        like = [other for other in skipped if other == name.rpartition(".")[2] or f"{other}." in name]
        if like and name not in skipped:
            found[name] = f"diffusers cannot tell it from {like[0]}"
    return found


def _layer(layer: Any, weights: str) -> nn.Module:
    """A Linear as a layer of bitsandbytes, with its weight rounded."""
    from bitsandbytes import nn as bnb

    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.weight.detach().clone()
    if weights == "int8":
        made: Any = bnb.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.Linear4bit(*sizes, layer.weight.dtype, compress_statistics=False, quant_type=weights, device="meta")
        made.weight = bnb.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type=weights, module=made
        )
    made.bias = layer.bias
    return made.to(layer.weight.device).eval().requires_grad_(False)  # moving it rounds the weight
