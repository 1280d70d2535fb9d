"""The error of block features, each relative to the teacher's, so that no block outweighs the others.

The features are those of BK-SDM; LAPTOP-Diff (Zhang et al. 2024, https://arxiv.org/abs/2404.11098) weights their errors
by the norms of the teacher's, here of each example's.
"""

import torch
from torch import Tensor

from compress.distill.losses import Seen, relative

FEATURES = True


def loss(seen: Seen) -> Tensor:
    """Mean over blocks of each example's relative error, ``(b,)``."""
    return torch.stack([relative(mine, target) for mine, target in seen.features.values()]).mean(0)
