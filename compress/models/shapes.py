"""Gives the layers of a UNet other shapes than its stock config can express."""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from compress.models.shaped_unet import Shape, ShapedUNet2DConditionModel, ShapedUNet2DModel

Shaped = ShapedUNet2DConditionModel | ShapedUNet2DModel

SHAPEABLE: dict[type, type[Shaped]] = {
    UNet2DConditionModel: ShapedUNet2DConditionModel,
    ShapedUNet2DConditionModel: ShapedUNet2DConditionModel,
    UNet2DModel: ShapedUNet2DModel,
    ShapedUNet2DModel: ShapedUNet2DModel,
}

"""UNets whose layers can be given other shapes, with the class that they are then of."""


def shaped(
    unet: UNet2DConditionModel | UNet2DModel, layers: Mapping[str, Shape], weights: Mapping[str, Tensor]
) -> Shaped:
    """A UNet with other layers, other weights and all else of the one given.

    Args:
        unet: Stock, or shaped before; stays unchanged.
        layers: Name of a module to what it is now, as :mod:`compress.models.shaped_unet` describes it. Names are those
            of the stock UNet; an entry takes the place of the one that a shaped UNet has for that layer.
        weights: All parameters of the new UNet by name, as ``state_dict`` has them. They become its own: no copies.

    Returns:
        On the devices and in the dtypes of its weights, in the mode of ``unet``, with its attention processors and
        gradient checkpointing. A parameter requires a gradient if the one of that name did; one that is new, if any.

    Raises:
        ValueError: For a name or a shape that does not fit the UNet, and a UNet of another class.
        RuntimeError: For weights that do not fit the layers.
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
