"""Method ``dmd``: distribution matching, after which the student draws in 1 to 4 steps without guidance.

Yin et al. 2024, "Improved Distribution Matching Distillation" (DMD2), https://arxiv.org/abs/2405.14867: no pairs of
noise and image, and a student that learns at the points which its own steps lead to. A second denoiser learns what the
student draws. Left out are the discriminator and the further steps of the second denoiser for one of the student. It
starts best from a student that draws already, such as one of :mod:`compress.distill.lcm`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.distill import few
from compress.distill.few import FewStepConfig
from compress.distill.training import check_value, refuse_unused
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STAGE = Stage(version=2, distributed=True, by_names=True, few_steps=True, tag="dmd", usage=few.USAGE)


@dataclass(frozen=True)
class Config(FewStepConfig):
    """Keys of :class:`compress.distill.few.FewStepConfig`; one guidance scale alone."""

    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        super().__post_init__()
        refuse_unused(self, "compile")
        check_value(self, "guidance", self.guidance[0] == self.guidance[1], "one scale alone, such as [4, 4]")


check, check_teacher = few.check, few.check_teacher


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains ``pipeline``'s denoiser and gives the pipeline the scheduler that it then draws with.

    Raises:
        UserError: See :func:`compress.distill.few.train`.
    """
    from compress.distill.matching import Matching

    steps = config.inference_steps
    return few.train(pipeline, config, context, Matching, steps, "distribution matching", more=steps)
