"""The stock model that has the blocks that are left, with the weights of the model given."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from compress.models.meta import filled, meta_model
from compress.prune.blocks import Blocks


def assemble(model_class: Any, blocks: Blocks, weights: Mapping[str, Tensor]) -> Any:
    """The stock model of what is left, in evaluation mode; it shares the memory of the weights.

    Args:
        model_class: Class of the denoiser.
        blocks: What is left of it.
        weights: Its parameters and buffers.
    """
    names = blocks.names()
    return filled(meta_model(model_class, blocks.config()), lambda key: weights[source(key, names)])


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
