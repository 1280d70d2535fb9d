"""The stock model that has the blocks that are left, with the weights of the model given."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.prune.blocks import Blocks


def checked_weights(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a denoiser that is what its config says, in finite floats.

    Raises:
        UserError: It holds adapters, quantized weights, or NaN.
    """
    weights = dict(model.state_dict())
    expected = empty(type(model), model.config).state_dict()
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
        if not tensor.isfinite().all():
            raise UserError(f"this denoiser cannot be pruned: {name} holds NaN or infinite values")
    return {**dict(model.named_buffers()), **weights}


def empty(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model of a config without weights."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return model_class.from_config(public)


def assemble(model_class: Any, blocks: Blocks, weights: Mapping[str, Tensor]) -> Any:
    """The stock model of what is left, in evaluation mode; it shares the memory of the weights.

    Args:
        model_class: Class of the denoiser.
        blocks: What is left of it.
        weights: See :func:`checked_weights`.
    """
    model, names = empty(model_class, blocks.config()), blocks.names()
    model.load_state_dict({key: weights[source(key, names)] for key in model.state_dict()}, strict=True, assign=True)
    for key, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # one that is not saved
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, weights[source(key, names)])
    return model.eval().requires_grad_(False)


def source(key: str, names: Mapping[str, str]) -> str:
    """Where a weight comes from: the innermost module around it that :meth:`Blocks.names` knows decides."""
    prefix = owner(key, names)
    return names[prefix] + key[len(prefix) :] if prefix else key


def owner(key: str, names: Iterable[str]) -> str:
    """The longest of ``names`` that ``key`` lies in; empty where it lies in none."""
    prefix = key
    while prefix and prefix not in names:
        prefix = prefix.rpartition(".")[0]
    return prefix
