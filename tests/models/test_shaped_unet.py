"""UNets with layers of other shapes: built, saved, copied, and the same as what they were made from."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from compress.models.compressed_model import ShapedUNet2DConditionModel, reshape
from compress.models.inputs import predict, small_inputs
from compress.models.shapes import shaped
from tests.prune.architectures import ARCHITECTURES, UNet, random_unet

Parts = tuple[dict[str, dict[str, int]], dict[str, torch.Tensor]]


def rows(weights: dict[str, torch.Tensor], name: str, keep: torch.Tensor, dim: int = 0) -> None:
    for key in (f"{name}.weight", *([f"{name}.bias"] if dim == 0 and f"{name}.bias" in weights else [])):
        weights[key] = weights[key].index_select(dim, keep)


def without_silent_channels(unet: UNet) -> Parts:
    """Every other channel inside ResNets, every other head and part of the feed-forwards, after they were silenced."""
    layers: dict[str, dict[str, int]] = {}
    weights = dict(unet.state_dict())

    def cut(name: str, keep: torch.Tensor, side: str) -> None:
        layer = unet.get_submodule(name)
        if isinstance(layer, nn.GroupNorm):
            layers[name] = {"channels": len(keep)}
            return rows(weights, name, keep)
        linear = isinstance(layer, nn.Linear)
        ends = (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)
        layers.setdefault(name, dict(zip(("in", "out"), ends, strict=True)))[side] = len(keep)
        return rows(weights, name, keep, 0 if side == "out" else 1)

    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            # A whole norm group of zeros goes; its channels are silent, so the other groups' statistics stay.
            width = module.norm2.num_channels // module.norm2.num_groups
            keep = torch.arange(module.norm2.num_channels).reshape(-1, width)[:, : width // 2].flatten()
            for part, side in (("conv1", "out"), ("time_emb_proj", "out"), ("norm2", "out"), ("conv2", "in")):
                cut(f"{name}.{part}", keep, side)
        elif kind == "Attention" and module.heads > 1:
            heads, channels = module.heads // 2, module.inner_dim // module.heads
            keep = torch.arange(heads * channels)
            layers[name] = {"heads": heads}
            for part, side in (("to_q", "out"), ("to_k", "out"), ("to_v", "out"), ("to_out.0", "in")):
                cut(f"{name}.{part}", keep, side)
        elif kind == "FeedForward":
            inner = module.net[2].in_features
            keep = torch.arange(inner // 2)
            cut(f"{name}.net.0.proj", torch.cat([keep, keep + inner]), "out")
            cut(f"{name}.net.2", keep, "in")
    return layers, weights


def silence(unet: UNet) -> None:
    """Makes what :func:`without_silent_channels` removes superfluous: twins in ResNets, zero outputs elsewhere."""
    with torch.no_grad():
        for module in unet.modules():
            kind = type(module).__name__
            if kind == "ResnetBlock2D":
                half = module.norm2.num_channels // module.norm2.num_groups // 2
                for layer in (module.conv1, module.time_emb_proj, module.norm2):
                    for tensor in (layer.weight, layer.bias):
                        pairs = tensor.view(module.norm2.num_groups, 2, half, -1)
                        pairs[:, 1] = pairs[:, 0]
                module.conv2.weight.view(len(module.conv2.weight), module.norm2.num_groups, 2, half, -1)[:, :, 1] = 0
            elif kind == "Attention" and module.heads > 1:
                module.to_out[0].weight[:, module.inner_dim // 2 :] = 0
            elif kind == "FeedForward":
                module.net[2].weight[:, module.net[2].in_features // 2 :] = 0


def factors(unet: UNet) -> Parts:
    """Every convolution and linear layer as a product of two, of full rank."""
    layers: dict[str, dict[str, int]] = {}
    weights = dict(unet.state_dict())
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = weights.pop(f"{name}.weight")
            left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
            rank = len(values)
            reduce = (values[:, None] * right).to(weight.dtype).reshape(rank, *weight.shape[1:])
            expand = left.to(weight.dtype).reshape(len(weight), rank, *[1] * (weight.dim() - 2))
            layers[name] = {"in": weight.shape[1], "out": weight.shape[0], "rank": rank}
            weights |= {f"{name}.reduce.weight": reduce.contiguous(), f"{name}.expand.weight": expand.contiguous()}
            if f"{name}.bias" in weights:
                weights[f"{name}.expand.bias"] = weights.pop(f"{name}.bias")
    return layers, weights


def difference(one: UNet, other: UNet) -> float:
    inputs = small_inputs(one)
    assert inputs is not None
    expected = predict(one, inputs)
    return ((predict(other, inputs) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_and_ranks_of_every_architecture(name: str, tmp_path: Any) -> None:
    unet = random_unet(name, width=2)
    silence(unet)
    narrow = shaped(unet, *without_silent_channels(unet))
    assert narrow.num_parameters() < 0.8 * unet.num_parameters()
    assert difference(unet, narrow) < 1e-5
    both = shaped(narrow, *factors(narrow))
    assert difference(unet, both) < 1e-5
    both.save_pretrained(tmp_path)
    assert difference(both, type(both).from_pretrained(tmp_path)) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_told_to_a_stock_unet(name: str) -> None:
    unet = random_unet(name)

    def remembered() -> dict[str, dict[str, Any]]:
        plain = (int, float, str, bool, type(None))
        return {
            name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
            for name, module in unet.named_modules()
        }

    before = remembered()
    reshape(unet, {})
    assert remembered() == before


def test_all_else_is_kept() -> None:
    unet = random_unet("sd 1.x").double().train().requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    unet.enable_gradient_checkpointing()
    unet.set_default_attn_processor()
    layers, weights = factors(unet)
    new = shaped(unet, layers, weights)
    assert new.training and new.is_gradient_checkpointing and new.dtype == torch.float64
    assert {type(p) for p in new.attn_processors.values()} == {type(p) for p in unet.attn_processors.values()}
    assert new.conv_in.reduce.weight.requires_grad and not new.conv_norm_out.weight.requires_grad
    new(**small_inputs(new)).sample.sum().backward()
    assert new.conv_in.reduce.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"conv_in\.reduce\.weight"):
        shaped(unet, layers, {key: value for key, value in weights.items() if key != "conv_in.reduce.weight"})


def test_copies_and_configs_are_whole() -> None:
    unet = random_unet("sd 1.x")
    new = shaped(unet, *factors(unet))
    assert difference(new, copy.deepcopy(new)) == 0
    again = ShapedUNet2DConditionModel.from_config(new.config)
    again.load_state_dict(new.state_dict())
    assert difference(new, again) == 0
    assert {k: v for k, v in new.config.items() if k != "layers" and not k.startswith("_")} == {
        k: v for k, v in unet.config.items() if not k.startswith("_")
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"conv_up": {"in": 4, "out": 8}}, "conv_up is no module of this"),
        ({"conv_in": {"in": 4, "out": 0}}, "not whole numbers of at least 1"),
        ({"conv_in": {"in": 4, "out": 8.0}}, "not whole numbers of at least 1"),
        ({"conv_in": {"channels": 8}}, "conv_in is a Conv2d, which cannot be {'channels': 8}"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": {"heads": 3}}, "3 heads cannot share"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1.to_v": {"in": 16, "out": 8}}, "2 heads cannot share"),
    ],
)
def test_wrong_layers_are_refused(layers: dict[str, Any], message: str) -> None:
    unet: UNet2DConditionModel = random_unet("sd 1.x")
    with pytest.raises(ValueError, match=message):
        ShapedUNet2DConditionModel.from_config(dict(unet.config), layers=layers)
