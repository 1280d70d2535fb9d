"""The result of pruning the levels of a UNet."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.stage import one_line

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel
    from torch import Tensor

    from compress.prune.sensitivity.error import Error
    from compress.prune.stopwatch import MeasuredLatency


@dataclass(frozen=True)
class NarrowedLevel:
    """The result of narrowing one level.

    Attributes:
        level: Index, counted from the highest resolution.
        width: Remaining channels.
        ratio: Removed share; differs from the requested one if that is not possible.
        error: Error of the prediction.
    """

    level: int
    width: int
    ratio: float
    error: "Error"


@dataclass(frozen=True)
class WidthPlan:
    """The chosen widths and the measurements behind them.

    Attributes:
        widths: Remaining channels of each level, the level of the highest resolution first.
        ratios: Removed shares.
        left: Remaining share in the target's unit.
        predicted: Predicted relative error, see :func:`compress.prune.sensitivity.levels.predicted_error`.
        measured: Results of narrowing one level at a time.
        latency: What was measured for a target of latency; None for others.
    """

    widths: list[int]
    ratios: list[float]
    left: float
    predicted: float
    measured: list[NarrowedLevel]
    latency: "MeasuredLatency | None" = None


@dataclass(frozen=True)
class PruneReport:
    """A pruned UNet and what was done to get it.

    Attributes:
        unet: The new, smaller model; the input model is unchanged.
        kept: Block (``"down_blocks.0"``, ``"mid_block"``, ``"up_blocks.1"``) to the indices of its kept output
            channels, ascending.
        kept_inside: Attention block (``"mid_block.attentions.0"``) to the indices of the kept channels between its
            first and last layer, ascending.
        widths_before: ``block_out_channels`` of the input model.
        widths_after: ``block_out_channels`` of the new model.
        ratios_asked: Requested share of channels to remove per level.
        ratios_achieved: Removed share per level; may differ, as widths must be divisible by norm groups and heads.
        heads: ``"narrow"`` or ``"remove"``: whether heads lost channels or whole heads were removed.
        multiple: Every new width is a multiple of this, besides norm groups and heads.
        params_before: Number of parameters of the input model.
        params_after: Number of parameters of the new model.
        modules: Number of layers that lost channels.
        share_params: Share of the input model's parameters in these layers, in [0, 1].
        share_macs: Share of the input model's multiply-accumulates in these layers and the attention between them.
        norms_regrouped: GroupNorm layers over a concatenated skip whose groups could not keep their channels, because
            the concatenated levels lost different shares. Each of them now averages over slightly different channels.
        time_residual: Root mean square error of the refitted time embedding over that embedding's root mean square,
            over the timesteps 0 to 999; 0 without a refit.
        skipped: Level that was requested but not changed to the reason.
        outputs: Layer to the indices of its kept outputs, where it lost some.
        scales: Layer to a factor of its outputs against the input model's: queries of narrowed heads.
        plan: How the ratios were chosen; None without a target.
        reconstructed: Layer to the relative error of its outputs before and after it was fitted; see
            :mod:`compress.prune.channels.reconstruct`.
    """

    unet: "UNet2DConditionModel | UNet2DModel"
    kept: dict[str, list[int]]
    kept_inside: dict[str, list[int]]
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
    outputs: "dict[str, Tensor]"
    scales: dict[str, float]
    plan: WidthPlan | None = None
    reconstructed: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        widths = f"{self.widths_before} -> {self.widths_after}"
        return one_line(self, self.modules, widths=widths, params=f"{self.params_after / self.params_before:.2f}x")


Pruner = Callable[[float | list[float]], PruneReport]
"""From a ratio, or one per level, to a pruned UNet."""
