"""Conv2d and Linear weights in 8, 4 or 2 bits by optimum-quanto (https://github.com/huggingface/optimum-quanto).

int8 and fp8 (e4m3): one symmetric scale per output channel, the largest magnitude over the largest level. int4 and
int2: a scale and a shift for each group of up to 128 neighbors within an output channel. Float activations.

Its own files would come up with random weights in diffusers after a mere warning. These do not: see
:mod:`compress.models.quanto_layers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

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
    libraries=("optimum-quanto",),
    extra="quanto",
    tag="quantized",
    imports=("compress",),
    usage="Say `import compress` before it is loaded: diffusers alone knows no convolutions of optimum-quanto, and "
    "refuses the denoiser.",
    limits=("Its weights are decoded at every call: they save memory and disk, and no time.",),
)

SCHEMES = {
    "int8": Scheme(),
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(bits=4, granularity="group", group_size=128, symmetric=False),
    "int2": Scheme(bits=2, granularity="group", group_size=128, symmetric=False),
}
"""By the key ``weights``. Groups divide a channel evenly, so some are smaller; one that fits none is a group itself."""


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        weights: Format of a weight: ``int8``, ``fp8``, ``int4`` or ``int2``.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
    """

    weights: str = "int8"
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
    model = denoiser(pipeline)
    report = quantize_weights(model, config.weights, config.skip, captured_inputs(pipeline))
    return stage_report(report, SCHEMES[config.weights])


def quantize_weights(
    model: nn.Module, weights: str = "int8", skip: Sequence[str] = (), inputs: Inputs | None = None
) -> QuantizeReport:
    """Puts optimum-quanto's layers in the place of every Conv2d and Linear.

    Args:
        model: A denoiser of diffusers with float weights; changed.
        weights: ``int8``, ``fp8``, ``int4`` or ``int2``.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: As :func:`compress.quantize.weights.apply.quantize_layers`. The denoiser is then unchanged.
    """
    from compress.models.quanto_layers import quanto_layer, tell_diffusers

    def to_quanto(name: str, layer: Layer) -> None:
        replace_layer(model, name, quanto_layer(layer, weights))

    report = quantize_layers(model, to_quanto, skip, inputs)
    tell_diffusers(model, weights, report.modules)
    return report


check = check_skip
