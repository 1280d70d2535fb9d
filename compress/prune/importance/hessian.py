"""Importance ``hessian``: the rise of the diffusion loss, to second order.

Optimal brain damage (LeCun et al. 1989), with the Hessian's diagonal approximated by that of the empirical Fisher
matrix, as in torch-pruning.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.prune.importance.combine import Combined

if TYPE_CHECKING:
    import torch

    from compress.data.calibration import Calibration
    from compress.prune.importance.score import Scorer

CALIBRATED = True
COMPARABLE = True


@dataclass(frozen=True)
class Config(Combined):
    """Squared weights times mean squared gradients."""

    name: str = "hessian"


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Scores from gradients of single examples, with one backward pass per example."""
    from compress.data.calibration import differentiable
    from compress.prune.importance.taylor import product_scorer
    from compress.system.progress import track

    assert calibration is not None
    squares: dict[str, torch.Tensor] = {}
    with differentiable(calibration.denoiser) as model:
        for part in track(list(calibration.parts(1)), "gradients of single examples"):
            calibration.losses(model, part).sum().backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    square = parameter.grad.square_().div_(len(calibration.latents))
                    squares[name] = squares[name].add_(square) if name in squares else square
                    parameter.grad = None
        for name, parameter in model.named_parameters():
            if name in squares:
                squares[name].mul_(parameter.detach().square())
    return product_scorer(squares, "weight", config.combine)
