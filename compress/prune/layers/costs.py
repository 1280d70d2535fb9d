"""The cost of a UNet while its widths change: a sum over layers of products of inputs and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from torch import nn

from compress.prune.channels.groups import Axis, axis_size
from compress.prune.channels.rebuild import attention_macs
from compress.prune.layers.widths import Width

Cost = tuple[float, float]  # parameters and multiply-accumulates
UNITS = {"params": 0, "bytes": 0, "macs": 1}  # index in Cost; in one precision, bytes are proportional to parameters


@dataclass(frozen=True)
class LayerCost:
    """``product * inputs * outputs + output * outputs``."""

    product: Cost
    output: Cost


class LayerCosts:
    """Exact costs, from one pass of the original UNet; a step recomputes only the layers that it changes.

    Args:
        unet: Only its shapes are used.
        macs: Multiply-accumulates of every module, including those inside it, by name; ``""`` is the total.
        widths: Widths that may change.

    Attributes:
        total: Cost of the UNet at the current widths.
        left: Current number of steps of each width.
    """

    def __init__(self, unet: nn.Module, macs: Mapping[str, float], widths: Sequence[Width]) -> None:
        self.left = [width.steps for width in widths]
        self.total: Cost = (float(sum(p.numel() for p in unet.parameters())), macs[""])
        self._layers: dict[str, LayerCost] = {}
        self._sizes: dict[Axis, int] = {}
        self._changes: list[dict[Axis, int]] = []  # channels of each axis in one step of a width
        for width in widths:
            changes: dict[Axis, int] = {}
            for group in width.groups:
                for member in [*group.members, *group.followers]:
                    changes[member.axis] = changes.get(member.axis, 0) + len(member.index) // width.steps
            self._changes.append(changes)
        self._touched = [sorted({name for name, _ in changes}) for changes in self._changes]
        for name in {name for names in self._touched for name in names}:
            self._add(name, unet, macs)

    def _add(self, name: str, unet: nn.Module, macs: Mapping[str, float]) -> None:
        layer = unet.get_submodule(name)
        outputs = self._sizes[name, "out"] = axis_size(unet, (name, "out"))
        bias = layer.bias is not None
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            self._layers[name] = LayerCost((0, 0), (1 + bias, 0))
            return
        inputs = self._sizes[name, "in"] = axis_size(unet, (name, "in"))
        product = layer.weight[0, 0].numel(), macs.get(name, 0) / (inputs * outputs)
        owner = name.rpartition(".")[0]
        between = 0.0
        if name.endswith(".to_q") and isinstance(module := unet.get_submodule(owner), Attention):
            between = attention_macs(owner, module, macs)
        self._layers[name] = LayerCost(product, (bias, between / outputs))

    def _of(self, name: str) -> Cost:
        layer, outputs, inputs = self._layers[name], self._sizes[name, "out"], self._sizes.get((name, "in"), 0)
        params, macs = (
            product * inputs * outputs + output * outputs
            for product, output in zip(layer.product, layer.output, strict=True)
        )
        return params, macs

    def move(self, index: int, left: int) -> None:
        """Set the number of steps of a width to ``left``."""
        steps = left - self.left[index]
        params, macs = self.total
        for name in self._touched[index]:
            before = self._of(name)
            for side in ("out", "in"):
                if (name, side) in self._changes[index]:
                    self._sizes[name, side] += steps * self._changes[index][name, side]
            after = self._of(name)
            params, macs = params + after[0] - before[0], macs + after[1] - before[1]
        self.total = params, macs
        self.left[index] = left

    def set(self, left: Sequence[int]) -> None:
        """Set the number of steps of every width."""
        for index, steps in enumerate(left):
            self.move(index, steps)
