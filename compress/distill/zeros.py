"""Keeps the zero weights of earlier stages during training."""

from collections.abc import Iterable

import torch
from torch import nn

from compress.errors import UserError


class Zeros:
    """The zero weights of a student's Conv2d and Linear, which stay zero.

    Their gradients are masked first. So AdamW's moments and steps stay zero, and weight decay and averaging keep zeros.
    Muon moves every weight of a matrix, so they are set to zero again after each step. The weights themselves mark the
    zeros, so renamed or narrowed layers need no record.

    Args:
        modules: The student's, in the dtype and memory format of the training; empty: no zeros are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = (module for module in modules if isinstance(module, (nn.Conv2d, nn.Linear)))
        every = ((layer.weight, layer.weight.detach() != 0) for layer in layers)
        self._masks = [(weight, mask) for weight, mask in every if not mask.all()]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._masks)

    def mask_gradients(self) -> None:
        """Sets their gradients to zero."""
        for weight, mask in self._masks:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def restore(self) -> None:
        """Sets the weights to zero again."""
        for weight, mask in self._masks:
            weight.mul_(mask)

    def check(self) -> None:
        """Checks that they are still zero.

        Raises:
            UserError: They are not, as with a training state of another student.
        """
        if any(weight.detach().masked_select(~mask).any() for weight, mask in self._masks):
            raise UserError(
                "the training state belongs to a student without these zeros; use another folder for this training"
            )

    def count(self) -> int:
        """Number of weights that are zero now."""
        return sum(weight.numel() - int(weight.count_nonzero()) for weight, _ in self._masks)
