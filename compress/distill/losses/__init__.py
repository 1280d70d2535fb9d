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
        attention: The same for outputs of self-attentions.
        sigma: Noise over signal in the noisy latents, ``(b,)``.
        clean: From a prediction to the clean latents that it implies, ``(b, ...)``.
        decode: From clean latents ``(b, ...)`` to the outputs of the blocks of the teacher's decoder and the picture in
            [-1, 1], each ``(b, c, h, w)``.
    """

    output: Tensor
    target: Tensor
    teacher: Tensor | None
    weight: Tensor
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attention: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sigma: Tensor | None = None
    clean: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], list[Tensor]] | None = None


@dataclass(frozen=True)
class Loss:
    """A loss with its weight.

    Attributes:
        name: As in the config.
        weight: Above 0.
        function: From :class:`Seen` to the loss of each example, ``(b,)``.
        teacher: Whether it uses the teacher's prediction.
        features: Whether it uses features.
        attention: Whether it uses outputs of self-attentions.
        decoder: Whether it uses the teacher's decoder.
        curve: Name of its curve.
    """

    name: str
    weight: float
    function: Callable[[Seen], Tensor]
    teacher: bool
    features: bool
    attention: bool
    decoder: bool
    curve: str


def load_losses(weights: Mapping[str, float]) -> list[Loss]:
    """The losses; ``TEACHER``, ``FEATURES``, ``ATTENTION`` and ``DECODER`` in a file declare what its function uses.

    Raises:
        UserError: Unknown loss.
    """
    found = []
    last = {name: name.rpartition(".")[2] for name in weights}
    for name, weight in weights.items():
        module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
        if not hasattr(module, "loss"):
            raise UserError(f"losses.{name}: {module.__name__} has no function loss(seen)")
        needs = {key: getattr(module, key.upper(), False) for key in ("teacher", "features", "attention", "decoder")}
        curve = f"{name if list(last.values()).count(last[name]) > 1 else last[name]}_loss"
        found.append(Loss(name, weight, module.loss, curve=curve, **needs))
    return found


def mean(error: Tensor) -> Tensor:
    """Mean over all but the first axis, ``(b,)``."""
    return error.mean(tuple(range(1, error.ndim)))


def relative(mine: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's mean square, ``(b,)``: 1 for features of zero, at every scale."""
    return mean((mine.float() - target).pow(2)) / mean(target.pow(2)).clamp(min=1e-8)
