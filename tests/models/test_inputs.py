"""Example inputs fit the denoisers they are made for."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from pipelines import PIPELINES
from torch import nn

from compress.models.inputs import SMALL_SIDE, predict, small_inputs, smaller
from tests.tiny import tiny_unet


def test_inputs_are_the_same_every_time_and_other_seeds_differ():
    unet = tiny_unet()
    first, again, other = small_inputs(unet), small_inputs(unet), small_inputs(unet, seed=1)
    assert torch.equal(first["sample"], again["sample"]) and not torch.equal(first["sample"], other["sample"])
    assert first["sample"].shape == (2, 4, 8, 8)
    assert predict(unet, first).shape == (2, 4, 8, 8)


def test_large_latents_are_probed_small():
    assert small_inputs(tiny_unet(sample_size=128))["sample"].shape == (2, 4, SMALL_SIDE, SMALL_SIDE)


def test_sdxl_gets_its_extra_conditions():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    unet.train()
    assert predict(unet, small_inputs(unet)).shape == (2, 4, 8, 8)
    assert unet.training  # left as it was


def test_an_unknown_denoiser_has_no_inputs():
    assert small_inputs(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("name", "sides"), [("sd 1.x", (2, 8, 16)), ("pixart", (16, 16, 64)), ("flux", (4, 8, 72))])
def test_a_smaller_size_has_whole_patches_of_latents(name: str, sides: tuple[int, ...]) -> None:
    pipeline = PIPELINES[name]()
    assert [smaller(pipeline, most) for most in (1, 8, 73)] == [(side, side) for side in sides]
