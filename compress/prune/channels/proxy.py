"""Weightless copies of a UNet: as it is, or with few channels, for what depends on its architecture alone."""

import math
from typing import TypeAlias

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from compress.models.meta import meta_model

UNet: TypeAlias = UNet2DConditionModel | UNet2DModel


def proxy(unet: UNet) -> UNet:
    """The same UNet, meta_model and so narrow that the widths of its levels have no more in common than 2 channels.

    Every channel of it stands for a run of the UNet's, equally long on all levels, and depends on the others as those
    do: what takes time with the number of channels is done on it first.
    """
    config = unet.config
    run = max(1, math.gcd(*config["block_out_channels"]) // 2)
    if any(width % run for width in config["block_out_channels"]):
        run = 1
    one_head = 1 if isinstance(unet, UNet2DConditionModel) else None  # their number, or their width
    changes = {
        "block_out_channels": tuple(width // run for width in config["block_out_channels"]),
        "norm_num_groups": 1,
        "attention_head_dim": one_head,
        "time_embedding_dim": 2,
    }
    if config.get("attn_norm_num_groups"):
        changes["attn_norm_num_groups"] = 1
    narrow = meta_model(type(unet), {**config, **changes})
    add_shortcuts(narrow, unet)
    return narrow


def add_shortcuts(unet: UNet, like: UNet) -> None:
    """Give the first resnet of a level the shortcut of another UNet, where that one has it and this has none."""
    for level in range(1, len(like.down_blocks)):
        name = f"down_blocks.{level}.resnets.0"
        resnet = unet.get_submodule(name)
        if resnet.conv_shortcut is None and like.get_submodule(name).conv_shortcut is not None:
            resnet.conv_shortcut = nn.Conv2d(resnet.in_channels, resnet.out_channels, 1, device="meta")
