"""Importances ``l1`` and ``l2``: how large a channel's weights are (Li et al. 2017, arXiv:1608.08710)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value
from compress.prune.importance.combine import check_combine

if TYPE_CHECKING:
    from torch import Tensor

    from compress.data.calibration import Calibration
    from compress.prune.channels.groups import Group
    from compress.prune.importance.score import Scorer

CALIBRATED = False


@dataclass(frozen=True)
class Config:
    """A channel's magnitude.

    Attributes:
        name: ``"l2"`` (sum of squares) or ``"l1"`` (sum of absolute values) of its weights.
        combine: ``"product"``: incoming magnitude times outgoing magnitude, which stays the same when a channel is
            scaled up and its readers down, and is 0 for a channel that nothing reads. ``"sum"``: all weights alike.
            ``"outgoing"``: the weights that read it.
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
    """Scores by the weights alone."""
    from compress.prune.importance.score import score

    def magnitude(group: "Group", weights: "dict[str, Tensor]") -> "Tensor":
        def saliency(key: str) -> "Tensor | None":
            weight = weights.get(key)
            if weight is None:
                return None
            return weight.float().square() if config.name == "l2" else weight.float().abs()

        return score(group, saliency, config.combine)

    return magnitude
