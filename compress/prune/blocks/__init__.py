"""Which blocks of a denoiser are left, what leaving one out costs, and the smaller stock model.

Every architecture has a class that holds what is left of a model of it (:class:`Blocks`); the rest works on any.
"""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from compress.errors import UserError

KINDS = ("layers", "attentions", "transformer_layers", "mid_block", "levels")


class Blocks(Protocol):
    """What is left of a denoiser, in a form from which a stock config can be written."""

    def config(self) -> dict[str, Any]:
        """The config of the stock model that has these blocks."""

    def names(self) -> dict[str, str]:
        """Modules of that model to the modules of the model given whose weights they take, without those inside it."""

    def outputs(self) -> dict[str, str | None]:
        """Blocks of that model to those of the model given; None where another layer gives the block's output now."""

    def problem(self) -> str | None:
        """Why no stock config can say this; None where one can."""

    def candidates(self, kinds: Collection[str]) -> Iterator[tuple[str, str, "Blocks"]]:
        """What could be removed next: what it is part of, its name, and what would be left, expressible or not."""


def read_blocks(denoiser: Any) -> Blocks:
    """All blocks of a denoiser, which may be on the meta device.

    Raises:
        UserError: No block can be removed from a model of this class or architecture.
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
    raise UserError(f"blocks cannot be removed from {name}: known are {known}")
