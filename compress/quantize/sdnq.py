"""Conv2d and Linear weights in 2 to 8 bits by SDNQ (https://github.com/Disty0/sdnq), which stock diffusers loads.

A scale, and for unsigned integers a shift, for each group of neighbors among the inputs of an output channel; float
activations. SDNQ itself leaves layers of fewer than 16,384 weights or 32 channels in float; here it quantizes them.

SDNQ is licensed under the GPL-3.0: it is imported where it is installed, and no part of it is in this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs
from compress.models.quantized import replace_layer
from compress.quantize.weights.apply import (
    Layer,
    QuantizeReport,
    check_patterns,
    check_skip,
    quantize_layers,
    stage_report,
)
from compress.quantize.weights.scheme import Scheme
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


STAGE = Stage(
    version=1,
    leaves="quantized",
    by_names=True,
    exact=True,
    libraries=("sdnq",),
    extra="sdnq",
    tag="quantized",
    usage="`sdnq` is licensed under the GPL-3.0.",
    limits=("Its weights are decoded at every call: they save memory and disk, and no time.",),
)

WEIGHTS = ("int8", "uint8", *(f"{sign}int{bits}" for bits in range(7, 1, -1) for sign in ("", "u")))


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        weights: Format of a weight, one of :data:`WEIGHTS`: ``int2`` to ``int8`` are symmetric, ``uint2`` to ``uint8``
            have a shift beside each scale. Not its float8: diffusers would cast the timestep to it.
        group_size: Weights that share a scale: neighbors among the inputs of an output channel (of a convolution: input
            channels); fewer where they would not divide it evenly. 0: SDNQ's choice, twice as many for Linear as for
            Conv2d, four times 2^bits for Linear. -1: all of an output channel (of a convolution: for each position).
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
    """

    weights: str = "int8"
    group_size: int = -1
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        if self.weights not in WEIGHTS:
            raise bad_value("weights", self.weights, "one of " + ", ".join(WEIGHTS))
        if isinstance(self.group_size, bool) or self.group_size < -1 or self.group_size == 1:
            raise bad_value("group_size", self.group_size, "-1, 0, or a whole number of at least 2")
        check_patterns("skip", self.skip)

    @property
    def scheme(self) -> Scheme:
        """What its layers look like; of groups that SDNQ chooses, the size is that of Linear layers."""
        bits, symmetric = int(self.weights[-1]), not self.weights.startswith("u")
        if self.group_size == -1:
            return Scheme(bits=bits, symmetric=symmetric)
        return Scheme("int", bits, "group", self.group_size or 4 * 2**bits, symmetric)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Quantizes the pipeline's denoiser in place; see :func:`quantize_weights`."""
    inputs = captured_inputs(pipeline)
    report = quantize_weights(denoiser(pipeline), config.weights, config.group_size, config.skip, inputs)
    return stage_report(report, config.scheme)


def quantize_weights(
    model: Any, weights: str = "int8", group_size: int = -1, skip: Sequence[str] = (), inputs: Inputs | None = None
) -> QuantizeReport:
    """Puts SDNQ's layers in the place of every Conv2d and Linear; ``save_pretrained`` then writes what diffusers loads.

    Args:
        model: A denoiser of diffusers with float weights; changed.
        weights: One of :data:`WEIGHTS`.
        group_size: See :class:`Config`.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: As :func:`compress.quantize.weights.apply.quantize_layers`. The denoiser is then unchanged.
    """
    from sdnq import SDNQConfig, SDNQQuantizer, sdnq_quantize_layer

    config = SDNQConfig(
        weights_dtype=weights,
        group_size=group_size,
        quant_conv=True,
        add_skip_keys=False,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
    )

    def to_sdnq(name: str, layer: Layer) -> None:
        made, _ = sdnq_quantize_layer(layer, config, param_name=f"{name}.weight")
        replace_layer(model, name, made)

    report = quantize_layers(model, to_sdnq, skip, inputs)
    config.modules_to_not_convert = [
        f"{name}.weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if getattr(module, "weight", None) is not None and not hasattr(module, "sdnq_dequantizer")
    ]
    model.hf_quantizer = SDNQQuantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config)
    return report


check = check_skip
