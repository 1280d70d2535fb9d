"""Selects weights to set to zero: those of least magnitude, of all or within groups of neighbors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HALF = 16  # bits of a float32 that one pass over the weights decides


def smallest(weights: "Sequence[Tensor]", count: int) -> "list[Tensor]":
    """Masks that are true at the ``count`` weights of least magnitude in all tensors together.

    Ties go to the earlier tensor, then to the earlier place in memory. Needs memory for a few copies of the largest
    tensor.

    Args:
        weights: Finite, of any shapes, in float32 or less.
        count: In [0, number of all weights].
    """
    if not count:
        return [(weight != weight) for weight in weights]
    threshold, left = _threshold(weights, count)
    masks = []
    for weight in weights:
        bits = _bits(weight)
        mask = bits < threshold
        first = (bits == threshold).nonzero().flatten()[:left]
        mask[first] = True
        left -= len(first)
        masks.append(mask.reshape(weight.shape))
    return masks


def _threshold(weights: "Sequence[Tensor]", count: int) -> tuple[int, int]:
    """Bits of the ``count``-th smallest magnitude, and how many weights of that magnitude are among the ``count``.

    A radix selection by counting: the upper half of a magnitude's bits, then the lower half.
    """
    import torch

    upper = sum(torch.bincount(_bits(weight) >> HALF, minlength=1 << HALF) for weight in weights)
    high, left = _place(upper, count)
    lower: Tensor | int = 0
    for weight in weights:
        bits = _bits(weight)
        lower = lower + torch.bincount(bits[bits >> HALF == high] & ((1 << HALF) - 1), minlength=1 << HALF)
    low, left = _place(lower, left)
    return (high << HALF) + low, left


def _place(counts: "Tensor", count: int) -> tuple[int, int]:
    """The bin of the ``count``-th smallest, and its rank in that bin."""
    below = counts.cumsum(0)
    found = int((below < count).sum())
    return found, count - (int(below[found - 1]) if found else 0)


def _bits(weight: "Tensor") -> "Tensor":
    """Magnitudes as integers of the same order, ``(n,)``: the bits of a nonnegative float."""
    import torch

    return weight.detach().reshape(-1).abs().float().view(torch.int32)


def least_of_groups(weight: "Tensor", keep: int, size: int) -> "Tensor":
    """A mask that is true at all but the ``keep`` largest magnitudes of every group.

    A group is ``size`` neighbors along the inputs (the second axis), as sparse kernels expect: neighbors in a row of a
    linear layer, and neighboring channels at the same position of a convolution's kernel.

    Args:
        weight: ``(out, in, ...)`` with ``in`` a multiple of ``size``.
        keep: In [1, size - 1].
        size: At least 2.
    """
    import torch

    members = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, size)).unbind(-1)
    # Ranks by comparing all pairs: several times faster than sorting many short rows.
    ranks = [torch.zeros(members[0].shape, dtype=torch.uint8, device=weight.device) for _ in members]
    for later in range(size):
        for earlier in range(later):
            smaller = members[earlier] <= members[later]
            ranks[later] += smaller
            ranks[earlier] += ~smaller
    return torch.stack([rank < size - keep for rank in ranks], -1).flatten(-2).movedim(-1, 1)


def holds(weight: "Tensor", keep: int, size: int) -> bool:
    """Whether every group, as in :func:`least_of_groups`, has at most ``keep`` nonzero weights."""
    if weight.dim() < 2 or weight.shape[1] % size:
        return False
    groups = (weight.detach() != 0).movedim(1, -1).unflatten(-1, (-1, size))
    return bool((groups.sum(-1) <= keep).all())


@dataclass(frozen=True)
class SparseLayer:
    """The result for a layer.

    Attributes:
        weights: Number of weights.
        zeros: Number that are zero now.
        changed: Number that became zero.
        lost: Root sum of squares of the removed weights, over that of all.
    """

    weights: int
    zeros: int
    changed: int
    lost: float

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return self.zeros / self.weights


def set_zero(weight: "Tensor", mask: "Tensor") -> SparseLayer:
    """Sets a weight to zero, in place, where the mask is true."""
    before = weight.float()
    gone = before.masked_fill(~mask, 0)
    square = float(before.square().sum())
    changed = int(gone.count_nonzero())
    weight.masked_fill_(mask, 0)
    zeros = weight.numel() - int(weight.count_nonzero())
    return SparseLayer(weight.numel(), zeros, changed, (float(gone.square().sum()) / square) ** 0.5 if square else 0.0)
