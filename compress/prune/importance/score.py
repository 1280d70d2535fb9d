"""Combines the saliency of single weights into a score for each channel of a group."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from compress.prune.channels.groups import Group

Scorer = Callable[["Group", "dict[str, Tensor]"], "Tensor"]
"""From a group and the state dict of its UNet to a score for each channel, ``(size,)``, float64."""

Saliency = Callable[[str], "Tensor | None"]
"""From the name of a weight to the importance of each of its entries, in its shape; None if unknown."""


def score(group: "Group", saliency: Saliency, combine: str) -> "Tensor":
    """Score of each channel of a group, shape ``(size,)``, float64, at least 0.

    Args:
        group: The group.
        saliency: Saliency of single weights; summed over a channel in each layer, then the absolute value is taken.
        combine: ``"product"``: incoming weights (including norms and biases) times outgoing weights; for queries and
            keys, queries times keys, as only their product matters. ``"sum"``: all weights. ``"outgoing"``: only the
            weights that read the channel; for queries and keys, which no layer reads, their product.
    """
    import torch

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
