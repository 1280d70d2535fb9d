"""Groups of coupled channels of a UNet, from torch-pruning's dependency graph, and the choice of channels to keep.

A group is a set of channels that several layers share and that must be removed from all of them together: a residual
stream, the inner width of a resnet, the hidden width of a feed-forward, queries with keys, values with the layer that
reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch_pruning import DependencyGraph

from compress.prune.channels.proxy import UNet, proxy

Axis = tuple[str, str]  # module name, and "out" or "in": the output or input axis of its weight


@dataclass
class Member:
    """The part of one layer's axis that belongs to a group.

    Attributes:
        axis: The layer and its axis.
        index: Channels of the layer, ascending, shape ``(n,)``.
        root: The group's channel for each of them, shape ``(n,)``.
    """

    axis: Axis
    index: Tensor
    root: Tensor


@dataclass
class Group:
    """Coupled channels.

    Attributes:
        size: Number of channels.
        members: Layers that have these channels.
        borders: Channels at which a new norm group or head starts; the same share is kept between any two borders.
        unit: Number of consecutive channels that are removed together: a head's width if whole heads are removed.
        followers: Layers that lose the same channels but do not affect the scores: queries and keys if whole heads are
            removed.
    """

    size: int
    members: list[Member]
    borders: set[int] = field(default_factory=set)
    unit: int = 1
    followers: list[Member] = field(default_factory=list)


def find_groups(unet: UNet, inputs: dict[str, object], heads: str = "narrow") -> list[Group]:
    """All groups of channels of a UNet.

    Args:
        unet: May be on the meta device.
        inputs: Arguments of one call, on the meta device.
        heads: ``"narrow"``: every head of an attention loses channels. ``"remove"``: whole heads are removed.
    """
    narrow = proxy(unet)
    graph = DependencyGraph()
    graph.build_dependency(narrow, example_inputs=inputs, verbose=False)
    names = {module: name for name, module in narrow.named_modules()}
    attentions = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    seen: set[Axis] = set()
    groups: list[Group] = []
    for module, side in _roots(narrow):
        if (names[module], side) in seen or module not in graph.module2node:
            continue
        group = _group(graph, names, module, side)
        seen.update(member.axis for member in group.members)
        groups.extend(_split_attention(_expanded(group, narrow, unet), attentions, heads))
    for group in groups:
        add_norm_borders(group, unet)
    return groups


def axis_size(unet: nn.Module, axis: Axis) -> int:
    """Number of output or input channels of a layer of a UNet."""
    return unet.get_submodule(axis[0]).weight.shape[0 if axis[1] == "out" else 1]


def _roots(unet: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    # A feed-forward starts from its last layer's inputs: GEGLU multiplies the two halves of its outputs, and starting
    # from these would treat the halves as different channels.
    for module in unet.modules():
        if isinstance(module, FeedForward):
            yield module.net[-1], "in"
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield module, "out"


def _group(graph: DependencyGraph, names: dict[nn.Module, str], module: nn.Module, side: str) -> Group:
    pruner = graph.get_pruner_of_module(module)
    if side == "out":
        prune, size = pruner.prune_out_channels, pruner.get_out_channels(module)
    else:
        prune, size = pruner.prune_in_channels, pruner.get_in_channels(module)
    members = []
    for item in graph.get_pruning_group(module, prune, list(range(size))):
        target = item.dep.target.module
        if isinstance(target, nn.Module) and target in names:
            # A norm has only one axis, and torch-pruning uses the same name for both ways of pruning it.
            writes = graph.is_out_channel_pruning_fn(item.dep.handler)
            order = torch.tensor(item.idxs).argsort()
            axis = (names[target], "out" if writes else "in")
            members.append(Member(axis, torch.tensor(item.idxs)[order], torch.tensor(item.root_idxs)[order]))
    return Group(size, members)


def _expanded(group: Group, narrow: nn.Module, unet: nn.Module) -> Group:
    """Convert a group of the proxy to a group of the UNet: each proxy channel becomes a run of UNet channels."""
    axis = group.members[0].axis
    run = axis_size(unet, axis) // axis_size(narrow, axis)

    def expand(channels: Tensor) -> Tensor:
        return (channels[:, None] * run + torch.arange(run)).flatten()

    members = [replace(member, index=expand(member.index), root=expand(member.root)) for member in group.members]
    return Group(group.size * run, members)


def _split_attention(group: Group, attentions: dict[str, Attention], heads: str) -> list[Group]:
    """Separate queries and keys from values: the graph couples them, but attention does only if heads are removed."""
    owner = next((n for m in group.members for n in attentions if m.axis == (f"{n}.to_q", "out")), None)
    if owner is None:
        return [group]
    size, head = group.size, group.size // attentions[owner].heads
    pair = {(f"{owner}.to_q", "out"), (f"{owner}.to_k", "out")}
    scores = [member for member in group.members if member.axis in pair]
    values = [member for member in group.members if member.axis not in pair]
    if heads == "remove":
        # A head affects the output only through its values: if these are zero, its queries do not matter.
        return [Group(size, values, unit=head, followers=scores)]
    return [Group(size, part, set(range(head, size, head))) for part in (scores, values)]


def add_norm_borders(group: Group, unet: nn.Module) -> None:
    """Add the starts of the UNet's norm groups to a group's borders, so that each norm group keeps its share."""
    for member in group.members:
        norm = unet.get_submodule(member.axis[0])
        if isinstance(norm, nn.GroupNorm):
            # Over concatenated inputs, norm groups can start anywhere in a source, and one may span two sources.
            number = member.index // (norm.num_channels // norm.num_groups)
            same_source = member.root[1:] == member.root[:-1] + 1
            group.borders.update(member.root[1:][same_source & (number[1:] != number[:-1])].tolist())


def choose(group: Group, scores: Tensor, count: int) -> Tensor:
    """Choose the channels of a group to keep: between two borders, those with the best scores, by proportional share.

    If all widths are pruned by the same share, every norm group and head keeps exactly that share.

    Args:
        group: The group.
        scores: Shape ``(size,)``.
        count: Number of channels to keep, in [1, size], a multiple of the group's unit.

    Returns:
        Mask of the kept channels, shape ``(size,)``.
    """
    if group.unit > 1:
        units = Group(group.size // group.unit, [])
        return choose(units, scores.view(-1, group.unit).sum(1), count // group.unit).repeat_interleave(group.unit)
    keep = torch.zeros(group.size, dtype=torch.bool)
    borders = [0, *sorted(group.borders), group.size]
    # Rounding the cumulative share at each border, not the share of each part, makes the parts add up to ``count``.
    kept = [(2 * border * count + group.size) // (2 * group.size) for border in borders]
    for start, end, less, more in zip(borders[:-1], borders[1:], kept[:-1], kept[1:], strict=True):
        order = scores[start:end].argsort(descending=True, stable=True)
        keep[start + order[: more - less]] = True
    return keep
