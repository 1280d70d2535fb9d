"""Whether and how the layers that channel pruning leaves are fitted."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from compress.data.calibration import CalibrationConfig
from compress.errors import bad_value

if TYPE_CHECKING:
    from torch import nn

    from compress.data.calibration import Calibration

Report = TypeVar("Report")


@dataclass(frozen=True)
class ReconstructConfig:
    """How the remaining layers are fitted; see :mod:`compress.prune.channels.reconstruct`.

    Attributes:
        examples: Number of training images with captions, at least 16, which pass the pruned denoiser at once; 0: none,
            and no layer is fitted.
        places: Number of pixels or tokens, over all examples, at which a layer is fitted, at least 1000; they take
            four bytes for each output of every layer.
        ridge: Penalty on the change of the weights, as a share of the mean square of the inputs, above 0.
        prompt_dropout: Share of the examples with the empty prompt, in [0, 1].
    """

    examples: int = 0
    places: int = 16384
    ridge: float = 1e-3
    prompt_dropout: float = 0.2

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.examples != 0 and self.examples < 16:
            raise bad_value("examples", self.examples, "a whole number of at least 16, or 0")
        if self.places < 1000:
            raise bad_value("places", self.places, "a whole number of at least 1000")
        if not 0 < self.ridge < math.inf:
            raise bad_value("ridge", self.ridge, "a number above 0")
        if not 0 <= self.prompt_dropout <= 1:
            raise bad_value("prompt_dropout", self.prompt_dropout, "a number in [0, 1]")

    def of(self, calibration: CalibrationConfig) -> CalibrationConfig:
        """The examples to fit to, in other respects as those of the calibration."""
        return replace(calibration, examples=self.examples, prompt_dropout=self.prompt_dropout)


def reconstructed(unet: "nn.Module", report: Report, config: ReconstructConfig, calibration: "Calibration") -> Report:
    """A pruning's report with layers that are fitted, in place; the same report if the config does not ask for it.

    Args:
        unet: Before it was pruned.
        report: With ``unet``, ``outputs`` and ``scales``, see :class:`compress.prune.channels.report.PruneReport`.
        config: See :class:`ReconstructConfig`.
        calibration: Its examples.
    """
    if not config.examples:
        return report
    from compress.prune.channels.reconstruct import reconstruct

    found: Any = report
    errors = reconstruct(unet, found.unet, found.outputs, found.scales, calibration, config.places, config.ridge)
    return replace(found, reconstructed=errors)
