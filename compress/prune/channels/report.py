"""What pruning the levels of a UNet gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.stage import one_line

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel

    from compress.prune.sensitivity.plan import WidthPlan


@dataclass(frozen=True)
class PruneReport:
    """A pruned UNet and what was done to get it.

    Attributes:
        unet: The new, smaller model; the one given is left as it was.
        kept: Output of a block (``"down_blocks.0"``, ``"mid_block"``, ``"up_blocks.1"``) to the indices of the
            channels that are left of it, ascending.
        widths_before: ``block_out_channels`` of the model given.
        widths_after: ``block_out_channels`` of the new one.
        ratios_asked: Share of channels to remove per level.
        ratios_achieved: Share removed per level; differs, as widths must be divisible by norm groups and heads.
        heads: ``"narrow"`` or ``"remove"``: what attention gave up.
        multiple: What every new width is a multiple of, besides norm groups and heads.
        params_before: Number of parameters of the model given.
        params_after: Number of parameters of the new one.
        modules: Number of layers that lost channels.
        share_params: Share of the old parameters that sit in such layers, in [0, 1].
        share_macs: Share of the old multiply-accumulates done in such layers (and in the attention between them).
        norms_regrouped: GroupNorm layers over a concatenated skip whose groups could not keep their channels, because
            the concatenated levels lost different shares. Each of them now averages over slightly other channels.
        time_residual: Root mean square error of the refitted time embedding over that embedding's root mean square,
            over the timesteps 0 to 999; 0 where it needed no refit.
        skipped: Level to the reason why it was asked for but left as it was.
        plan: How the ratios were chosen, where a target was given.
    """

    unet: "UNet2DConditionModel | UNet2DModel"
    kept: dict[str, list[int]]
    widths_before: list[int]
    widths_after: list[int]
    ratios_asked: list[float]
    ratios_achieved: list[float]
    heads: str
    multiple: int
    params_before: int
    params_after: int
    modules: int
    share_params: float
    share_macs: float
    norms_regrouped: list[str]
    time_residual: float
    skipped: dict[str, str]
    plan: "WidthPlan | None" = None

    def __repr__(self) -> str:
        widths = f"{self.widths_before} -> {self.widths_after}"
        return one_line(self, self.modules, widths=widths, params=f"{self.params_after / self.params_before:.2f}x")


Pruner = Callable[[float | list[float]], PruneReport]
"""From a ratio, or one per level, to a pruned UNet."""
