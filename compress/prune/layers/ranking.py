"""One ranking of the slices of all widths, and the removal of slices in this order until a target is met."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.prune.channels.groups import Group
from compress.prune.channels.target import TOLERANCE
from compress.prune.layers.costs import UNITS, LayerCosts
from compress.prune.layers.widths import Width


@dataclass(frozen=True)
class Slice:
    """Channels that are removed together.

    Attributes:
        score: Their importance per unit of the price.
        width: Index of their width.
        left: Steps of this width that remain without them.
    """

    score: float
    width: int
    left: int


def rank(widths: Sequence[Width], scores: Sequence[Sequence[Tensor]], prices: Sequence[float]) -> list[Slice]:
    """All slices in the order of removal; within a width, the least important channels first.

    A slice's score is the sum over its channels: to first order, the effects of removing them add up. It is divided by
    the slice's price, so that slices of one channel can be compared with slices of hundreds.

    Args:
        widths: All widths.
        scores: For each group of each width, the scores of its channels, ``(size,)``, float64.
        prices: Price of one step of each width, above 0.
    """
    found = []
    for index, (width, of_groups, price) in enumerate(zip(widths, scores, prices, strict=True)):
        lost = sum(_lost(width, group, values) for group, values in zip(width.groups, of_groups, strict=True))
        steps = -torch.tensor(width.allowed, dtype=torch.float64).diff()
        # They increase already, except for rounding.
        per_price = (torch.as_tensor(lost).diff() / (steps * price)).cummax(0).values if len(steps) else []
        found += [Slice(float(score), index, left) for score, left in zip(per_price, width.allowed[1:], strict=True)]
    return sorted(found, key=lambda piece: (piece.score, piece.width, -piece.left))


def _lost(width: Width, group: Group, scores: Tensor) -> Tensor:
    """Sum of the scores of the removed channels, for each allowed number of remaining steps."""
    gone = width.steps - torch.tensor(width.allowed)
    if group.unit > 1:
        parts = [scores.view(-1, group.unit).sum(1)]
    else:
        borders = torch.tensor([0, *sorted(group.borders), group.size])
        parts = list(scores.split(borders.diff().tolist()))
    total = torch.zeros(len(gone), dtype=torch.float64)
    for part in parts:
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), part.sort().values.cumsum(0)])
        total += sums[gone * len(part) // width.steps]
    return total


def follow(order: Sequence[Slice], costs: LayerCosts, unit: str, share: float) -> list[float]:
    """Remove slices in order until a share is met; afterwards, ``costs`` has the new widths.

    A slice whose removal would leave too little is kept, and so are the later slices of its width. If only such slices
    remain, one of them is removed and the slices removed last are restored.

    Args:
        order: All slices, from :func:`rank`.
        costs: Costs of the UNet; changed in place.
        unit: ``"params"``, ``"bytes"`` or ``"macs"``.
        share: Share to keep, met within :data:`compress.prune.channels.target.TOLERANCE`.

    Returns:
        Remaining shares after each step, the final one last.
    """
    full = costs.total[UNITS[unit]]
    seen: list[float] = []

    def left() -> float:
        seen.append(costs.total[UNITS[unit]] / full)
        return seen[-1]

    low, high = share * (1 - TOLERANCE), share * (1 + TOLERANCE)
    taken: list[tuple[int, int]] = []  # width, and steps before
    refused: dict[int, Slice] = {}
    for piece in order:
        if left() <= share * (1 + 1e-12):  # sums of integers, divided
            return seen
        if piece.width not in refused:
            before = costs.left[piece.width]
            costs.move(piece.width, piece.left)
            if left() < low:
                costs.move(piece.width, before)
                refused[piece.width] = piece
            else:
                taken.append((piece.width, before))
    start = list(costs.left)
    for piece in refused.values():
        if left() <= high:
            return seen
        costs.move(piece.width, piece.left)
        for width, before in reversed(taken):
            if left() >= low:
                break
            if width != piece.width:
                costs.move(width, before)
        if not low <= left() <= high:
            costs.set(start)
    left()
    return seen


def _even(widths: Sequence[Width]) -> list[Slice]:
    """All slices, in an order that removes the same share from every width."""
    found = [Slice(1 - left / width.steps, i, left) for i, width in enumerate(widths) for left in width.allowed[1:]]
    return sorted(found, key=lambda piece: (piece.score, piece.width))


def _coarse_first(widths: Sequence[Width], costs: LayerCosts, unit: str) -> list[Slice]:
    """All slices, those of widths with the most expensive steps first; finer ones then reach the exact share."""
    found = []
    for index, width in enumerate(widths):
        costs.move(index, width.allowed[1])
        score = costs.total[UNITS[unit]]
        costs.move(index, width.steps)
        found += [Slice(score, index, left) for left in width.allowed[1:]]
    return sorted(found, key=lambda piece: (piece.score, piece.width, -piece.left))


def check_reachable(widths: Sequence[Width], costs: LayerCosts, unit: str, share: float, key: str) -> list[int]:
    """Steps of each width that meet the share, chosen without using any weight.

    Args:
        widths: All widths.
        costs: Costs of the unchanged UNet; restored afterwards.
        unit: See :func:`follow`.
        share: See :func:`follow`.
        key: Config key that sets the share, with its value, for the message.

    Raises:
        UserError: No width can be narrowed, or no widths meet the share; the message names the nearest shares found.
    """
    full = costs.total[UNITS[unit]]
    costs.set([width.allowed[-1] for width in widths])
    seen = [costs.total[UNITS[unit]] / full]
    if seen[0] == 1:
        raise UserError(f"{key}: no width of this UNet can be narrowed: lower multiple or min_share, or widen scope")
    found: list[int] | None = None
    costs.set([width.steps for width in widths])
    for order in (_even(widths), _coarse_first(widths, costs, unit)):
        seen += follow(order, costs, unit, share)
        if abs(seen[-1] / share - 1) <= TOLERANCE:
            found = list(costs.left)
            break
        costs.set([width.steps for width in widths])
    costs.set([width.steps for width in widths])
    if found is None:
        near = [max((s for s in seen if s < share), default=None), min((s for s in seen if s > share), default=None)]
        listed = " or ".join(f"{value:.4g}" for value in near if value not in (None, 1))
        raise UserError(f"{key}: no widths in scope leave this share of the {unit} within 2 %; nearest found: {listed}")
    return found
