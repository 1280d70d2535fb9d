"""The error of the student's features relative to the teacher's (after Kim et al. 2023, BK-SDM, equation 3)."""

import torch
from torch import Tensor

from compress.distill.losses import Seen, mean

FEATURES = True


def loss(seen: Seen) -> Tensor:
    """Mean over blocks of each example's relative error, ``(b,)``.

    A block's error is its mean squared error over the mean square of the teacher's feature: 1 for features of zero, at
    every scale and timestep.
    """
    errors = []
    for mine, target in seen.features.values():
        scale = mean(target.pow(2)).clamp(min=1e-8)
        errors.append(mean((mine.float() - target).pow(2)) / scale)
    return torch.stack(errors).mean(0)
