"""Probe inputs fit the denoisers they are made for."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from compress.models.probe import PROBE_SIDE, layer_macs, probe_inputs, probe_output
from tests.tiny import tiny_unet


def test_inputs_are_the_same_every_time_and_other_seeds_differ():
    unet = tiny_unet()
    first, again, other = probe_inputs(unet), probe_inputs(unet), probe_inputs(unet, seed=1)
    assert torch.equal(first["sample"], again["sample"]) and not torch.equal(first["sample"], other["sample"])
    assert first["sample"].shape == (2, 4, 8, 8)
    assert probe_output(unet, first).shape == (2, 4, 8, 8)


def test_large_latents_are_probed_small():
    assert probe_inputs(tiny_unet(sample_size=128))["sample"].shape == (2, 4, PROBE_SIDE, PROBE_SIDE)


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
    assert probe_output(unet, probe_inputs(unet)).shape == (2, 4, 8, 8)
    assert unet.training  # left as it was


def test_an_unknown_denoiser_has_no_inputs():
    assert probe_inputs(nn.Linear(2, 2)) is None


def test_macs_of_a_convolution_by_hand():
    unet = tiny_unet()
    layers, total = layer_macs(unet, probe_inputs(unet))
    assert layers["conv_in"] == 2 * 8 * 8 * 4 * 32 * 9
    assert sum(count for name, count in layers.items() if type(unet.get_submodule(name)) is nn.Conv2d) < total
