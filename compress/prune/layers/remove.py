"""Removes the channels with the lowest rank from a UNet and builds the result."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from compress.models.inputs import Inputs, example_inputs
from compress.models.macs import count_macs
from compress.models.shapes import shaped
from compress.prune.channels import groups as channels
from compress.prune.channels.groups import Axis, Group
from compress.prune.channels.proxy import UNet, meta_model
from compress.prune.channels.rebuild import kept_outputs, mark, narrow, share_of_macs
from compress.prune.channels.target import TOLERANCE
from compress.prune.importance import is_comparable
from compress.prune.importance.score import Scorer
from compress.prune.layers.costs import UNITS, LayerCosts
from compress.prune.layers.ranking import Slice, check_reachable, follow, rank
from compress.prune.layers.report import NarrowedWidth, PerLayerReport
from compress.prune.layers.widths import find_widths, group_name

if TYPE_CHECKING:
    from compress.prune.per_layer import Config

UNFIT = "no smaller width fits norm groups, heads, multiple and min_share"


class PerLayerPruner:
    """Prunes the widths of a UNet.

    Args:
        unet: Stays unchanged; may be on the meta device if :meth:`prune` is not called.
        config: See :class:`compress.prune.per_layer.Config`.
        inputs: Arguments of the forward pass used to count multiply-accumulates; None: inputs at the model's own size.

    Raises:
        UserError: The UNet cannot be pruned, or no widths meet the target.
    """

    def __init__(self, unet: UNet, config: "Config", inputs: Inputs | None = None) -> None:
        self.unet, self.config = unet, config
        found = find_widths(unet, config.heads, config.multiple, config.min_share)
        self.in_scope = [width for width in found if width.kind in config.scope]
        self.widths = [width for width in self.in_scope if len(width.allowed) > 1]
        self.empty = meta_model(type(unet), unet.config)
        self.macs = count_macs(self.empty, inputs or example_inputs(unet)).by_module
        self.costs = LayerCosts(self.empty, self.macs, self.widths)
        self.full = self.costs.total
        unit, share = config.goal
        key = f"target.{unit}={share:g}" if config.target.goal else f"ratio={config.ratio:g}"
        self.fallback = check_reachable(self.widths, self.costs, unit, share, key)

    def prune(self, weights: Mapping[str, Tensor], scorer: Scorer) -> PerLayerReport:
        """Remove the channels with the lowest scores.

        Args:
            weights: The UNet's weights; stay unchanged.
            scorer: Scores the channels of a group.
        """
        unit, share = self.config.goal
        scores = [[scorer(group, dict(weights)) for group in width.groups] for width in self.widths]
        self.costs.set([width.steps for width in self.widths])
        follow(self._ranking(scores), self.costs, unit, share)
        ranked = abs(self._left(unit) / share - 1) <= TOLERANCE
        if not ranked:
            self.costs.set(self.fallback)
        keep: dict[Axis, Tensor] = {}
        for width, of_groups, left in zip(self.widths, scores, self.costs.left, strict=True):
            for group, values in zip(width.groups, of_groups, strict=True):
                if left < width.steps:
                    mark(keep, group, channels.choose(group, values, width.size(group, left)), self.unet)
        return self._report(keep, weights, ranked)

    def _ranking(self, scores: list[list[Tensor]]) -> list[Slice]:
        compared = [
            [self._comparable(group, values) for group, values in zip(width.groups, of_groups, strict=True)]
            for width, of_groups in zip(self.widths, scores, strict=True)
        ]
        return rank(self.widths, compared, [self._price(index) for index in range(len(self.widths))])

    def _comparable(self, group: Group, scores: Tensor) -> Tensor:
        """A group's scores, normalized so that all groups are comparable."""
        importance, normalize = self.config.importance, self.config.normalize
        if getattr(importance, "combine", None) == "outgoing" and not _read(group):
            scores = scores.sqrt()  # a product of queries and keys, while other scores have one factor
        if normalize == "none" or (normalize == "auto" and is_comparable(importance)):
            return scores
        return scores / (scores.max() if normalize == "max" else scores.mean()).clamp(min=1e-300)

    def _price(self, index: int) -> float:
        """The price of one step of a width: its number of channels, or its share of the original cost."""
        width = self.widths[index]
        if self.config.per == "channel":
            return sum(group.size for group in width.groups) / width.steps
        unit = UNITS[self.config.goal[0]]
        self.costs.move(index, width.steps - 1)
        saved = 1 - self.costs.total[unit] / self.full[unit]
        self.costs.move(index, width.steps)
        return saved

    def _left(self, unit: str) -> float:
        return self.costs.total[UNITS[unit]] / self.full[UNITS[unit]]

    def _report(self, keep: dict[Axis, Tensor], given: Mapping[str, Tensor], ranked: bool) -> PerLayerReport:
        weights = dict(given)
        narrow(weights, keep)
        scales: dict[str, float] = {}
        layers = {name: _shape(self.unet.get_submodule(name), weights[f"{name}.weight"]) for name, _ in keep}
        for name, module in self.unet.named_modules():
            if isinstance(module, Attention) and (f"{name}.to_q", "out") in keep:
                layers |= self._heads(name, module, weights, scales)
        own = {name: tensor.clone() if tensor is given[name] else tensor for name, tensor in weights.items()}
        pruned = shaped(self.unet, layers, own)
        touched = {name: self.unet.get_submodule(name) for name, _ in keep}
        params = sum(p.numel() for p in self.unet.parameters())
        return PerLayerReport(
            unet=pruned,
            kept=kept_outputs(pruned, keep),
            widths=self._widths(),
            left={unit: self._left(unit) for unit in ("params", "macs")},
            ranked=ranked,
            params_before=params,
            params_after=sum(p.numel() for p in pruned.parameters()),
            modules=len(touched),
            share_params=sum(p.numel() for layer in touched.values() for p in layer.parameters()) / params,
            share_macs=share_of_macs(self.empty, self.macs, set(touched)),
            skipped={
                group_name(width.groups[0], width.kind): UNFIT for width in self.in_scope if len(width.allowed) == 1
            },
            outputs={name: mask.nonzero()[:, 0] for (name, side), mask in keep.items() if side == "out"},
            scales=scales,
        )

    def _heads(
        self, name: str, attention: Attention, weights: dict[str, Tensor], scales: dict[str, float]
    ) -> dict[str, dict[str, int]]:
        """The new shape of an attention that lost channels; for narrowed heads, folds the scale into the query."""
        width, new = attention.inner_dim // attention.heads, weights[f"{name}.to_q.weight"].shape[0]
        if self.config.heads == "remove":
            return {name: {"heads": new // width}}
        scales[f"{name}.to_q"] = math.sqrt(new / attention.inner_dim)
        for key in (f"{name}.to_q.weight", f"{name}.to_q.bias"):
            if key in weights:  # attention divides by the square root of a head's width
                weights[key] = weights[key] * scales[f"{name}.to_q"]
        return {}

    def _widths(self) -> list[NarrowedWidth]:
        found: dict[str, NarrowedWidth] = {}
        left = dict(zip(map(id, self.widths), self.costs.left, strict=True))
        for width in self.in_scope:
            for group in width.groups:
                name, after = group_name(group, width.kind), width.size(group, left.get(id(width), width.steps))
                found[name] = NarrowedWidth(name, width.kind, group.size, after)
        return list(found.values())


def _read(group: Group) -> bool:
    """Whether any layer reads a group's channels; false for queries and keys."""
    return any(member.axis[1] == "in" for member in group.members)


def _shape(layer: nn.Module, weight: Tensor) -> dict[str, int]:
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        return {"channels": len(weight)}
    return {"in": weight.shape[1], "out": weight.shape[0]}
