"""What each block of a denoiser has and does."""

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

    Leaving blocks out changes the cost of no other, so those of what is left add up.

    Attributes:
        by_part: ``"params"`` and, where counted, ``"macs"``, each module of :meth:`Blocks.names` to its own without
            those inside it; ``""`` is all the rest.
    """

    by_part: Mapping[str, Mapping[str, int]]

    def of(self, blocks: Blocks) -> dict[str, int]:
        """``params`` and, where counted, ``macs`` of what is left."""
        parts = {"", *blocks.names().values()}
        return {
            unit: sum(count for part, count in counts.items() if part in parts) for unit, counts in self.by_part.items()
        }


@torch.no_grad()
def count_costs(model: Any, blocks: Blocks, inputs: Inputs | None) -> BlockCosts:
    """Counts on the meta device.

    Args:
        model: The denoiser; its weights are not touched.
        blocks: All of its blocks.
        inputs: Keyword arguments of the pass to count; None: parameters alone.
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
