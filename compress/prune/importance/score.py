"""From the saliency of single weights to a score of each channel of a group."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compress.prune.channels.groups import Group

Scorer = Callable[["Group", dict[str, Tensor]], Tensor]
"""From a group and the state dict of the UNet that it is of to a score of each channel, ``(size,)``, float64."""

Saliency = Callable[[str], Tensor | None]
"""From the name of a weight to how much each of its entries matters, in its shape; None where nothing is known."""


def score(group: "Group", saliency: Saliency, combine: str) -> Tensor:
    """Score of each channel of a group, shape ``(size,)``, float64, at least 0.

    Args:
        group: The group.
        saliency: Of single weights. Those of one channel in one layer are added up, and the absolute value counts.
        combine: ``"product"``: incoming weights (norms and biases among them) times outgoing ones; for queries and
            keys, one times the other, as only their product counts. ``"sum"``: of all. ``"outgoing"``: those that
            read the channel alone; for queries and keys, which nothing reads, their product.
    """
    incoming = torch.zeros(group.size, dtype=torch.float64)
    outgoing = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        name, side = member.axis
        into = outgoing if side == "in" or name.endswith(".to_k") else incoming
        for key in (f"{name}.weight", f"{name}.bias"):
            if side == "in" and key.endswith("bias"):
                continue
            values = saliency(key)
            if values is None:
                continue
            rows = values.transpose(0, 1) if side == "in" else values
            rows = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
            into.index_add_(0, member.root, rows.sum(1).abs().double().cpu()[member.index])
    if combine == "outgoing" and any(side == "in" for _, side in (member.axis for member in group.members)):
        return outgoing
    return incoming + outgoing if combine == "sum" else incoming * outgoing
