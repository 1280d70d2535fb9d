"""The supported denoisers: one file a family, with what neither config nor pipeline says."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class Draw:
    """Makes the tensors of example inputs, with random values or on the meta device.

    Args:
        batch: Rows.
        side: Largest side of the latents; None: the model's.
        tokens: Length of the text; None: the family's.
        seed: Of the values; None: tensors on the meta device.
    """

    def __init__(self, batch: int, side: int | None, tokens: int | None, seed: int | None) -> None:
        import torch

        self.batch, self.side, self.tokens = batch, side, tokens
        self._device = "meta" if seed is None else "cpu"
        self._generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> "torch.Tensor":
        """``(batch, *shape)``, standard normal."""
        import torch

        return torch.randn((self.batch, *shape), generator=self._generator, device=self._device)

    def filled(self, value: float, *shape: int, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """``shape``, without a batch axis, filled with one value."""
        import torch

        return torch.full(shape, value, dtype=dtype, device=self._device)

    def timesteps(self, last: float = 1000) -> "torch.Tensor":
        """``(batch,)``: from 0.1 % to just over half of ``last``; integers if ``last`` is 1000."""
        import torch

        times = torch.arange(self.batch) * 500 // max(1, self.batch - 1) + 1
        return (times if last == 1000 else times * (last / 1000)).to(self._device)

    def sides(self, size: int | Sequence[int] | None, usual: int = 64) -> list[int]:
        """Height and width of the latents.

        Args:
            size: ``sample_size`` of the config.
            usual: If the config has none.
        """
        both = size if isinstance(size, (list, tuple)) else (size, size)
        return [min(one or usual, self.side or one or usual) for one in both]


@dataclass(frozen=True)
class Family:
    """What is needed of a denoiser besides its config and pipeline.

    Attributes:
        classes: Names of its classes in diffusers and here.
        sample: Name of the argument of the noisy latents.
        example: From config and :class:`Draw` to the keyword arguments of a pass; None if this config takes unknown
            inputs.
        features: From a denoiser to the names of modules whose outputs a distillation compares, in order.
        blocks: Module list to the config key of its length, if the blocks do not depend on their position.
        widths: Width inside of blocks to the config key that sets it without changing the residual stream:
            ``feed_forward`` (a key of hidden channels over the block's channels) and ``heads`` (of cross-attention).
        places: Config keys that list positions of ``transformer_blocks`` with extra parts.
        keep_last: Whether the last block of a list differs from the others and must stay.
        packed: Whether latents are a sequence ``(b, n, c)`` and not an image ``(b, c, h, w)``.
        time_scale: The pipeline multiplies timesteps by this for the denoiser.
    """

    classes: tuple[str, ...]
    sample: str
    example: Callable[[Any, Draw], dict[str, Any] | None]
    features: "Callable[[nn.Module], list[str]]"
    blocks: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    keep_last: bool = False
    packed: bool = False
    time_scale: float = 1.0


def families() -> list[Family]:
    """All that are known: the ``FAMILY`` of every module here."""
    return [importlib.import_module(f"{__name__}.{found.name}").FAMILY for found in pkgutil.iter_modules(__path__)]


def family_of(denoiser: object) -> Family | None:
    """The family of a denoiser by its class; None if unknown."""
    name = type(denoiser).__name__.removeprefix("Packed")  # with packed weights
    return next((family for family in families() if name in family.classes), None)


def spread_blocks(model: "nn.Module", lists: Sequence[str], most: int = 4) -> list[str]:
    """At most ``most`` blocks of some module lists, evenly spread, with the last."""
    names = [f"{name}.{i}" for name in lists for i in range(len(model.get_submodule(name)))]
    count = min(most, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]
