"""Meta-device models, and checked weights of a denoiser to prune."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.errors import UserError

Model = TypeVar("Model")


def meta_model(model_class: type[Model], config: Mapping[str, Any]) -> Model:
    """A model of a config, on the meta device."""
    # Without private keys: from_config drops the keys in "_use_default_values", given or not.
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return model_class.from_config(public)  # type: ignore[attr-defined]


def filled(model: Any, weight: Callable[[str], Tensor]) -> Any:
    """Fills a meta-device model with weights, sharing their memory, and sets evaluation mode.

    Args:
        model: Changed in place.
        weight: From the name of a parameter or buffer, saved or not, to its values.
    """
    model.load_state_dict({key: weight(key) for key in model.state_dict()}, strict=True, assign=True)
    for key, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # not a saved one
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, weight(key))
    return model.eval().requires_grad_(False)


def checked_weights(model: Any) -> dict[str, Tensor]:
    """The state dict of a denoiser, sharing its memory, checked to match the config and to hold finite floats.

    Raises:
        UserError: It holds adapters, quantized weights or NaN.
    """
    weights = dict(model.state_dict())
    expected = meta_model(type(model), model.config).state_dict()
    odd = sorted(weights.keys() ^ expected.keys())
    odd += [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    if odd:
        raise UserError(
            f"this denoiser cannot be pruned: {len(odd)} of its weights do not match its config (the first: "
            f"{odd[0]}); merge adapters into it first"
        )
    for name, tensor in weights.items():
        # The exact type: quantized tensors are subclasses with a float dtype.
        if type(tensor) is not Tensor or not tensor.is_floating_point():
            raise UserError(f"this denoiser cannot be pruned: {name} is not in float weights; prune before quantizing")
        if not finite(tensor):
            raise UserError(f"this denoiser cannot be pruned: {name} holds NaN or infinite values")
    return weights


def finite(tensor: Tensor) -> bool:
    """Whether all values of a float tensor are finite, in one pass without a mask."""
    return all(bool(end.isfinite()) for end in tensor.detach().aminmax()) if tensor.numel() else True
