"""Ranks of layers: what each would lose and save, and which together lose least for what they save."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """The weight of a Linear or a Conv2d as a matrix (outputs, everything else), and what it costs.

    Attributes:
        outputs: Rows.
        inputs: Columns: of a Conv2d its channels times the size of its kernel.
        cost: Of the layer as it is, in any unit.
    """

    outputs: int
    inputs: int
    cost: float

    @property
    def full(self) -> int:
        """The rank that it can have."""
        return min(self.outputs, self.inputs)

    def at(self, rank: int) -> float:
        """The cost of a rank, whether it saves something or not."""
        return self.cost * rank * (self.outputs + self.inputs) / (self.outputs * self.inputs)

    def ranks(self, multiple: int) -> list[int]:
        """Ranks that cost less than the layer as it is, ascending."""
        most = (self.outputs * self.inputs - 1) // (self.outputs + self.inputs)
        return list(range(multiple, most + 1, multiple))


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (outputs, everything else), in double precision where the device has it."""
    matrix = weight.detach().flatten(1)
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def lost_energy(weight: Tensor) -> Tensor:
    """What is lost of the energy of a weight, the sum of its squared singular values, at every rank.

    Args:
        weight: (outputs, inputs, ...), float.

    Returns:
        Shares at the ranks 0, 1, ..., n, with n the full one: ``(n + 1,)``, float64 on the CPU, falling from 1 to 0,
        which stands also for what cannot be told from the rounding of the weight.
    """
    matrix = as_matrix(weight)
    wide = matrix.shape[0] <= matrix.shape[1]
    # Their squares come from the smaller of the products with itself, at a fraction of the time of the values.
    energies = torch.linalg.eigvalsh(matrix @ matrix.T if wide else matrix.T @ matrix).flip(0).clamp(min=0).cpu()
    total = energies.sum()
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    lost = left / total if total else torch.zeros_like(left)
    # No more than this is what rounding to its dtype adds to a weight that is of lower rank.
    return torch.where(lost > torch.finfo(weight.dtype).eps ** 2, lost, 0.0)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of least squared error, equally large (Eckart and Young 1936).

    Args:
        weight: (outputs, inputs, ...) of a Linear or a Conv2d.
        rank: At most the lesser of rows and columns of its matrix.

    Returns:
        ``reduce`` (rank, inputs, ...) and ``expand`` (outputs, rank), of a Conv2d (outputs, rank, 1, 1), in the dtype
        and on the device of the weight.
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
    # One of them carries the singular values, the other is orthonormal: each gets the root of their ratio.
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
    """For each layer the least rank that keeps a share of its energy.

    Args:
        layers: By name.
        lost: What :func:`lost_energy` says of each.
        energy: The share, in (0, 1].
        multiple: Of the ranks.

    Returns:
        Layer to rank, and layer to the reason why it stays as it is.
    """
    ranks, skipped = {}, {}
    for name, layer in layers.items():
        possible = layer.ranks(multiple)
        # 1e-12 more may go: energy=0.9 asks for 1 - 0.9, which is not 0.1 in floating point.
        needed = next((rank for rank in possible if lost[name][rank] <= 1 - energy + 1e-12), None)
        if needed is not None:
            ranks[name] = needed
        elif possible:
            kept = 1 - float(lost[name][possible[-1]])
            skipped[name] = f"the largest rank that saves something, {possible[-1]}, keeps {kept:.3f} of its energy"
        else:
            skipped[name] = f"no multiple of {multiple} is a rank that saves something"
    return ranks, skipped


def by_cost(
    layers: Mapping[str, Matrix], lost: Mapping[str, Tensor], saving: float, multiple: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Ranks that save a given cost and together lose the least sum of shares of energy.

    That sum is least where no rank of any layer would save more for what it loses: with one threshold on the energy
    lost per cost saved for all layers (a Lagrange multiplier). What a layer can do is walked down on its lower convex
    hull, all layers' steps in the order of what they lose per cost; the last one goes as far as it has to.

    Args:
        layers: By name.
        lost: What :func:`lost_energy` says of each.
        saving: In the unit of their costs, at most what :func:`most_saved` says.
        multiple: Of the ranks.

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
        name: "loses more energy for what it saves than the others do"
        if layer.ranks(multiple)
        else f"no multiple of {multiple} is a rank that saves something"
        for name, layer in layers.items()
        if name not in ranks
    }
    return ranks, skipped


def most_saved(layers: Mapping[str, Matrix], multiple: int) -> float:
    """What the least ranks of all layers save."""
    return sum(layer.cost - layer.at(ranks[0]) for layer in layers.values() if (ranks := layer.ranks(multiple)))


def _hull(layer: Matrix, lost: Tensor, multiple: int) -> list[tuple[float, float, int | None, int]]:
    """The steps down a layer's lower convex hull: energy lost, cost saved, rank before (None: as it is) and after."""
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
