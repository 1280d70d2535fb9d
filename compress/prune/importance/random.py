"""Importance ``random``: random scores, the baseline that every other importance has to beat."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value

if TYPE_CHECKING:
    from torch import Tensor

    from compress.data.calibration import Calibration
    from compress.prune.channels.groups import Group
    from compress.prune.importance.score import Scorer

CALIBRATED = False
COMPARABLE = False


@dataclass(frozen=True)
class Config:
    """Random scores.

    Attributes:
        name: ``"random"``.
        seed: Seed of the scores, in [0, 2^32); None: the run's seed.
    """

    name: str = "random"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the range.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise bad_value("seed", self.seed, "a whole number from 0 to 2^32 - 1, or null for the run's")


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Uniform random scores; a group's scores do not depend on the order in which groups are scored."""
    import torch

    seed = seed if config.seed is None else config.seed

    def draw(group: "Group", weights: "dict[str, Tensor]") -> "Tensor":
        where = "/".join(group.members[0].axis)
        digest = hashlib.sha256(f"{seed} {where}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(group.size, generator=generator, dtype=torch.float64)

    return draw
