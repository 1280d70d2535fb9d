"""A small UNet of all kinds of blocks, and random inputs for any UNet."""

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from widen import randomize

from compress.data.calibration import Calibration, CalibrationConfig, calibrate


def calibration_of(unet: torch.nn.Module, count: int = 6, batch_size: int = 3) -> Calibration:
    config = CalibrationConfig(examples=count, batch_size=batch_size)
    return calibrate(SimpleNamespace(unet=unet, scheduler=DDPMScheduler()), None, config, 0)


def small_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    randomize(unet)
    return unet
