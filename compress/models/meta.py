"""The weights of a denoiser that is to be pruned, and models without any."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.errors import UserError

Model = TypeVar("Model")


def meta_model(model_class: type[Model], config: Mapping[str, Any]) -> Model:
    """A model of a config, on the meta device."""
    # Private keys stay out: from_config drops whatever "_use_default_values" lists, be it given or not.
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return model_class.from_config(public)  # type: ignore[attr-defined]


def filled(model: Any, weight: Callable[[str], Tensor]) -> Any:
    """A meta-device model with weights, in evaluation mode; it shares their memory.

    Args:
        model: Becomes that model.
        weight: From the name of a parameter or buffer, saved or not, to its values.
    """
    model.load_state_dict({key: weight(key) for key in model.state_dict()}, strict=True, assign=True)
    for key, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # one that is not saved
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, weight(key))
    return model.eval().requires_grad_(False)


def checked_weights(model: Any) -> dict[str, Tensor]:
    """The state dict of a denoiser that is what its config says, in finite floats; it shares the model's memory.

    Raises:
        UserError: It holds adapters, quantized weights, or NaN.
    """
    weights = dict(model.state_dict())
    expected = meta_model(type(model), model.config).state_dict()
    odd = sorted(weights.keys() ^ expected.keys())
    odd += [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    if odd:
        raise UserError(
            f"this denoiser cannot be pruned: {len(odd)} of its weights are not those of its config (the first: "
            f"{odd[0]}); merge adapters into it first"
        )
    for name, tensor in weights.items():
        # The exact type: quantized tensors are subclasses that call themselves float.
        if type(tensor) is not Tensor or not tensor.is_floating_point():
            raise UserError(f"this denoiser cannot be pruned: {name} is not in float weights; prune before quantizing")
        if not _finite(tensor):
            raise UserError(f"this denoiser cannot be pruned: {name} holds NaN or infinite values")
    return weights


def _finite(tensor: Tensor) -> bool:
    """Whether all values are; in one pass that makes no mask of billions of them."""
    return all(bool(end.isfinite()) for end in tensor.detach().aminmax()) if tensor.numel() else True
