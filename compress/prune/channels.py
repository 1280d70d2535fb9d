"""Groups of coupled channels of a UNet, from torch-pruning's dependency graph, and which of them to keep.

A group is a set of channels that several layers share and that can only be removed from all of them together: a
residual stream, the inner width of a resnet, the hidden width of a feed-forward, queries with keys, values with what
reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch_pruning import DependencyGraph

Axis = tuple[str, str]  # module name, and "out" or "in": the axis of its weight that counts output or input channels


@dataclass
class Member:
    """The part of one layer's axis that belongs to a group.

    Attributes:
        axis: Which axis of which layer.
        index: Channels of the layer, ascending, shape ``(n,)``.
        root: The group's channel that each of them is, shape ``(n,)``.
    """

    axis: Axis
    index: Tensor
    root: Tensor


@dataclass
class Group:
    """Coupled channels.

    Attributes:
        size: Number of channels.
        members: Where they occur.
        borders: Channels at which another norm group or another head starts; the same share is kept between any
            two of them.
    """

    size: int
    members: list[Member]
    borders: set[int] = field(default_factory=set)


def find_groups(unet: nn.Module, inputs: dict[str, object]) -> list[Group]:
    """All groups of channels of a UNet.

    Args:
        unet: Needs no weights: may be on the meta device, but must take gradients.
        inputs: Arguments of one call of it.
    """
    graph = DependencyGraph()
    graph.build_dependency(unet, example_inputs=inputs, verbose=False)
    names = {module: name for name, module in unet.named_modules()}
    attentions = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    seen: set[Axis] = set()
    groups: list[Group] = []
    for module, side in _roots(unet):
        if (names[module], side) in seen or module not in graph.module2node:
            continue
        group = _group(graph, names, module, side)
        seen.update(member.axis for member in group.members)
        groups.extend(_split_attention(group, attentions))
    for group in groups:
        _add_norm_borders(group, unet)
    return groups


def _roots(unet: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    # A feed-forward starts from its last layer's inputs: starting from GEGLU's outputs would take its two halves, which
    # are multiplied with each other, for different channels.
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
            # A norm has one axis only, and torch-pruning calls both ways of pruning it the same.
            writes = graph.is_out_channel_pruning_fn(item.dep.handler)
            order = torch.tensor(item.idxs).argsort()
            axis = (names[target], "out" if writes else "in")
            members.append(Member(axis, torch.tensor(item.idxs)[order], torch.tensor(item.root_idxs)[order]))
    return Group(size, members)


def _split_attention(group: Group, attentions: dict[str, Attention]) -> list[Group]:
    """Take queries and keys apart from values: the graph couples them, attention does not."""
    owner = next((n for m in group.members for n in attentions if m.axis == (f"{n}.to_q", "out")), None)
    if owner is None:
        return [group]
    size, head = group.size, group.size // attentions[owner].heads
    pair = {(f"{owner}.to_q", "out"), (f"{owner}.to_k", "out")}
    scores = [member for member in group.members if member.axis in pair]
    values = [member for member in group.members if member.axis not in pair]
    return [Group(size, part, set(range(head, size, head))) for part in (scores, values)]


def _add_norm_borders(group: Group, unet: nn.Module) -> None:
    for member in group.members:
        norm = unet.get_submodule(member.axis[0])
        if isinstance(norm, nn.GroupNorm):
            # Over concatenated inputs a norm's groups start anywhere in a source, and one may span two sources.
            number = member.index // (norm.num_channels // norm.num_groups)
            same_source = member.root[1:] == member.root[:-1] + 1
            group.borders.update(member.root[1:][same_source & (number[1:] != number[:-1])].tolist())


def choose(group: Group, scores: Tensor, count: int) -> Tensor:
    """Which ``count`` channels of a group to keep: the best between any two borders, as many as their share.

    Where all widths are pruned by the same share, every norm group and head keeps exactly that share.

    Args:
        group: The group.
        scores: Shape ``(size,)``.
        count: How many to keep, in [1, size].

    Returns:
        Mask of those kept, shape ``(size,)``.
    """
    keep = torch.zeros(group.size, dtype=torch.bool)
    borders = [0, *sorted(group.borders), group.size]
    # Rounding the share up to each border, not the share of each part, makes the parts sum up.
    kept = [(2 * border * count + group.size) // (2 * group.size) for border in borders]
    for start, end, less, more in zip(borders[:-1], borders[1:], kept[:-1], kept[1:], strict=True):
        order = scores[start:end].argsort(descending=True, stable=True)
        keep[start + order[: more - less]] = True
    return keep
