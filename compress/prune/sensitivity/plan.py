"""The widths that meet a target with the least predicted error."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.prune.channels.report import NarrowedLevel, Pruner, WidthPlan
from compress.prune.channels.target import Target, WidthCosts, Widths, best, choices_of, meeting

if TYPE_CHECKING:
    from compress.models.inputs import Inputs
    from compress.prune.channels.latency import WidthLatencies
    from compress.prune.sensitivity.error import UnchangedPrediction


class Planner:
    """Chooses widths for a target; the constructor checks that some widths meet it, before anything is measured.

    Args:
        unet: Only its config is used; a target of latency runs it, too.
        target: With one share set.
        heads: See :class:`compress.prune.width.Config`.
        multiple: See :class:`compress.prune.width.Config`.
        inputs: Arguments of the forward pass that is counted or timed; None: inputs at the model's own size.

    Raises:
        UserError: No widths meet the target, or the UNet's inputs are unknown.
    """

    def __init__(
        self,
        unet: Any,
        target: Target,
        heads: str = "auto",
        multiple: int | None = None,
        inputs: "Inputs | None" = None,
    ) -> None:
        from compress.models.inputs import example_inputs
        from compress.prune.channels import widths

        assert target.goal is not None
        widths.check_blocks(unet.config)
        self.target = target
        self.full = tuple(int(width) for width in unet.config.block_out_channels)
        self.latencies: WidthLatencies | None = None
        if target.latency is not None:
            self.latencies = _latencies(unet, target.latency, target.engine, heads, multiple, inputs)
            return
        self.costs = WidthCosts(unet, inputs or example_inputs(unet), target.goal[0], heads, multiple)
        self.choices = meeting(target, self.costs, choices_of(unet.config, heads, multiple))

    def plan(self, prune: Pruner, reference: "UnchangedPrediction", ratios: Sequence[float]) -> WidthPlan:
        """Measure every level and choose the widths.

        Args:
            prune: Prunes the UNet.
            reference: Predictions of the unchanged UNet.
            ratios: Shares of a level's channels to try.

        Raises:
            UserError: No widths meet the target.
        """
        from compress.prune.sensitivity.levels import narrow_levels

        return self.choose(narrow_levels(self.full, prune, reference, ratios))

    def choose(self, measured: list[NarrowedLevel]) -> WidthPlan:
        """Choose the widths from measured levels.

        Raises:
            UserError: No widths meet the target.
        """
        from compress.prune.sensitivity.levels import predicted_error

        full, latency = self.full, None

        def predicted(widths: Widths) -> float:
            return predicted_error(measured, full, widths)

        if self.latencies is not None and self.target.latency is not None:
            chosen, latency = self.latencies.choose(self.target.latency, predicted)
            left = latency.measured
        else:
            chosen, left = best(self.target, self.costs, self.choices, predicted)
        ratios = [1 - new / old for new, old in zip(chosen, full, strict=True)]
        return WidthPlan(list(chosen), ratios, left, predicted(chosen), measured, latency)


def _latencies(
    unet: Any, share: float, engine: str, heads: str, multiple: int | None, inputs: "Inputs | None"
) -> "WidthLatencies":
    from compress.models.inputs import example_inputs
    from compress.prune.channels.latency import WidthLatencies
    from compress.prune.stopwatch import Stopwatch

    stopwatch = Stopwatch(unet, inputs or example_inputs(unet, seed=0), engine)
    found = WidthLatencies(unet, stopwatch, heads, multiple)
    found.check(share)
    return found
