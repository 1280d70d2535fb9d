"""The error to the teacher's prediction (Kim et al. 2023, BK-SDM, equation 2)."""

from torch import Tensor

from compress.distill.losses import Seen, mean

TEACHER = True


def loss(seen: Seen) -> Tensor:
    """The weighted mean squared error of each example, ``(b,)``."""
    assert seen.teacher is not None
    return mean((seen.output - seen.teacher).pow(2)) * seen.weight
