"""A module's calls as flat tensors: what an engine compiles, and how its outputs become the module's again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call.

    Attributes:
        tensors: In the order in which they stand.
        rest: The other values, with None in the place of each tensor; they are part of what is compiled.
        places: Of the tensors among all values.
        spec: The nesting.
    """

    tensors: list[Tensor]
    rest: list[Any]
    places: list[int]
    spec: TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Takes arguments apart."""
        leaves, spec = tree_flatten((args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls([leaves[index] for index in places], rest, places, spec)

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors."""
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)

    @property
    def structure(self) -> str:
        """The same for calls that differ in their tensors alone."""
        kinds = [f"{str(tensor.dtype).removeprefix('torch.')}/{tensor.ndim}" for tensor in self.tensors]
        return repr((str(self.spec), self.rest, kinds))

    @property
    def shapes(self) -> list[list[int]]:
        """Of the tensors."""
        return [list(tensor.shape) for tensor in self.tensors]


class Flat(nn.Module):
    """A module that takes and gives tensors alone.

    Args:
        module: Called with the arguments of ``call``, but for the tensors.
        call: One call of it.
    """

    def __init__(self, module: nn.Module, call: Arguments) -> None:
        """See the class."""
        super().__init__()
        self.module = module
        self.call = call
        self.output: TreeSpec | None = None

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All tensors of the module's output; ``output`` says afterwards how they are nested.

        Raises:
            TypeError: The output holds something other than tensors.
        """
        args, kwargs = self.call.arguments(list(tensors))
        leaves, self.output = tree_flatten(self.module(*args, **kwargs))
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(f"{type(self.module).__name__} gives more than tensors")
        return tuple(leaves)
