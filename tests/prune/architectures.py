"""Small random denoisers of every architecture whose channels can be removed."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.prune.widen import randomize

UNet = UNet2DConditionModel | UNet2DModel

SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
SD2 = {
    **SD1,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "use_linear_projection": True,
    "attention_head_dim": [2, 4, 4],
}
SDXL = {
    **SD1,
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "use_linear_projection": True,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
# One layer a block, then no mid block, then a level less (Kim et al. 2023, arXiv:2305.15798).
BK_SDM_SMALL = {**SD1, "layers_per_block": 1, "mid_block_type": None}
BK_SDM_TINY = {
    **BK_SDM_SMALL,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
DDPM: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
}

ARCHITECTURES: dict[str, tuple[type[UNet], dict[str, Any]]] = {
    "sd 1.x": (UNet2DConditionModel, SD1),
    "sd 2.x": (UNet2DConditionModel, SD2),
    "sdxl": (UNet2DConditionModel, SDXL),
    "inpainting": (UNet2DConditionModel, {**SD1, "in_channels": 9, "layers_per_block": 1}),
    "bk-sdm base": (UNet2DConditionModel, {**SD1, "layers_per_block": 1}),
    "bk-sdm small": (UNet2DConditionModel, BK_SDM_SMALL),
    "bk-sdm tiny": (UNet2DConditionModel, BK_SDM_TINY),
    "ddpm": (UNet2DModel, DDPM),
    "ddpm with heads": (UNet2DModel, {**DDPM, "attention_head_dim": 4}),
}


def random_unet(name: str, width: int = 1, **changes: Any) -> UNet:
    """An architecture with random weights.

    Args:
        name: One of :data:`ARCHITECTURES`.
        width: Factor on all widths.
        changes: Of its config.
    """
    cls, config = ARCHITECTURES[name]
    widths = tuple(width * channels for channels in config["block_out_channels"])
    torch.manual_seed(sum(map(ord, name)))
    unet = cls(**{**config, "block_out_channels": widths, **changes}).eval()
    randomize(unet)
    return unet
