"""Parameters and multiply-accumulates of each block of a denoiser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.models.inputs import Inputs
from compress.models.macs import count_macs
from compress.prune.blocks import Blocks
from compress.prune.blocks.assemble import owner


@dataclass(frozen=True)
class BlockCosts:
    """Parameters and multiply-accumulates of a denoiser, by block.

    Removing a block does not change the cost of others, so the costs of the remaining blocks add up.

    Attributes:
        by_part: ``"params"`` and, if counted, ``"macs"``: module of :meth:`Blocks.names` to its cost without the
            modules inside it that are in the map; ``""`` is everything else.
    """

    by_part: Mapping[str, Mapping[str, int]]

    def of(self, blocks: Blocks) -> dict[str, int]:
        """``params`` and, if counted, ``macs`` of the remaining blocks."""
        parts = {"", *blocks.names().values()}
        return {
            unit: sum(count for part, count in counts.items() if part in parts) for unit, counts in self.by_part.items()
        }


@torch.no_grad()
def count_costs(model: Any, blocks: Blocks, inputs: Inputs | None) -> BlockCosts:
    """Count the cost of each block on the meta device.

    Args:
        model: The denoiser; its weights are not used.
        blocks: All of its blocks.
        inputs: Keyword arguments of the forward pass to count; None: count parameters only.
    """
    parts = set(blocks.names().values())
    params = dict.fromkeys(("", *parts), 0)
    for name, parameter in model.named_parameters():
        params[owner(name, parts)] += parameter.numel()
    if inputs is None:
        return BlockCosts({"params": params})
    found = count_macs(model, inputs).by_module
    macs = {part: found.get(part, 0) for part in ("", *parts)}
    for part in sorted(parts, key=len, reverse=True):
        outer = owner(part.rpartition(".")[0], parts)
        macs[outer] -= found.get(part, 0)
    return BlockCosts({"params": params, "macs": macs})
