"""Quantization-aware training with int8 weights and int8 inputs, into the checkpoint of :mod:`compress.quantize.w8a8`.

The training is that of :mod:`compress.quantize.qat`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from compress.distill import features
from compress.errors import bad_value
from compress.models import denoiser
from compress.models.inputs import captured_inputs
from compress.models.quantized import set_ranges
from compress.quantize import w8a8
from compress.quantize.int8 import quantize_weights
from compress.quantize.qat import train
from compress.quantize.ranges.inputs import int8_inputs
from compress.quantize.weights.apply import choose_layers, stage_report
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = replace(w8a8.STAGE, distributed=True)


@dataclass(frozen=True)
class Config(w8a8.Config, features.Config):
    """Keys of the stage: those of :mod:`compress.quantize.w8a8` and of :mod:`compress.distill.features`.

    Attributes:
        learning_rate: AdamW's peak, above 0; lower than the distillation's, for a student that is trained already.
    """

    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        w8a8.Config.__post_init__(self)
        features.Config.__post_init__(self)
        if self.activations == "dynamic":
            raise bad_value("activations", self.activations, "static: the ranges of inputs are trained")


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains the pipeline's denoiser in place and stores its weights; called in every process of the run.

    Raises:
        UserError: See :func:`compress.quantize.qat.train`.
    """
    model, scheme = denoiser(pipeline), Scheme(activations="static")
    chosen, skipped = choose_layers(model, config.skip)
    schemes = {name: scheme for name in chosen if name not in skipped}
    layers = int8_inputs(model, config.skip, config.float_inputs)
    rounded, ranges, trained = train(pipeline, schemes, layers, config, context)
    report = quantize_weights(model, config.skip, captured_inputs(pipeline), rounded)
    set_ranges(model, ranges)
    floats = [name for name in report.modules if name not in ranges]
    details = {"ranges": config.ranges, "float_inputs": floats, "int8_inputs": len(ranges)}
    return replace(stage_report(report, scheme, **trained.details, **details), curves=trained.curves)


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and a student that cannot follow its teacher.

    Raises:
        UserError: See :func:`compress.quantize.w8a8.check` and :func:`compress.distill.features.check`.
    """
    return features.check(config, w8a8.check(config, denoiser, outline), outline)


check_teacher = features.check_teacher
