"""Zeros that a stage before made, and that training leaves alone."""

from collections.abc import Iterable

from torch import nn

from compress.errors import UserError


class Zeros:
    """Those weights of a student's Conv2d and Linear that are zero now and have to stay so.

    Their gradients are masked before anything looks at them. So AdamW's moments of them stay zero, and with them its
    steps; decay multiplies and averaging mixes zeros. Whatever was renamed or narrowed since they were made, the
    weights themselves tell where they are.

    Args:
        modules: The student's, in the dtype and memory format that they are trained in; none: no zeros are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = (module for module in modules if isinstance(module, (nn.Conv2d, nn.Linear)))
        every = ((layer.weight, layer.weight.detach() != 0) for layer in layers)
        self._masks = [(weight, mask) for weight, mask in every if not mask.all()]

    def mask_gradients(self) -> None:
        """Sets the gradients of these weights to zero."""
        for weight, mask in self._masks:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def check(self) -> None:
        """Checks that they are still zero, as they might not be in a training state of another student.

        Raises:
            UserError: They are not.
        """
        if any(weight.detach().masked_select(~mask).any() for weight, mask in self._masks):
            raise UserError(
                "the training state belongs to a student without these zeros; give this training a folder of its own"
            )

    def count(self) -> int:
        """How many weights are zero, by the weights as they are."""
        return sum(weight.numel() - int(weight.count_nonzero()) for weight, _ in self._masks)
