"""Quantization-aware training: the denoiser is trained with rounded weights and inputs, then packed as it was trained.

The training is that of :mod:`compress.distill.features`: noise, output and feature losses against the teacher. The
rounding is that of :mod:`compress.quantize.weights.fake`, and the checkpoint that of :mod:`compress.quantize.packed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.distill import features
from compress.distill.training import refuse_unused
from compress.errors import bad_value
from compress.models import denoiser
from compress.models.quantized import Ranges
from compress.quantize import packed
from compress.quantize.ranges.inputs import InputRanges, int8_inputs, sampled_ranges
from compress.quantize.ranges.smooth import smooth_inputs
from compress.quantize.weights.apply import refuse_quantized
from compress.quantize.weights.fake import fake_quantized, rounded_layers
from compress.quantize.weights.rounding import Rounded
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = replace(packed.STAGE, distributed=True, any_steps=True)


@dataclass(frozen=True)
class Config(packed.Config, features.Config):
    """Keys of the stage: those of :mod:`compress.quantize.packed` and of :mod:`compress.distill.features`.

    Attributes:
        learning_rate: AdamW's peak, above 0; lower than the distillation's, for a student that is trained already.
    """

    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        packed.Config.__post_init__(self)
        features.Config.__post_init__(self)
        refuse_unused(self, "compile")  # with rounded weights it learns something else
        if self.lora.rank:
            raise bad_value("lora.rank", self.lora.rank, "0: adapters would train in float beside the rounded weights")
        if self.rounding != "nearest":
            raise bad_value("rounding", self.rounding, "nearest: the training moves the weights")
        if self.activations == "dynamic":
            raise bad_value("activations", self.activations, "none or static: the ranges of inputs are trained")


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains the pipeline's denoiser in place and packs its weights; called in every process of the run.

    Raises:
        UserError: See :func:`compress.distill.features.run`; or the denoiser is quantized already.
    """
    model = denoiser(pipeline)
    packed.parts_of(pipeline, config)
    schemes = packed.choose_schemes(model, config)
    layers = int8_inputs(model, config.skip, config.float_inputs) if config.activations == "static" else {}
    rounded, ranges, trained = train(pipeline, schemes, layers, config, context, config.search)
    found = packed.store(pipeline, schemes, config, ranges, rounded, **trained.details)
    return replace(found, curves=trained.curves)


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and a student that cannot follow its teacher.

    Raises:
        UserError: See :func:`compress.quantize.packed.check` and :func:`compress.distill.features.check`.
    """
    return features.check(config, packed.check(config, denoiser, outline), outline)


check_teacher = features.check_teacher


def train(
    pipeline: "DiffusionPipeline",
    schemes: Mapping[str, Scheme],
    layers: Mapping[str, nn.Module],
    config: features.Config,
    context: StageContext,
    search: str = "mse",
) -> tuple[dict[str, Rounded], Ranges, StageReport]:
    """Trains a pipeline's denoiser, in place, with the rounding of some layers.

    Args:
        pipeline: The student's; its weights are float before and after.
        schemes: Name of a Conv2d or Linear to the scheme of its weight.
        layers: Those with int8 inputs, by name. Their ranges begin with those of sampled images and are then trained.
        config: With :class:`compress.quantize.ranges.inputs.InputRanges`, if there are such layers.
        context: Of the stage.
        search: How scales are found.

    Returns:
        The rounded averaged weights, the ranges of inputs, and the report of the training.

    Raises:
        UserError: The weights are quantized already, or see :func:`compress.distill.features.run`.
    """
    model = denoiser(pipeline)
    refuse_quantized(model)
    ranges: Ranges = {}
    if layers:
        assert isinstance(config, InputRanges)
        smooth_inputs(pipeline, layers, config, context)
        ranges = sampled_ranges(pipeline, layers, config, context)
    if model.dtype != torch.float32 and config.mixed_precision == "no":
        config = replace(config, mixed_precision="auto")  # as in a distillation, which sees float32 here
    with fake_quantized(model, schemes, ranges, search):
        report = features.run(pipeline, config, context)
        rounded, ranges = rounded_layers(model)
    return rounded, ranges, report
