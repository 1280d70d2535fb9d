"""The diffusion loss: the error to the true noise, velocity or sample."""

from torch import Tensor

from compress.distill.losses import Seen, mean


def loss(seen: Seen) -> Tensor:
    """The weighted mean squared error of each example, ``(b,)``."""
    return mean((seen.output - seen.target).pow(2)) * seen.weight
