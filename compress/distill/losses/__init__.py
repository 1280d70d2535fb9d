"""Losses of a distillation: one file each, with one function ``loss(seen)``.

The name of the file is the name of the loss in ``stages.distill.losses``, where its weight stands. A loss of
one's own is named by its module, such as ``my_package.my_loss``.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress.errors import UserError


@dataclass(frozen=True)
class Seen:
    """What a loss compares, for a batch of b examples.

    Attributes:
        output: The student's prediction, ``(b, ...)``.
        target: What a perfect denoiser predicts, of the same shape.
        teacher: The teacher's prediction, of the same shape.
        weight: Of each example by its timestep, ``(b,)``.
        features: Block to the student's features and what they should be, of one shape ``(b, ...)``.
    """

    output: Tensor
    target: Tensor
    teacher: Tensor | None
    weight: Tensor
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A loss with its weight.

    Attributes:
        name: As in the config.
        weight: Above 0.
        function: From :class:`Seen` to the loss of each example, ``(b,)``.
        teacher: Whether it looks at the teacher's prediction.
        features: Whether it looks at features.
    """

    name: str
    weight: float
    function: Callable[[Seen], Tensor]
    teacher: bool
    features: bool

    @property
    def curve(self) -> str:
        """What its curve is called."""
        return f"{self.name.rpartition('.')[2]}_loss"


def load_losses(weights: Mapping[str, float]) -> list[Loss]:
    """The losses of some names; a file says with ``TEACHER`` and ``FEATURES`` what its function looks at.

    Raises:
        UserError: There is no such loss.
    """
    found = []
    for name, weight in weights.items():
        module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
        if not hasattr(module, "loss"):
            raise UserError(f"losses.{name}: {module.__name__} has no function loss(seen)")
        needs = (getattr(module, key, False) for key in ("TEACHER", "FEATURES"))
        found.append(Loss(name, weight, module.loss, *needs))
    return found


def mean(error: Tensor) -> Tensor:
    """The mean over all but the first axis, ``(b,)``."""
    return error.mean(tuple(range(1, error.ndim)))
