"""How often a training draws each timestep, and how much it weighs there."""

import torch
from torch import Tensor

from compress.models.schedule import Schedule


def density_and_weights(schedule: Schedule, sampling: str, gamma: float | None) -> tuple[Tensor | None, Tensor]:
    """Of every timestep of a schedule.

    Args:
        schedule: Of the noise.
        sampling: ``uniform``, ``weighted`` or ``logit_normal``, see :class:`compress.distill.features.Config`.
        gamma: Of min-SNR weights; None: equal weights.

    Returns:
        The density, ``(timesteps,)`` in any unit, None if all are alike; and the weights, ``(timesteps,)``.
    """
    weights = schedule.weight(torch.arange(schedule.steps), gamma).float()
    if sampling == "weighted":  # the mean over the drawn timesteps is the weighted mean over all
        return weights, weights.mean().expand(schedule.steps)
    if sampling == "logit_normal":
        place = (torch.arange(schedule.steps) + 0.5) / schedule.steps
        return (-place.logit().square() / 2).exp() / (place * (1 - place)), weights
    return None, weights
