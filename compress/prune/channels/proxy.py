"""A meta-device copy of a UNet with few channels, to analyze its architecture."""

import math
from typing import TypeAlias

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from compress.models.meta import meta_model

UNet: TypeAlias = UNet2DConditionModel | UNet2DModel


def proxy(unet: UNet) -> UNet:
    """Build a narrow copy on the meta device; the greatest common divisor of its widths is usually 2.

    Each of its channels represents a run of the UNet's channels, of the same length on all levels and with the same
    dependencies. Analyses whose time grows with the number of channels run on this copy.
    """
    config = unet.config
    run = max(1, math.gcd(*config["block_out_channels"]) // 2)
    if any(width % run for width in config["block_out_channels"]):
        run = 1
    one_head = 1 if isinstance(unet, UNet2DConditionModel) else None  # number of heads, or width of a head
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
    """Add a shortcut to the first resnet of each level where ``like`` has one and ``unet`` does not."""
    for level in range(1, len(like.down_blocks)):
        name = f"down_blocks.{level}.resnets.0"
        resnet = unet.get_submodule(name)
        if resnet.conv_shortcut is None and like.get_submodule(name).conv_shortcut is not None:
            resnet.conv_shortcut = nn.Conv2d(resnet.in_channels, resnet.out_channels, 1, device="meta")
