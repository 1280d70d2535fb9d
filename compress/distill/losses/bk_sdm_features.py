"""The plain error of block features (Kim et al. 2023, BK-SDM, equation 3), in which large features count most."""

import torch
from torch import Tensor

from compress.distill.losses import Seen, mean

FEATURES = True


def loss(seen: Seen) -> Tensor:
    """Sum over blocks of each example's mean squared error, ``(b,)``."""
    return torch.stack([mean((mine.float() - target).pow(2)) for mine, target in seen.features.values()]).sum(0)
