"""int8 weights, and int8 inputs for the layers that cost the time: what integer arithmetic needs.

Weights as in :mod:`compress.quantize.int8`, inputs as in :mod:`compress.quantize.ranges.inputs`, or with levels that
are found at each call (:func:`compress.runtime.fake.round_at_call`), for which nothing is calibrated.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import captured_inputs
from compress.models.quantized import DYNAMIC, set_ranges
from compress.quantize.int8 import STAGE as INT8
from compress.quantize.int8 import quantize_weights
from compress.quantize.ranges.inputs import InputRanges, int8_inputs, sampled_ranges
from compress.quantize.ranges.smooth import check_norms, smooth_inputs
from compress.quantize.weights.apply import check_patterns, stage_report
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = replace(
    INT8,
    usage=INT8.usage + " Stock diffusers computes with float activations; "
    "`compress.accelerate(pipeline)` computes in int8, with the ranges in `activation_ranges.safetensors`.",
    limits=("Without an engine that computes in int8 it saves memory and disk, and no time.",),
)


@dataclass(frozen=True)
class Config(InputRanges):
    """Keys of the stage.

    Attributes:
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        activations: ``static``, or ``dynamic``: the levels of an input are found at each call.
    """

    skip: list[str] = field(default_factory=list)
    activations: str = "static"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        super().__post_init__()
        check_patterns("skip", self.skip)
        if self.activations not in ("static", "dynamic"):
            raise bad_value("activations", self.activations, "static or dynamic")


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Finds the ranges of inputs and quantizes the pipeline's denoiser in place."""
    model = denoiser(pipeline)
    layers = int8_inputs(model, config.skip, config.float_inputs)
    smoothed = smooth_inputs(pipeline, layers, config, context)
    dynamic = config.activations == "dynamic"
    ranges = dict.fromkeys(layers, DYNAMIC) if dynamic else sampled_ranges(pipeline, layers, config, context)
    report = quantize_weights(model, config.skip, captured_inputs(pipeline))
    set_ranges(model, ranges)
    return stage_report(
        report,
        Scheme(activations=config.activations),
        ranges=None if dynamic else config.ranges,
        float_inputs=[name for name in report.modules if name not in ranges],
        int8_inputs=len(ranges),
        **smoothed,
    )


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and smoothing without norms for it; every layer keeps its shape.

    Raises:
        UserError: See :func:`compress.quantize.ranges.inputs.int8_inputs`; or nothing can be smoothed.
    """
    check_norms(denoiser, config)
    int8_inputs(denoiser, config.skip, config.float_inputs)
    return denoiser
