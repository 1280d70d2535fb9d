"""The error of the outputs of self-attention layers, each relative to the teacher's.

After Lee et al. 2023, KOALA, https://arxiv.org/abs/2312.04005, where these features matter most and errors are plain.
"""

import torch
from torch import Tensor

from compress.distill.losses import Seen, relative

ATTENTION = True


def loss(seen: Seen) -> Tensor:
    """Mean over self-attentions of each example's relative error, ``(b,)``."""
    return torch.stack([relative(mine, target) for mine, target in seen.attention.values()]).mean(0)
