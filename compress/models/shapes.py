"""Gives layers of a UNet shapes that its stock config cannot express."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from compress.models.compressed_model import Shape, ShapedUNet2DConditionModel, ShapedUNet2DModel

Shaped: TypeAlias = Any  # of compress.models.compressed_model

SHAPEABLE: dict[type, type[Shaped]] = {
    UNet2DConditionModel: ShapedUNet2DConditionModel,
    ShapedUNet2DConditionModel: ShapedUNet2DConditionModel,
    UNet2DModel: ShapedUNet2DModel,
    ShapedUNet2DModel: ShapedUNet2DModel,
}
"""UNet classes to their classes with shaped layers."""


def shaped(
    unet: UNet2DConditionModel | UNet2DModel, layers: Mapping[str, Shape], weights: Mapping[str, Tensor]
) -> Shaped:
    """A UNet with other layers and weights, otherwise equal to the given one.

    Args:
        unet: Stock or shaped; unchanged.
        layers: Name of a module in the stock UNet to its new description, see :mod:`compress.models.compressed_model`.
            An entry replaces the one that a shaped UNet has for that layer.
        weights: All parameters of the new UNet by name, as in ``state_dict``; not copied.

    Returns:
        On the devices and in the dtypes of its weights, in the mode of ``unet``, with its attention processors and
        gradient checkpointing. A parameter requires a gradient if the one of that name did; a new one, if any did.

    Raises:
        ValueError: A name or a shape does not fit the UNet, or its class cannot be shaped.
        RuntimeError: The weights do not fit the layers.
    """
    if type(unet) not in SHAPEABLE:
        raise ValueError(f"{type(unet).__name__}: the layers of UNet2DConditionModel and UNet2DModel can be shaped")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    config["layers"] = {**config.get("layers", {}), **layers}
    with torch.device("meta"):
        new = SHAPEABLE[type(unet)].from_config(config)
    new.load_state_dict(dict(weights), assign=True)
    if left := [name for name, tensor in (*new.named_parameters(), *new.named_buffers()) if tensor.is_meta]:
        raise RuntimeError(f"no weights for {', '.join(left)}")
    grads = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(grads.get(name, any(grads.values())))
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            new.get_submodule(name).set_processor(module.processor)
    if unet.is_gradient_checkpointing:
        new.enable_gradient_checkpointing()
    return new.train(unet.training)
