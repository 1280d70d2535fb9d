"""Random features for the tests of the metrics."""

import torch


def draw(n: int, d: int, seed: int, shift: float = 0.0, rectified: bool = True) -> torch.Tensor:
    """Correlated features ``(n, d)``, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix / d**0.5 + shift
    return rows.relu() if rectified else rows


def computed(metric, fake, real):
    """The metric's result for two sets of features."""
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()
