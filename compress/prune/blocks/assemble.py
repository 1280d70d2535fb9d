"""Builds the stock model of the remaining blocks, with the weights of the input model."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from compress.models.meta import filled, meta_model
from compress.prune.blocks import Blocks


def assemble(model_class: Any, blocks: Blocks, weights: Mapping[str, Tensor]) -> Any:
    """Build the stock model of the remaining blocks, in evaluation mode; it shares memory with ``weights``.

    Args:
        model_class: Class of the denoiser.
        blocks: Remaining blocks.
        weights: Parameters and buffers of the denoiser.
    """
    names = blocks.names()
    return filled(meta_model(model_class, blocks.config()), lambda key: weights[source(key, names)])


def source(key: str, names: Mapping[str, str]) -> str:
    """Name of a weight in the input model, from the innermost enclosing module in :meth:`Blocks.names`."""
    prefix = owner(key, names)
    return names[prefix] + key[len(prefix) :] if prefix else key


def owner(key: str, names: Iterable[str]) -> str:
    """The longest of ``names`` that is ``key`` or a module around it; empty if there is none."""
    prefix = key
    while prefix and prefix not in names:
        prefix = prefix.rpartition(".")[0]
    return prefix
