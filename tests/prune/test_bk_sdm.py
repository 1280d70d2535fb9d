"""BK-SDM's architectures: published sizes, which layers are kept, and what is refused."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from compress.config.values import build
from compress.errors import UserError
from compress.models.meta import meta_model
from compress.prune.bk_sdm import Config, prune_bk_sdm, reduced
from compress.prune.blocks.unet import read_unet
from tests.prune.blocks_models import sdxl_like, unet_inputs, unet_of


@pytest.mark.parametrize(("size", "millions"), [("base", 579.4), ("small", 482.3), ("tiny", 323.4)])
def test_published_sizes_from_stable_diffusion_1(size: str, millions: float) -> None:
    config = meta_model(UNet2DConditionModel, {"cross_attention_dim": 768}).config
    left, skipped = reduced(read_unet(config), size)
    params = sum(p.numel() for p in meta_model(UNet2DConditionModel, left.config()).parameters())
    assert params / 1e6 == pytest.approx(millions, abs=0.05)
    assert skipped == {}


def test_the_layers_kept_are_the_published_ones() -> None:
    config = meta_model(UNet2DConditionModel, {}).config
    small, tiny = (reduced(read_unet(config), size)[0].names() for size in ("small", "tiny"))
    for level in range(4):
        assert small[f"down_blocks.{level}.resnets.0"] == f"down_blocks.{level}.resnets.0"
        assert f"down_blocks.{level}.resnets.1" not in small
        assert small[f"up_blocks.{level}.resnets.0"] == f"up_blocks.{level}.resnets.0"
        assert small[f"up_blocks.{level}.resnets.1"] == f"up_blocks.{level}.resnets.2"
        assert f"up_blocks.{level}.resnets.2" not in small
    assert small["up_blocks.1.attentions.1.transformer_blocks.0"] == "up_blocks.1.attentions.2.transformer_blocks.0"
    for block in range(3):
        assert tiny[f"up_blocks.{block}.resnets.0"] == f"up_blocks.{block + 1}.resnets.0"
        assert tiny[f"up_blocks.{block}.attentions.1"] == f"up_blocks.{block + 1}.attentions.2"
    assert tiny["up_blocks.0.upsamplers.0"] == "up_blocks.1.upsamplers.0"
    assert not any("mid_block" in name for name in [*small, *tiny])


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
@torch.no_grad()
def test_weights_are_copied_and_the_report_adds_up(size: str) -> None:
    unet = unet_of()
    report = prune_bk_sdm(unet, size)
    found = dict(report.denoiser.named_parameters())
    assert torch.equal(
        found[f"up_blocks.{2 - (size == 'tiny')}.resnets.1.conv1.weight"], unet.up_blocks[2].resnets[2].conv1.weight
    )
    assert report.params_before == sum(p.numel() for p in unet.parameters())
    assert report.params_after == sum(p.numel() for p in found.values())
    assert report.macs_after < report.macs_before
    assert report.config_after["layers_per_block"] == 1
    assert ("mid_block_type" in report.config_after) == (size != "base")
    assert report.denoiser(**unet_inputs(unet))[0].isfinite().all()
    found["conv_in.weight"].zero_()
    assert unet.conv_in.weight.abs().max() > 0, "the new model shares its weights with the one given"


def test_one_layer_a_level_leaves_the_mid_block_to_remove() -> None:
    unet = unet_of(layers_per_block=1)
    with pytest.raises(UserError, match="size=base: this UNet has nothing that BK-SDM removes"):
        prune_bk_sdm(unet, "base")
    report = prune_bk_sdm(unet, "small")
    assert report.config_after == {"mid_block_type": None}
    assert report.skipped == {f"layers of level {i}": "there is one" for i in range(3)}


def test_a_level_that_cannot_go() -> None:
    message = "size=tiny: no stock config can express the result for this UNet: up_blocks.1.resnets.0 reads 24 + 16"
    with pytest.raises(UserError, match=re.escape(message)):
        prune_bk_sdm(unet_of(block_out_channels=(8, 16, 24)), "tiny")


def test_several_transformer_layers_stay() -> None:
    report = prune_bk_sdm(sdxl_like(), "base")
    attention = report.denoiser.up_blocks[0].attentions[1]
    assert [len(attention.transformer_blocks), len(report.denoiser.up_blocks[0].attentions)] == [3, 2]


def test_bad_sizes_and_other_denoisers() -> None:
    with pytest.raises(UserError, match=r"stages.prune.size=big: expected base or small or tiny"):
        build(Config, {"size": "big"}, "stages.prune")
    with pytest.raises(UserError, match="this denoiser is a Linear"):
        prune_bk_sdm(torch.nn.Linear(1, 1))
