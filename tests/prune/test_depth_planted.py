"""The planted proof: blocks that are the identity are found and removed, and the output stays."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compress.prune.blocks.effect import prediction_error
from compress.prune.depth import Config, DepthTarget, prune_depth
from tests.prune.blocks_models import (
    calls_of,
    flux,
    passes_on,
    pixart,
    sd3,
    sdxl_like,
    transformer_inputs,
    unet_inputs,
    unet_of,
)

DOWN, UP = "down_blocks.1", "up_blocks.1"  # of the middle level of three
LAYER = [f"{block}.{part}.1" for block in (DOWN, UP) for part in ("resnets", "attentions")]
CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str], dict[str, object]]] = {
    "layer": (unet_of, LAYER, [f"{DOWN}.resnets.1 and {UP}.resnets.1"], {"layers_per_block": [2, 1, 2]}),
    "attentions": (
        unet_of,
        [f"up_blocks.2.attentions.{i}" for i in range(3)],
        ["attentions of up_blocks.2"],
        {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
    ),
    "mid block": (
        unet_of,
        ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"],
        ["mid_block"],
        {"mid_block_type": None},
    ),
    "half of the mid block": (
        unet_of,
        ["mid_block.attentions.0", "mid_block.resnets.0"],
        ["mid_block but for mid_block.resnets.1"],
        {"mid_block_type": "UNetMidBlock2D"},
    ),
    "two things": (
        unet_of,
        [*LAYER, "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"],
        ["mid_block", f"{DOWN}.resnets.1 and {UP}.resnets.1"],
        {"layers_per_block": [2, 1, 2], "mid_block_type": None},
    ),
    "transformer layer": (
        sdxl_like,
        ["up_blocks.0.attentions.1.transformer_blocks.1"],
        ["up_blocks.0.attentions.1.transformer_blocks.1"],
        {
            "transformer_layers_per_block": [1, [3, 3]],
            "reverse_transformer_layers_per_block": [[3, 2, 3], 1],
        },
    ),
    "transformer layers that share an entry": (
        sdxl_like,
        ["mid_block.attentions.0.transformer_blocks.2", "down_blocks.1.attentions.0.transformer_blocks.2"],
        ["down_blocks.1.attentions.0.transformer_blocks.2 and mid_block.attentions.0.transformer_blocks.2"],
        {
            "transformer_layers_per_block": [1, [2, 3]],
            "reverse_transformer_layers_per_block": [[3, 3, 3], 1],
        },
    ),
    "PixArt": (pixart, ["transformer_blocks.1"], ["transformer_blocks.1"], {"num_layers": 3}),
    "SD3": (
        sd3,
        ["transformer_blocks.1"],
        ["transformer_blocks.1"],
        {"num_layers": 3, "dual_attention_layers": (0, 1)},
    ),
    "Flux": (
        flux,
        ["transformer_blocks.0", "single_transformer_blocks.2"],
        ["transformer_blocks.0", "single_transformer_blocks.2"],
        {"num_layers": 2, "num_single_layers": 2},
    ),
}


def randomized(model: nn.Module) -> nn.Module:
    """With norms and output layers as in a trained model, which some classes start at 1 and 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.abs().max():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def costs_of(model: nn.Module, names: list[str]) -> float:
    total = sum(parameter.numel() for parameter in model.parameters())
    return 1 - sum(p.numel() for name in names for p in model.get_submodule(name).parameters()) / total


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_identities_are_found_and_the_output_stays(case: str) -> None:
    make, idle, removed, change = CASES[case]
    model = randomized(make())
    for name in idle:
        passes_on(model.get_submodule(name))
    inputs = transformer_inputs(model) if "Transformer" in type(model).__name__ else unet_inputs(model)
    calls = calls_of(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    report = prune_depth(model, calls, Config(target=DepthTarget(params=costs_of(model, idle) + 1e-6)))

    assert sorted(step["name"] for step in report.removed) == sorted(removed)
    assert report.config_after == change
    assert all(step["error"] < 1e-5 for step in report.removed)
    assert prediction_error(report.denoiser, calls) < 1e-5
    others = [name for name in report.effects if name not in removed and not name.startswith("mid_block")]
    assert min(report.effects[name] for name in others) > 1e-4, "some other block does nothing, too"
    assert report.params_after == sum(p.numel() for p in report.denoiser.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the model given was changed"


@torch.no_grad()
def test_a_level_that_nothing_reads_goes_with_its_mid_block() -> None:
    unet = randomized(unet_of())
    first = unet.up_blocks[1].resnets[0]  # reads the innermost level in its first 16 channels, the skip in the others
    first.conv1.weight[:, :16] = 0
    first.conv_shortcut.weight[:, :16] = 0
    calls = calls_of(unet, unet_inputs(unet))
    report = prune_depth(unet, calls, Config(target=DepthTarget(params=0.65), remove=("levels",)))
    assert [step["name"] for step in report.removed] == ["level 2"]
    assert report.config_after["block_out_channels"] == (8, 16)
    assert report.config_after["mid_block_type"] is None
    assert prediction_error(report.denoiser, calls) < 1e-5
    assert {name: old for name, old in report.blocks.items() if name.count(".") == 1} == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": None,
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
    }
    assert report.blocks["up_blocks.1.resnets.1"] == "up_blocks.2.resnets.1"
