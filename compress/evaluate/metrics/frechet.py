"""Fréchet distance of two sets of features."""

from typing import Any

import torch

from compress.evaluate.intervals import INTERVAL_OF
from compress.evaluate.metrics.rows import RowMetric
from compress.evaluate.scores import frechet


class FrechetDistance(RowMetric):
    """Fréchet distance between the Gaussians that fit two sets of features (FID where they are Inception's).

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500.

    Args:
        paired: Row i of both sets belongs to the same draw (the teacher's and the student's picture of one prompt and
            noise); both are then random. Otherwise the reference is held fixed.
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = False

    def __init__(self, paired: bool = False, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.paired, self.resamples, self.seed = paired, resamples, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes features ``(b, d)``; ``real`` says that they are the reference's.

        Under several processes each gives its own share of both.
        """
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "n_reference", "infinite", "interval_of"}``."""
        fake, real = self.rows("features", 4), self.rows("reference", 4)
        found = frechet(real, fake)
        counts = {"n": len(fake), "n_reference": len(real)}
        return {**found, **counts, "infinite": found["value"], "interval_of": INTERVAL_OF}
