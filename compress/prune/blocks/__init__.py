"""Removal of blocks from a denoiser: remaining blocks, their cost and effect, and the smaller stock model.

Each architecture has a class that describes the remaining blocks (:class:`Blocks`); all other code works on any.
"""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from compress.errors import UserError

KINDS = ("layers", "attentions", "transformer_layers", "mid_block", "levels")


class Blocks(Protocol):
    """The remaining blocks of a denoiser; a stock config can be derived from them."""

    def config(self) -> dict[str, Any]:
        """The config of the stock model that has these blocks."""

    def names(self) -> dict[str, str]:
        """Modules of the smaller model to the modules of the input model that provide their own weights.

        A module inside another one in the map has its own entry.
        """

    def outputs(self) -> dict[str, str | None]:
        """Blocks of the smaller model to those of the input model; None if another layer now produces the output."""

    def problem(self) -> str | None:
        """Why no stock config can express these blocks; None if one can."""

    def candidates(self, kinds: Collection[str]) -> Iterator[tuple[str, str, "Blocks"]]:
        """Possible next removals, as (group, name, remaining blocks); a stock config may not express the result."""


def read_blocks(denoiser: Any) -> Blocks:
    """All blocks of a denoiser, which may be on the meta device.

    Raises:
        UserError: The class or architecture is unsupported.
    """
    from compress.models.families import families, family_of
    from compress.prune.blocks.transformer import read_transformer
    from compress.prune.blocks.unet import read_unet

    name = type(denoiser).__name__
    if name == "UNet2DConditionModel":
        return read_unet(dict(denoiser.config))
    family = family_of(denoiser)
    if family is not None and family.blocks:
        return read_transformer(family, dict(denoiser.config))
    known = ", ".join(["UNet2DConditionModel", *(name for one in families() if one.blocks for name in one.classes)])
    raise UserError(f"blocks cannot be removed from {name}; supported: {known}")
