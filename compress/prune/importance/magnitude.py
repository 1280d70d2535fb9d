"""Importances ``l1`` and ``l2``: the magnitude of a channel's weights (Li et al. 2017, arXiv:1608.08710)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value
from compress.prune.importance.combine import check_combine

if TYPE_CHECKING:
    from torch import Tensor

    from compress.data.calibration import Calibration
    from compress.prune.channels.groups import Group
    from compress.prune.importance.score import Scorer

NAMES = ("l1", "l2")
CALIBRATED = False
COMPARABLE = False


@dataclass(frozen=True)
class Config:
    """A channel's magnitude.

    Attributes:
        name: ``"l2"`` (sum of squares) or ``"l1"`` (sum of absolute values) of its weights.
        combine: ``"product"``: incoming times outgoing magnitude. It does not change if a channel is scaled up and its
            readers are scaled down, and is 0 if all outgoing weights are 0. ``"sum"``: all weights. ``"outgoing"``:
            only the weights that read the channel.
    """

    name: str = "l2"
    combine: str = "product"

    def __post_init__(self) -> None:
        """Checks the choices.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.name not in ("l1", "l2"):
            raise bad_value("name", self.name, "l1 or l2")
        check_combine(self.combine)


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Scores from the weights only."""
    from compress.prune.importance.score import score

    def magnitude(group: "Group", weights: "dict[str, Tensor]") -> "Tensor":
        def saliency(key: str) -> "Tensor | None":
            weight = weights.get(key)
            if weight is None:
                return None
            return weight.float().square() if config.name == "l2" else weight.float().abs()

        return score(group, saliency, config.combine)

    return magnitude
