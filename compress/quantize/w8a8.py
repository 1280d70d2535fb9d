"""int8 weights, and int8 inputs for the layers that cost the time: what integer arithmetic needs.

Weights as in :mod:`compress.quantize.int8`, inputs as in :mod:`compress.quantize.ranges.inputs`, or with levels that
are found at each call (:func:`compress.runtime.fake.round_at_call`), for which nothing is calibrated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import captured_inputs
from compress.models.quantized import DYNAMIC, Ranges, set_ranges
from compress.quantize.int8 import STAGE as INT8
from compress.quantize.int8 import quantize_weights
from compress.quantize.ranges.inputs import InputRanges, int8_inputs, sampled_ranges
from compress.quantize.ranges.smooth import check_norms, smooth_inputs
from compress.quantize.weights.apply import check_patterns, refuse_quantized, stage_report
from compress.quantize.weights.rounding import Rounded
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
    """Finds the ranges of inputs and quantizes the pipeline's denoiser in place.

    Raises:
        UserError: It is quantized already.
    """
    refuse_quantized(denoiser(pipeline))
    layers = int8_inputs(denoiser(pipeline), config.skip, config.float_inputs)
    smoothed = smooth_inputs(pipeline, layers, config, context)
    if config.activations == "dynamic":
        ranges = dict.fromkeys(layers, DYNAMIC)
    else:
        ranges = sampled_ranges(pipeline, layers, config, context)
    return store(pipeline, config, ranges, **smoothed)


def store(
    pipeline: "DiffusionPipeline",
    config: Config,
    ranges: Ranges,
    rounded: Mapping[str, Rounded] | None = None,
    **details: Any,
) -> StageReport:
    """Gives a pipeline's denoiser int8 weights and keeps the ranges of inputs, in place.

    Args:
        pipeline: The student's.
        config: Of the stage.
        ranges: Of inputs.
        rounded: Weights of layers that are rounded already, by name.
        details: For the report.
    """
    model = denoiser(pipeline)
    report = quantize_weights(model, config.skip, captured_inputs(pipeline), rounded)
    set_ranges(model, ranges)
    return stage_report(
        report,
        Scheme(activations=config.activations),
        ranges=config.ranges if config.activations == "static" else None,
        float_inputs=[name for name in report.modules if name not in ranges],
        int8_inputs=len(ranges),
        **details,
    )


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and smoothing without norms for it; every layer keeps its shape.

    Raises:
        UserError: See :func:`compress.quantize.ranges.inputs.int8_inputs`; or nothing can be smoothed.
    """
    check_norms(denoiser, config)
    int8_inputs(denoiser, config.skip, config.float_inputs)
    return denoiser
