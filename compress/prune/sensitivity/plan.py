"""Widths that meet a target at the least predicted error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.prune.channels.target import Target, WidthCosts, Widths, best, choices_of, meeting

if TYPE_CHECKING:
    from compress.models.inputs import Inputs
    from compress.prune.channels.report import Pruner
    from compress.prune.sensitivity.error import UnchangedPrediction
    from compress.prune.sensitivity.levels import NarrowedLevel


@dataclass(frozen=True)
class WidthPlan:
    """Which widths to prune to, and why.

    Attributes:
        widths: Channels left of each level, that of the highest resolution first.
        ratios: Shares removed.
        left: The share of the target's unit that is left.
        predicted: Relative error of the prediction, see :func:`compress.prune.sensitivity.levels.predicted_error`.
        measured: Levels narrowed one at a time.
    """

    widths: list[int]
    ratios: list[float]
    left: float
    predicted: float
    measured: "list[NarrowedLevel]"


class Planner:
    """Refuses a target that no widths meet when it is made, before anything is measured.

    Args:
        unet: Its config counts, not its weights.
        target: With one share given.
        heads: What attention may give up, see :class:`compress.prune.width.Config`.
        multiple: What new widths are multiples of, see there.
        inputs: Arguments of the pass whose multiply-accumulates count; None: one at the model's own size.

    Raises:
        UserError: No widths meet the target, or the UNet's inputs are not known.
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
        self.costs = WidthCosts(unet, inputs or example_inputs(unet), target.goal[0], heads, multiple)
        self.choices = meeting(target, self.costs, choices_of(unet.config, heads, multiple))

    def plan(self, prune: "Pruner", reference: "UnchangedPrediction", ratios: Sequence[float]) -> WidthPlan:
        """Measures every level and chooses.

        Args:
            prune: Prunes the UNet.
            reference: Of the UNet.
            ratios: Shares of a level's channels that are tried.

        Raises:
            UserError: No widths meet the target.
        """
        from compress.prune.sensitivity.levels import narrow_levels

        return self.choose(narrow_levels(self.costs.widths, prune, reference, ratios))

    def choose(self, measured: "list[NarrowedLevel]") -> WidthPlan:
        """The plan from what was measured.

        Raises:
            UserError: No widths meet the target.
        """
        from compress.prune.sensitivity.levels import predicted_error

        full = self.costs.widths

        def predicted(widths: Widths) -> float:
            return predicted_error(measured, full, widths)

        chosen, left = best(self.target, self.costs, self.choices, predicted)
        ratios = [1 - new / old for new, old in zip(chosen, full, strict=True)]
        return WidthPlan(list(chosen), ratios, left, predicted(chosen), measured)
