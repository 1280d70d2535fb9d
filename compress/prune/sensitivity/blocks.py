"""Sensitivity of each block, and of each attention's heads, to the removal of inner channels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from compress.models.inputs import example_inputs
from compress.prune.channels import groups as channels
from compress.prune.channels.groups import Group
from compress.prune.importance.score import Scorer
from compress.prune.sensitivity.error import Error, UnchangedPrediction
from compress.system.progress import track

Measured = dict[str, dict[float, Error]]
"""Name of a module to removed share to the error of the prediction."""


def inner_groups(unet: Any) -> dict[str, list[Group]]:
    """The groups of channels inside one block only, by the name of their resnet or transformer."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        empty = type(unet).from_config(config)
    inputs = example_inputs(unet)
    blocks = [
        f"{outer}.{index}"
        for outer, module in unet.named_modules()
        if outer.rpartition(".")[2] in ("resnets", "attentions")
        for index in range(len(module))
    ]
    found: dict[str, list[Group]] = {name: [] for name in blocks}
    for group in channels.find_groups(empty, {**inputs, "return_dict": False}):
        where = {_block_of(member.axis[0], blocks) for member in group.members}
        if len(where) == 1 and (block := where.pop()) is not None:
            found[block].append(group)
    return {name: groups for name, groups in found.items() if groups}


def _block_of(layer: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if layer.startswith(f"{block}.")), None)


def measure_blocks(
    unet: nn.Module,
    groups: dict[str, list[Group]],
    scorer: Scorer,
    reference: UnchangedPrediction,
    ratios: Sequence[float],
) -> Measured:
    """Remove the least important inner channels from one block at a time.

    Args:
        unet: Its weights are changed temporarily and restored.
        groups: The result of :func:`inner_groups`.
        scorer: Scores the channels.
        reference: Predictions of the unchanged UNet.
        ratios: Shares of each group's channels to remove, each in (0, 1).
    """
    weights = dict(unet.state_dict())
    found: Measured = {}
    for block, ratio in track(
        [(block, ratio) for block in groups for ratio in sorted(ratios)], "sensitivity of blocks"
    ):
        masks = []
        for group in groups[block]:
            kept = max(1, round(group.size * (1 - ratio)))
            masks.append((group, channels.choose(group, scorer(group, weights), kept)))
        with unread(unet, masks):
            found.setdefault(block, {})[ratio] = reference.error(unet)
    return found


def measure_heads(
    unet: nn.Module,
    groups: dict[str, list[Group]],
    scorer: Scorer,
    reference: UnchangedPrediction,
    ratios: Sequence[float],
) -> Measured:
    """Remove the least important heads from one attention at a time.

    Args:
        unet: See :func:`measure_blocks`.
        groups: See :func:`measure_blocks`.
        scorer: Scores the channels; a head's score is the sum over its channels.
        reference: Predictions of the unchanged UNet.
        ratios: Shares of an attention's heads to remove, rounded to whole heads.
    """
    weights = dict(unet.state_dict())
    tried = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            group = next(g for block in groups.values() for g in block if _is_value(g, name))
            order = scorer(group, weights).view(module.heads, -1).sum(1).argsort(stable=True)
            counts = sorted({min(max(1, round(ratio * module.heads)), module.heads) for ratio in ratios})
            tried += [(name, group, order[:count], module.heads) for count in counts]
    found: Measured = {}
    for name, group, gone, heads in track(tried, "sensitivity of heads"):
        mask = torch.ones(heads, group.size // heads, dtype=torch.bool)
        mask[gone] = False
        with unread(unet, [(group, mask.flatten())]):
            found.setdefault(name, {})[len(gone) / heads] = reference.error(unet)
    return found


def _is_value(group: Group, attention: str) -> bool:
    return any(member.axis == (f"{attention}.to_v", "out") for member in group.members)


@contextmanager
@torch.no_grad()
def unread(unet: nn.Module, masks: Sequence[tuple[Group, Tensor]]) -> Iterator[None]:
    """Temporarily set to zero the weights that read some channels, inside the block only.

    Norms still use these channels. For queries and keys, which no layer reads, the keys are set to 0.

    Args:
        unet: Its weights are changed and restored on exit.
        masks: Groups with masks of the channels to keep, ``(size,)``.
    """
    before: dict[str, Tensor] = {}
    parameters = dict(unet.named_parameters())
    try:
        for group, keep in masks:
            readers = [member for member in group.members if member.axis[1] == "in"]
            readers = readers or [member for member in group.members if member.axis[0].endswith(".to_k")]
            for member in readers:
                name, side = member.axis
                gone = member.index[~keep[member.root]]
                for key in (f"{name}.weight", f"{name}.bias"):
                    if key in parameters and not (side == "in" and key.endswith("bias")):
                        before.setdefault(key, parameters[key].detach().clone())
                        parameters[key].index_fill_(1 if side == "in" else 0, gone.to(parameters[key].device), 0)
        yield
    finally:
        for key, weight in before.items():
            parameters[key].copy_(weight)
