"""The error of a changed denoiser's prediction relative to the unchanged denoiser's."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.calibration import Calibration


MOST = 200.0
"""Maximum PSNR in dB, also for identical predictions."""


@dataclass(frozen=True)
class Error:
    """Error of the prediction over all examples, each at its timestep.

    Attributes:
        relative: Root mean square error over the root mean square of the unchanged prediction.
        psnr: In dB, at most :data:`MOST`; the peak is the range of the unchanged prediction.
    """

    relative: float
    psnr: float


class UnchangedPrediction:
    """The predictions of the unchanged denoiser.

    Args:
        calibration: The denoiser and its examples.
    """

    def __init__(self, calibration: "Calibration") -> None:
        self.calibration = calibration
        self.predictions = self._predict(calibration.denoiser)
        self.range = float(max(p.max() for p in self.predictions) - min(p.min() for p in self.predictions))
        self.square = _mean_square(self.predictions)

    def error(self, denoiser: "nn.Module") -> Error:
        """Error of a changed denoiser with the same inputs."""
        found = self._predict(denoiser)
        mean = _mean_square([ours - theirs for ours, theirs in zip(found, self.predictions, strict=True)])
        psnr = 10 * math.log10(self.range**2 / mean) if mean else MOST
        return Error(math.sqrt(mean / self.square), min(psnr, MOST))

    @torch.no_grad()
    def _predict(self, denoiser: "nn.Module") -> "list[Tensor]":
        training = denoiser.training
        denoiser.eval()
        try:
            parts = self.calibration.parts()
            return [self.calibration.predict(denoiser, part).float() for part in parts]
        finally:
            denoiser.train(training)


def _mean_square(parts: "list[Tensor]") -> float:
    return sum(float(part.double().square().sum()) for part in parts) / sum(part.numel() for part in parts)
