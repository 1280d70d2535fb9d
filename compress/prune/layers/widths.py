"""The widths of a UNet that can be set separately, and the smallest slices that can be removed from them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from compress.errors import UserError
from compress.prune.channels import groups as channels
from compress.prune.channels.groups import Axis, Group, Member
from compress.prune.channels.proxy import UNet
from compress.prune.channels.rebuild import plain_unet
from compress.prune.channels.widths import check_blocks, default_multiple

LARGE_MULTIPLE = 8  # channels: tensor cores process multiples of 8 in half precision


@dataclass(frozen=True)
class Width:
    """Groups of channels that lose the same share.

    Attributes:
        kind: One of :data:`compress.prune.per_layer.KINDS`.
        groups: Groups of coupled channels with this width: one group; queries with keys, and values, of an attention;
            or all streams that are concatenated before a norm.
        steps: Number of equal parts of the width, each with the same share of every norm group and every head.
        allowed: Allowed numbers of remaining parts, descending; the first is ``steps``.
    """

    kind: str
    groups: list[Group]
    steps: int
    allowed: list[int]

    def size(self, group: Group, left: int) -> int:
        """Number of channels of one of its groups if ``left`` parts remain."""
        return group.size * left // self.steps


def group_name(group: Group, kind: str) -> str:
    """The module that contains a group's channels; for a residual stream, the stream's first layer."""
    name = group.members[0].axis[0]
    inside = {"resnet_inner": ".conv1", "ffn_inner": ".net.", "attention": ".to_"}.get(kind)
    return name.rpartition(inside)[0] if inside else name


def find_widths(unet: UNet, heads: str, multiple: int | None, min_share: float) -> list[Width]:
    """All widths of a UNet that can be changed, with the slices that norm groups and heads allow.

    Streams that are concatenated before a norm, as in every up block, share one width: the norm's groups can start
    anywhere in a stream and may span two, so they would contain different channels if one stream lost a larger share.

    Args:
        unet: Only its config is used.
        heads: See :class:`compress.prune.per_layer.Config`.
        multiple: See :class:`compress.prune.per_layer.Config`.
        min_share: See :class:`compress.prune.per_layer.Config`.

    Raises:
        UserError: The UNet's architecture is unsupported, or it has factored layers.
    """
    check_blocks(unet.config)
    layers = unet.config.get("layers", {})
    if products := [name for name, shape in layers.items() if "rank" in shape]:
        raise UserError(
            f"this UNet cannot be pruned: {len(products)} of its layers are factored (the first: {products[0]}); "
            f"prune widths before ranks"
        )
    stock = UNet2DConditionModel if isinstance(unet, UNet2DConditionModel) else UNet2DModel
    plain, inputs = plain_unet(stock, {key: value for key, value in unet.config.items() if key != "layers"})
    groups = channels.find_groups(plain, inputs, heads)
    if layers:
        groups = _resized(groups, unet)
    if multiple is None:
        multiple = LARGE_MULTIPLE if default_multiple(unet.config) > 1 else 1
    found = []
    for kind, tied in _tied(groups, plain):
        steps = _steps(tied)
        found.append(Width(kind, tied, steps, list(_allowed(kind, tied, steps, multiple, min_share))))
    return found


def _resized(groups: list[Group], unet: UNet) -> list[Group]:
    """Convert the groups of a stock UNet to those of a shaped UNet made from it."""
    sizes = [channels.axis_size(unet, group.members[0].axis) for group in groups]
    shifts: dict[Axis, list[tuple[int, int]]] = {}  # start of a group's channels, and change of their number
    for group, size in zip(groups, sizes, strict=True):
        for member in [*group.members, *group.followers]:
            for start in member.index[:: group.size].tolist():
                shifts.setdefault(member.axis, []).append((start, size - group.size))

    def resized(member: Member, old: int, new: int) -> Member:
        starts = member.index[::old].tolist()  # a norm over concatenated streams may contain a stream twice
        moved = [start + sum(more for other, more in shifts[member.axis] if other < start) for start in starts]
        index = torch.cat([start + torch.arange(new) for start in moved])
        return Member(member.axis, index, torch.arange(new).repeat(len(moved)))

    found = []
    for group, size in zip(groups, sizes, strict=True):
        new = Group(
            size,
            [resized(member, group.size, size) for member in group.members],
            followers=[resized(member, group.size, size) for member in group.followers],
        )
        if _kind(group) == "attention":
            head = size // unet.get_submodule(group_name(group, "attention")).heads
            if group.followers:
                new.unit = head
            else:
                new.borders = set(range(head, size, head))
        channels.add_norm_borders(new, unet)
        found.append(new)
    return found


def _kind(group: Group) -> str | None:
    """The kind of a group's width; None if it is fixed: that of the prediction and of the time embedding."""
    written = {name for name, side in (member.axis for member in group.members) if side == "out"}
    if any(name == "conv_out" or name.startswith("time_embedding.") for name in written):
        return None
    if any(name.endswith((".to_q", ".to_v")) for name in written):
        return "attention"
    name, side = group.members[0].axis
    if side == "in":
        return "ffn_inner"  # all other groups are found from a layer's output
    return "resnet_inner" if name.endswith(".conv1") else "residual"


def _tied(groups: list[Group], unet: nn.Module) -> Iterator[tuple[str, list[Group]]]:
    """Groups that must be narrowed together, with their kind."""
    owners: dict[str, list[int]] = {}  # module whose channels belong to several groups, to these groups
    for number, group in enumerate(groups):
        for name, _ in {member.axis for member in group.members}:
            outer, _, layer = name.rpartition(".")
            if isinstance(unet.get_submodule(name), nn.GroupNorm):
                owners.setdefault(name, []).append(number)
            elif layer in ("to_q", "to_v") and _kind(group) == "attention":
                owners.setdefault(outer, []).append(number)
    label = list(range(len(groups)))
    for first, *others in owners.values():
        merged = {label[number] for number in others}
        label = [label[first] if one in merged else one for one in label]
    for one in sorted(set(label), key=label.index):
        tied = [group for group, of in zip(groups, label, strict=True) if of == one]
        if (kind := _kind(tied[0])) is not None:
            yield kind, tied


def _steps(groups: list[Group]) -> int:
    if groups[0].unit > 1:
        return groups[0].size // groups[0].unit
    borders = [sorted({0, *group.borders, group.size}) for group in groups]
    return math.gcd(*(end - start for ends in borders for start, end in zip(ends[:-1], ends[1:], strict=True)))


def _allowed(kind: str, groups: list[Group], steps: int, multiple: int, min_share: float) -> Iterator[int]:
    # The width of each narrowed head must fit attention kernels; whole heads keep their width.
    heads = len(groups[0].borders) + 1 if kind == "attention" else 1
    for left in range(steps, 0, -1):
        sizes = [group.size * left // steps for group in groups]
        if left == steps or (left >= min_share * steps and all(size % (heads * multiple) == 0 for size in sizes)):
            yield left
