"""Importance ``activation``: how much a channel contributes to the outputs of the layers that read it.

A weight's saliency is its square times the mean square of its input, as in Wanda (Sun et al. 2023, arXiv:2306.11695),
summed over a channel. Needs examples, but no gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.prune.importance.combine import Combined

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.calibration import Calibration
    from compress.prune.channels.groups import Group
    from compress.prune.importance.score import Scorer

CALIBRATED = True
COMPARABLE = False


@dataclass(frozen=True)
class Config(Combined):
    """Squared weights times mean squared inputs."""

    name: str = "activation"


def scorer(config: Config, calibration: "Calibration | None", seed: int) -> "Scorer":
    """Scores from the mean squared inputs of every layer over all examples."""
    import torch

    from compress.prune.importance.score import score
    from compress.system.progress import track

    assert calibration is not None
    model = calibration.denoiser
    training = model.training
    with torch.no_grad(), _mean_squares(model.eval()) as squares:
        for part in track(list(calibration.parts()), "activations"):
            calibration.predict(model, part)
    model.train(training)

    def by_inputs(group: "Group", weights: "dict[str, Tensor]") -> "Tensor":
        def saliency(key: str) -> "Tensor | None":
            name, _, part = key.rpartition(".")
            if part != "weight" or name not in squares or key not in weights:
                return None
            weight = weights[key].float().square()
            return weight * squares[name].view(1, -1, *[1] * (weight.ndim - 2))

        return score(group, saliency, config.combine)

    return by_inputs


@contextmanager
def _mean_squares(model: "nn.Module") -> "Iterator[dict[str, Tensor]]":
    """Collect each layer's mean squared inputs per channel, summed over batches, float32."""
    from torch import nn

    squares: dict[str, Tensor] = {}

    def hook(name: str, axis: int) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            values = args[0].float()
            others = [i for i in range(values.ndim) if i != axis % values.ndim]
            mean = values.square().mean(others)
            squares[name] = squares[name] + mean if name in squares else mean

        return add

    handles = [
        module.register_forward_pre_hook(hook(name, 1 if isinstance(module, nn.Conv2d) else -1))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
