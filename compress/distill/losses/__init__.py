"""Losses of a distillation: one file each, with one function ``loss(seen)``.

The file name is the loss's name in ``stages.distill.losses``, which sets its weight. Your own loss is named by its
module, such as ``my_package.my_loss``.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress.errors import UserError


@dataclass(frozen=True)
class Seen:
    """The inputs of a loss, for a batch of b examples.

    Attributes:
        output: The student's prediction, ``(b, ...)``.
        target: The prediction of a perfect denoiser, same shape.
        teacher: The teacher's prediction, same shape.
        weight: Of each example by its timestep, ``(b,)``.
        features: Block to the student's features and their targets, of one shape ``(b, ...)``.
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
        teacher: Whether it uses the teacher's prediction.
        features: Whether it uses features.
    """

    name: str
    weight: float
    function: Callable[[Seen], Tensor]
    teacher: bool
    features: bool

    @property
    def curve(self) -> str:
        """Name of its curve."""
        return f"{self.name.rpartition('.')[2]}_loss"


def load_losses(weights: Mapping[str, float]) -> list[Loss]:
    """The losses with a weight above 0; ``TEACHER`` and ``FEATURES`` in a file declare what its function uses.

    Raises:
        UserError: Unknown loss.
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
    """Mean over all but the first axis, ``(b,)``."""
    return error.mean(tuple(range(1, error.ndim)))
