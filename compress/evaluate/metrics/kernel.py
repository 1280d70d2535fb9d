"""Kernel distances: squared maximum mean discrepancies of two sets of features."""

from typing import Any

import torch

from compress.evaluate.intervals import INTERVAL_OF
from compress.evaluate.metrics.rows import RowMetric
from compress.evaluate.scores import kernel_distance


class KernelDistance(RowMetric):
    """Kernel Inception Distance: unbiased squared MMD with the kernel ``(x.y / d + 1)^3``.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401.

    Args:
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = False

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.resamples, self.seed = resamples, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes features ``(b, d)``; ``real`` says that they are the reference's."""
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "std", "n", "n_reference", "interval_of"}``."""
        fake, real = self.rows("features", 4), self.rows("reference", 2)
        found = kernel_distance(real, fake)
        std = (found["high"] - found["low"]) / 3.92
        return {**found, "std": std, "n": len(fake), "n_reference": len(real), "interval_of": INTERVAL_OF}


class MaximumMeanDiscrepancy(KernelDistance):
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of sigma 10 of embeddings of length 1.

    Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603.
    """
