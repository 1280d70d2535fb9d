"""The difference of predicted pictures in the features and pixels of the teacher's decoder.

After Berrada et al. 2024, "Boosting Latent Diffusion with Perceptual Objectives", https://arxiv.org/abs/2411.04873.
Here the target is the teacher's prediction, not the data; errors are relative by block, not standardized by channel.
It needs no other network, but decodes in every step, which costs time and memory.
"""

import torch
from torch import Tensor

from compress.distill.losses import Seen, relative

TEACHER = True
DECODER = True

MOST_NOISE = 3.0
"""Largest noise over signal at which the predicted clean latents look like a picture."""


def loss(seen: Seen) -> Tensor:
    """Mean relative error over the decoder's blocks and the picture, ``(b,)``; 0 for examples with more noise."""
    assert seen.teacher is not None and seen.sigma is not None and seen.clean is not None and seen.decode is not None
    found = 0 * seen.output.flatten(1).sum(1)  # has a gradient even if all examples have more noise
    chosen = (seen.sigma <= MOST_NOISE).nonzero()[:, 0]
    if not len(chosen):
        return found
    ours = seen.decode(seen.clean(seen.output)[chosen])
    with torch.no_grad():
        theirs = seen.decode(seen.clean(seen.teacher)[chosen])
    errors = [relative(mine, target.float()) for mine, target in zip(ours, theirs, strict=True)]
    return found.index_add(0, chosen, torch.stack(errors).mean(0))
