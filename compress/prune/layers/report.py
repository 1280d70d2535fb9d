"""What pruning every layer to a width of its own gives."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.stage import one_line

if TYPE_CHECKING:
    from compress.models.shapes import Shaped


@dataclass(frozen=True)
class NarrowedWidth:
    """A width that may change.

    Attributes:
        name: The module inside which it is; of a stream, the layer that the stream starts from.
        kind: One of :data:`compress.prune.per_layer.KINDS`.
        before: Channels of the UNet given.
        after: Channels of the new one.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class PerLayerReport:
    """A pruned UNet and what was done to get it.

    Attributes:
        unet: The new, smaller model; the one given is left as it was.
        kept: Output of a block (``"down_blocks.0"``, ``"mid_block"``, ``"up_blocks.1"``) to the indices of the
            channels that are left of it, ascending.
        widths: Every width in scope, in the order of the model.
        left: Share that is left of ``params`` and ``macs``.
        ranked: Whether the ranking decided the widths. It cannot where they are so few and coarse that following it
            does not meet the target; then costs alone decide them, and importance which channels go.
        params_before: Number of parameters of the model given.
        params_after: Number of parameters of the new one.
        modules: Number of layers that lost channels.
        share_params: Share of the old parameters that sit in such layers, in [0, 1].
        share_macs: Share of the old multiply-accumulates done in such layers (and in the attention between them).
        skipped: Width in scope to the reason why it stayed.
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

    def __repr__(self) -> str:
        return one_line(self, self.modules, **{name: f"{share:.2f}x" for name, share in self.left.items()})
