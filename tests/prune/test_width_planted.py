"""The planted proof: pruning finds the twins of a widened UNet, and what is left computes what the small one did."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.prune.by_magnitude import prune_channels
from tests.prune.widen import randomize, widen

PLAIN_LAST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PLAIN_FIRST = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
THREE_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
CASES = {
    "two levels": {**PLAIN_LAST, "block_out_channels": (8, 16)},
    "equal widths": {**PLAIN_FIRST, "block_out_channels": (16, 16), "layers_per_block": 2},
    # (24 + 16) / 8 channels in a group: groups that span both concatenated sources and start anywhere in them.
    "norm groups across sources": {**PLAIN_FIRST, "block_out_channels": (16, 24), "norm_num_groups": 8},
    "linear projections": {
        **PLAIN_LAST,
        "block_out_channels": (16, 24),
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (2, 1),
    },
    "like the default": {
        **THREE_LEVELS,
        "block_out_channels": (16, 24, 40),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "layers_per_block": 2,
    },
    "no mid block": {**PLAIN_LAST, "block_out_channels": (8, 16), "mid_block_type": None, "norm_num_groups": 2},
}


def small_unet(**config: object) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    unet = UNet2DConditionModel(**{**defaults, **config}).eval()
    randomize(unet)
    return unet


@pytest.mark.parametrize(("case", "importance"), [*((case, "l2") for case in CASES), ("linear projections", "l1")])
@torch.no_grad()
def test_twins_go_and_the_function_stays(case: str, importance: str) -> None:
    torch.manual_seed(sum(map(ord, case)))
    small = small_unet(**CASES[case])
    wide, originals = widen(small)
    inputs = (torch.randn(3, 4, 8, 8), torch.tensor([0, 421, 999]), torch.randn(3, 5, 12))
    wanted = small(*inputs).sample
    limit = 1e-5 * wanted.abs().max()
    assert (wide(*inputs).sample - wanted).abs().max() < limit, "the widened model is another function"
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}

    with torch.enable_grad():
        report = prune_channels(wide, ratio=0.5, importance=importance)

    assert report.kept == originals
    assert report.widths_after == list(small.config.block_out_channels)
    assert report.norms_regrouped == []
    assert report.time_residual < 1e-6
    for name, tensor in report.unet.state_dict().items():
        if not name.startswith("time_embedding.linear_1"):
            torch.testing.assert_close(tensor, small.state_dict()[name], rtol=1e-6, atol=0, msg=name)
    assert (report.unet(*inputs).sample - wanted).abs().max() < limit
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the model given was changed"
