"""Small random denoisers of the real classes, and blocks of them that are made to do nothing."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from compress.data.calls import Call

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 3),
    "use_linear_projection": True,
}


def unet_of(**config: Any) -> UNet2DConditionModel:
    """Of Stable Diffusion's architecture: two layers a level, the innermost level plain as wide as the one before."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    config = {**defaults, **config}
    levels = len(config["block_out_channels"])
    config |= {key: tuple(config[key])[:levels] for key in ("down_block_types", "up_block_types")}
    return UNet2DConditionModel(**config).eval()


def sdxl_like(**config: Any) -> UNet2DConditionModel:
    """Two levels, of which the inner one attends with three transformer layers, as does the mid block."""
    return unet_of(block_out_channels=(8, 16), **{**SDXL, **config})


def unet_inputs(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    return {"sample": sample, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": text}


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        cross_attention_dim=8, caption_channels=6, norm_num_groups=1, use_additional_conditions=False,
    ).eval()  # fmt: skip


def sd3(dual: tuple[int, ...] = (0, 2)) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_attention_heads=2,
        attention_head_dim=4, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=10,
        pos_embed_max_size=8, dual_attention_layers=dual,
    ).eval()  # fmt: skip


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=6, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def transformer_inputs(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kind = type(model).__name__
    inputs: dict[str, Any] = {"encoder_hidden_states": normal(2, 5, 6), "timestep": torch.tensor([3, 700])}
    if "PixArt" in kind:
        inputs |= {"hidden_states": normal(2, 4, 8, 8), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    else:
        inputs["pooled_projections"] = normal(2, 10)
    if "SD3" in kind:
        inputs["hidden_states"] = normal(2, 4, 8, 8)
    if "Flux" in kind:
        inputs |= {
            "hidden_states": normal(2, 16, 4), "timestep": torch.tensor([0.1, 0.7]), "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 3.5]),
        }  # fmt: skip
    return {**inputs, "return_dict": False}


@torch.no_grad()
def calls_of(model: nn.Module, *inputs: dict[str, Any]) -> list[Call]:
    return [Call(one, model(**one)[0]) for one in inputs]


@torch.no_grad()
def passes_on(module: nn.Module) -> None:
    """Makes a resnet, an attention or a transformer block the identity, or a resnet over a skip that of its input."""
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        module.conv2.weight.zero_()
        module.conv2.bias.zero_()
        if module.conv_shortcut is not None:
            out = module.conv_shortcut.out_channels
            module.conv_shortcut.weight.zero_()
            module.conv_shortcut.weight[:, :out, 0, 0] = torch.eye(out)
            module.conv_shortcut.bias.zero_()
    elif kind == "Transformer2DModel":
        module.proj_out.weight.zero_()
        module.proj_out.bias.zero_()
    else:  # everything that a transformer block adds to its input passes one of these
        for name, layer in module.named_modules():
            if name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out")):
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
