"""Importance ``taylor``: the change of the diffusion loss, to first order.

Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value
from compress.prune.importance.combine import check_combine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.calibration import Calibration
    from compress.prune.channels.groups import Group
    from compress.prune.importance.score import Scorer

CALIBRATED = True
COMPARABLE = True


@dataclass(frozen=True)
class Config:
    """Products of weights and gradients.

    Attributes:
        name: ``"taylor"``.
        per: ``"weight"``: absolute value of each product; ``"channel"``: of the sum over a channel of a layer.
        combine: See :func:`compress.prune.importance.score.score`.
    """

    name: str = "taylor"
    per: str = "weight"
    combine: str = "outgoing"

    def __post_init__(self) -> None:
        """Checks the choices.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        check_per(self.per)
        check_combine(self.combine)


def check_per(value: str) -> None:
    """Raise UserError if :func:`product_scorer` does not support the value."""
    if value not in ("weight", "channel"):
        raise bad_value("per", value, "weight or channel")


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Scores from the gradient of the mean loss of all examples."""
    from compress.data.calibration import differentiable
    from compress.system.progress import track

    assert calibration is not None
    with differentiable(calibration.denoiser) as model:
        for part in track(list(calibration.gradient_parts()), "gradients of the diffusion loss"):
            (calibration.losses(model, part).sum() / len(calibration.latents)).backward()
        return product_scorer(products(model), config.per, config.combine)


def products(model: "nn.Module") -> "dict[str, Tensor]":
    """Each weight times its gradient, by name; overwrites the gradients.

    Raises:
        UserError: A gradient is not finite.
    """
    from compress.errors import UserError

    # In place: a large model's gradients take as much memory as its weights.
    found = {name: p.grad.mul_(p.detach()) for name, p in model.named_parameters() if p.grad is not None}
    for name, values in found.items():
        if not values.isfinite().all():
            raise UserError(f"the gradient of {name} holds NaN or infinite values: use an importance of weights alone")
    return found


def product_scorer(saliency: "dict[str, Tensor]", per: str, combine: str) -> "Scorer":
    """Scores from signed saliencies of single weights.

    Args:
        saliency: Name of a weight to values of its shape.
        per: ``"weight"``: the absolute value of each is taken; ``"channel"``: they are first summed over a channel of a
            layer, so they may cancel.
        combine: See :func:`compress.prune.importance.score.score`.
    """
    from compress.prune.importance.score import score

    def of_weight(key: str) -> "Tensor | None":
        return saliency[key].abs() if key in saliency else None

    def by_products(group: "Group", weights: "dict[str, Tensor]") -> "Tensor":
        return score(group, of_weight if per == "weight" else saliency.get, combine)

    return by_products
