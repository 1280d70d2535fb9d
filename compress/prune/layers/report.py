"""The result of per-layer width pruning."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.stage import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.shapes import Shaped


@dataclass(frozen=True)
class NarrowedWidth:
    """A width that may change.

    Attributes:
        name: The module that contains it; for a residual stream, the stream's first layer.
        kind: One of :data:`compress.prune.per_layer.KINDS`.
        before: Channels in the input UNet.
        after: Channels in the new UNet.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class PerLayerReport:
    """A pruned UNet and what was done to get it.

    Attributes:
        unet: The new, smaller model; the input model is unchanged.
        kept: Block (``"down_blocks.0"``, ``"mid_block"``, ``"up_blocks.1"``) to the indices of its kept output
            channels, ascending.
        widths: Every width in scope, in model order.
        left: Remaining share of ``params`` and ``macs``.
        ranked: Whether the ranking determined the widths. If widths are too few or too coarse to meet the target this
            way, costs determine the widths, and importance only the channels to remove.
        params_before: Number of parameters of the input model.
        params_after: Number of parameters of the new model.
        modules: Number of layers that lost channels.
        share_params: Share of the input model's parameters in these layers, in [0, 1].
        share_macs: Share of the input model's multiply-accumulates in these layers and the attention between them.
        skipped: Unchanged width in scope to the reason.
        outputs: Layer to the indices of its kept outputs, where it lost some.
        scales: Layer to a factor of its outputs against the input model's: queries of narrowed heads.
        reconstructed: Layer to the relative error of its outputs before and after it was fitted; see
            :mod:`compress.prune.channels.reconstruct`.
    """

    unet: "Shaped"
    kept: dict[str, list[int]]
    widths: list[NarrowedWidth]
    left: dict[str, float]
    ranked: bool
    params_before: int
    params_after: int
    modules: int
    share_params: float
    share_macs: float
    skipped: dict[str, str]
    outputs: "dict[str, Tensor]"
    scales: dict[str, float]
    reconstructed: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return one_line(self, self.modules, **{name: f"{share:.2f}x" for name, share in self.left.items()})
