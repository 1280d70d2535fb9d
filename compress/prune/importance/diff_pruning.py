"""Importance ``diff_pruning``: Taylor on the diffusion loss, without the timesteps of small loss.

Fang et al. 2023, "Structural Pruning for Diffusion Models", arXiv:2305.10924: gradients of one batch are summed from
the first timestep on, until the loss falls below a share of the largest loss so far.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value
from compress.prune.importance.combine import check_combine
from compress.prune.importance.taylor import check_per

if TYPE_CHECKING:
    from compress.data.calibration import Calibration
    from compress.prune.importance.score import Scorer

CALIBRATED = True
COMPARABLE = True


@dataclass(frozen=True)
class Config:
    """Which timesteps are used.

    Attributes:
        name: ``"diff_pruning"``.
        threshold: Stop where the mean loss is below this share of the largest so far, in [0, 1); 0: never stop.
        timesteps: Maximum number of timesteps, evenly spaced from 0, at least 1. They replace the calibration's.
        per: See :class:`compress.prune.importance.taylor.Config`.
        combine: See :func:`compress.prune.importance.score.score`.
    """

    name: str = "diff_pruning"
    threshold: float = 0.05
    timesteps: int = 100
    per: str = "weight"
    combine: str = "outgoing"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if not 0 <= self.threshold < 1:
            raise bad_value("threshold", self.threshold, "a number in [0, 1)")
        if self.timesteps < 1:
            raise bad_value("timesteps", self.timesteps, "a whole number of at least 1")
        check_per(self.per)
        check_combine(self.combine)


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Scores from the sum of the gradients at all used timesteps, for one batch of the examples."""
    import torch

    from compress.data.calibration import differentiable
    from compress.prune.importance.taylor import product_scorer, products
    from compress.system.progress import track

    assert calibration is not None
    total = calibration.schedule.steps
    steps = [index * total // config.timesteps for index in range(min(config.timesteps, total))]
    part = next(calibration.parts())
    pieces = [piece for piece in calibration.gradient_parts() if piece.start < part.stop]
    largest = 0.0

    def loss(piece: slice, times: "torch.Tensor") -> "torch.Tensor":
        return calibration.losses(model, piece, times[piece]).sum() / part.stop

    with differentiable(calibration.denoiser) as model:
        for step in track(steps, "gradients, timestep by timestep"):
            times = torch.full((part.stop,), step, device=calibration.latents.device)
            with torch.set_grad_enabled(len(pieces) == 1):
                whole = torch.stack([loss(piece, times) for piece in pieces]).sum()
            value = float(whole.detach())
            largest = max(largest, value)
            if value < config.threshold * largest:
                break
            for piece in pieces:
                (whole if len(pieces) == 1 else loss(piece, times)).backward()
        return product_scorer(products(model), config.per, config.combine)
