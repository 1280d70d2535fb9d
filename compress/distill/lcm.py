"""Method ``lcm``: latent consistency distillation, after which the student draws in 1 to 8 steps without guidance.

Luo et al. 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378, algorithm 1. From any point of the
teacher's guided path the student predicts its clean end: what it predicts for a noisier point is brought to what its
average predicts for the point that one DDIM step of the teacher leads to.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from compress.distill import few
from compress.distill.few import FewStepConfig
from compress.distill.training import check_value
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STAGE = Stage(version=2, distributed=True, by_names=True, few_steps=True, tag="lcm", usage=few.USAGE)
LOSSES = ("huber", "l2")


@dataclass(frozen=True)
class Config(FewStepConfig):
    """Keys of :class:`compress.distill.few.FewStepConfig`, and how the student is brought to its average.

    Attributes:
        loss: ``huber`` (pseudo-Huber, Song & Dhariwal 2023), or ``l2``.
        huber_c: Where the Huber loss turns from a square to an absolute value, above 0.
        target_decay: Of the average that gives the target, in [0, 1); 0: the student itself, without a copy.
    """

    loss: str = "huber"
    huber_c: float = 0.001
    target_decay: float = 0.95

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        super().__post_init__()
        check_value(self, "loss", self.loss in LOSSES, " or ".join(LOSSES))
        check_value(self, "huber_c", 0 < self.huber_c < math.inf, "a number above 0")
        check_value(self, "target_decay", 0 <= self.target_decay < 1, "a number in [0, 1)")


check, check_teacher = few.check, few.check_teacher


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains ``pipeline``'s denoiser and gives the pipeline the scheduler that it then draws with.

    Raises:
        UserError: See :func:`compress.distill.few.train`.
    """
    from compress.distill.consistency import Consistency, loss

    error = partial(loss, kind=config.loss, huber_c=config.huber_c)
    make = partial(Consistency, error=error, decay=config.target_decay)
    return few.train(pipeline, config, context, make, config.solver_steps, "consistency")
