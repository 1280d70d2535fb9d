"""Magnitude pruning of a UNet's channels in one call, without Hydra; the stage is :mod:`compress.prune.width`."""

from typing import TYPE_CHECKING

from compress.prune.width import Config, PruneReport, prune_width

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def prune_channels(
    unet: "UNet2DConditionModel",
    ratio: float | list[float] = 0.25,
    importance: str = "l2",
    combine: str = "product",
) -> PruneReport:
    """Remove the channels of least magnitude; the result is a stock UNet with other ``block_out_channels``.

    Args:
        unet: Any float weights; stays unchanged. Its blocks must be those of Stable Diffusion (1.x, 2.x, XL).
        ratio: See :class:`compress.prune.width.Config`.
        importance: ``"l2"`` or ``"l1"``, see :mod:`compress.prune.importance.magnitude`.
        combine: ``"product"``, ``"sum"`` or ``"outgoing"``, see there.

    Raises:
        UserError: For a value out of range, blocks of an unsupported architecture, weights that are not finite, or a
            ratio that leaves every width as it is.
    """
    return prune_width(unet, Config(ratio, importance={"name": importance, "combine": combine}))
