"""Quantization-aware training with int8 weights and int8 inputs, into the checkpoint of :mod:`compress.quantize.w8a8`.

The training is that of :mod:`compress.quantize.qat`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from compress.distill import features
from compress.distill.training import refuse_unused
from compress.errors import bad_value
from compress.models import denoiser
from compress.quantize import w8a8
from compress.quantize.qat import train
from compress.quantize.ranges.inputs import int8_inputs
from compress.quantize.weights.apply import choose_layers
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = replace(w8a8.STAGE, distributed=True, any_steps=True)


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
        refuse_unused(self, "compile")  # with rounded weights it learns something else
        if self.lora.rank:
            raise bad_value("lora.rank", self.lora.rank, "0: adapters would train in float beside the rounded weights")
        if self.activations == "dynamic":
            raise bad_value("activations", self.activations, "static: the ranges of inputs are trained")


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains the pipeline's denoiser in place and stores its weights; called in every process of the run.

    Raises:
        UserError: See :func:`compress.quantize.qat.train`.
    """
    model = denoiser(pipeline)
    chosen, skipped = choose_layers(model, config.skip)
    schemes = {name: Scheme() for name in chosen if name not in skipped}
    layers = int8_inputs(model, config.skip, config.float_inputs)
    rounded, ranges, trained = train(pipeline, schemes, layers, config, context)
    return replace(w8a8.store(pipeline, config, ranges, rounded, **trained.details), curves=trained.curves)


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and a student that cannot follow its teacher.

    Raises:
        UserError: See :func:`compress.quantize.w8a8.check` and :func:`compress.distill.features.check`.
    """
    return features.check(config, w8a8.check(config, denoiser, outline), outline)


check_teacher = features.check_teacher
