"""Ranks of layers: the energy each rank loses, the cost it saves, and the choice of ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """The shape of a Linear or Conv2d weight as a matrix (outputs, everything else), and the layer's cost.

    Attributes:
        outputs: Rows.
        inputs: Columns; for a Conv2d, input channels times kernel size.
        cost: Cost of the unchanged layer, in any unit.
    """

    outputs: int
    inputs: int
    cost: float

    @property
    def full(self) -> int:
        """The full rank."""
        return min(self.outputs, self.inputs)

    def at(self, rank: int) -> float:
        """The cost at a rank; may exceed the layer's cost."""
        return self.cost * rank * (self.outputs + self.inputs) / (self.outputs * self.inputs)

    def ranks(self, multiple: int) -> list[int]:
        """Ranks that cost less than the unchanged layer, ascending."""
        most = (self.outputs * self.inputs - 1) // (self.outputs + self.inputs)
        return list(range(multiple, most + 1, multiple))


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as a float64 matrix (outputs, everything else); moved to the CPU from MPS, which lacks float64."""
    matrix = weight.detach().flatten(1)
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def lost_energy(weight: Tensor) -> Tensor:
    """Lost share of a weight's energy, the sum of its squared singular values, at every rank.

    Args:
        weight: (outputs, inputs, ...), float.

    Returns:
        Shares at ranks 0, 1, ..., n, where n is the full rank: ``(n + 1,)``, float64 on the CPU, decreasing from 1 to
        0. Shares within the rounding error of the weight are set to 0.
    """
    matrix = as_matrix(weight)
    wide = matrix.shape[0] <= matrix.shape[1]
    # Eigenvalues of the smaller Gram matrix are the squared singular values, and much faster to compute.
    energies = torch.linalg.eigvalsh(matrix @ matrix.T if wide else matrix.T @ matrix).flip(0).clamp(min=0).cpu()
    total = energies.sum()
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    lost = left / total if total else torch.zeros_like(left)
    # Rounding a weight of lower rank to its dtype adds at most this much.
    return torch.where(lost > torch.finfo(weight.dtype).eps ** 2, lost, 0.0)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors with the least squared error (Eckart and Young 1936), scaled to equal magnitude.

    Args:
        weight: (outputs, inputs, ...) of a Linear or a Conv2d.
        rank: At most the smaller of rows and columns of its matrix.

    Returns:
        ``reduce`` (rank, inputs, ...) and ``expand`` (outputs, rank), or (outputs, rank, 1, 1) for a Conv2d, in the
        dtype and on the device of the weight.
    """
    matrix = as_matrix(weight)
    if matrix.shape[0] <= matrix.shape[1]:
        energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
        expand = vectors[:, -rank:].flip(1)
        reduce = expand.T @ matrix
    else:
        energies, vectors = torch.linalg.eigh(matrix.T @ matrix)
        reduce = vectors[:, -rank:].flip(1).T
        expand = matrix @ reduce.T
    # One factor contains the singular values, the other is orthonormal: scale both by the root of their ratio.
    ratio = (reduce.norm(dim=1) / expand.norm(dim=0)).sqrt().nan_to_num(1.0, 1.0, 1.0)
    ratio = torch.where(ratio > 0, ratio, 1.0)
    reduce, expand = reduce / ratio[:, None], expand * ratio
    shape = (len(expand), rank, *[1] * (weight.dim() - 2))
    return (
        reduce.reshape(rank, *weight.shape[1:]).to(weight).contiguous(),
        expand.reshape(shape).to(weight).contiguous(),
    )


def by_energy(
    layers: Mapping[str, Matrix], lost: Mapping[str, Tensor], energy: float, multiple: int
) -> tuple[dict[str, int], dict[str, str]]:
    """The smallest rank of each layer that keeps a share of its energy.

    Args:
        layers: Layers by name.
        lost: Results of :func:`lost_energy` by name.
        energy: Share to keep, in (0, 1].
        multiple: Every rank is a multiple of this.

    Returns:
        Layer to rank, and unchanged layer to the reason.
    """
    ranks, skipped = {}, {}
    for name, layer in layers.items():
        possible = layer.ranks(multiple)
        # Tolerance of 1e-12: 1 - 0.9 is not 0.1 in floating point.
        needed = next((rank for rank in possible if lost[name][rank] <= 1 - energy + 1e-12), None)
        if needed is not None:
            ranks[name] = needed
        elif possible:
            kept = 1 - float(lost[name][possible[-1]])
            skipped[name] = f"the largest rank that reduces the cost, {possible[-1]}, keeps {kept:.3f} of its energy"
        else:
            skipped[name] = f"no multiple of {multiple} is a rank that reduces the cost"
    return ranks, skipped


def by_cost(
    layers: Mapping[str, Matrix], lost: Mapping[str, Tensor], saving: float, multiple: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Ranks that save a given cost with the least sum of lost shares of energy.

    At the minimum, all layers have the same threshold on the energy lost per cost saved (a Lagrange multiplier). Each
    layer moves down the lower convex hull of its ranks; the steps of all layers are taken in the order of energy lost
    per cost saved, and the last step goes only as far as needed.

    Args:
        layers: Layers by name.
        lost: Results of :func:`lost_energy` by name.
        saving: Cost to save, in the unit of the layers' costs, at most :func:`most_saved`.
        multiple: Every rank is a multiple of this.

    Returns:
        As :func:`by_energy`.
    """
    steps = [
        (loss / saved, saved, name, before, after)
        for name, layer in layers.items()
        for loss, saved, before, after in _hull(layer, lost[name], multiple)
    ]
    ranks: dict[str, int] = {}
    for _, saved, name, before, after in sorted(steps, key=lambda step: step[0]):
        if saving <= 0:
            break
        if saved > saving:
            layer = layers[name]
            start = layer.cost if before is None else layer.at(before)
            between = [rank for rank in layer.ranks(multiple) if after <= rank and (before is None or rank < before)]
            after = min(between, key=lambda rank: abs(start - layer.at(rank) - saving))
            if saving < abs(start - layer.at(after) - saving):
                break  # nearer without this step
        ranks[name] = after
        saving -= saved
    skipped = {
        name: "loses more energy per cost saved than the other layers"
        if layer.ranks(multiple)
        else f"no multiple of {multiple} is a rank that reduces the cost"
        for name, layer in layers.items()
        if name not in ranks
    }
    return ranks, skipped


def most_saved(layers: Mapping[str, Matrix], multiple: int) -> float:
    """The cost saved by the smallest ranks of all layers."""
    return sum(layer.cost - layer.at(ranks[0]) for layer in layers.values() if (ranks := layer.ranks(multiple)))


def _hull(layer: Matrix, lost: Tensor, multiple: int) -> list[tuple[float, float, int | None, int]]:
    """The steps down a layer's lower convex hull: energy lost, cost saved, rank before (None: not factored), after."""
    points: list[tuple[float, float, int | None]] = [(layer.cost, 0.0, None)]
    points += [(layer.at(rank), float(lost[rank]), rank) for rank in reversed(layer.ranks(multiple))]
    hull: list[tuple[float, float, int | None]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(b[1] - a[1], a[0] - b[0], a[2], b[2]) for a, b in zip(hull, hull[1:], strict=False) if b[2] is not None]


def _slope(before: tuple[float, float, int | None], after: tuple[float, float, int | None]) -> float:
    return (after[1] - before[1]) / (before[0] - after[0])
