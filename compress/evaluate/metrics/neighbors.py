"""Precision and recall of a set of features."""

from typing import Any

import torch

from compress.evaluate.intervals import mean_interval
from compress.evaluate.metrics.rows import RowMetric


class PrecisionRecall(RowMetric):
    """Improved precision and recall.

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Args:
        k: A set's manifold is the union of the balls around its pictures that reach to their k-th neighbors.
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = True

    def __init__(self, k: int = 3, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.k, self.resamples, self.seed = k, resamples, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes features ``(b, d)``; ``real`` says that they are the reference's."""
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"precision": {...}, "recall": {...}}``, each ``{"value", "low", "high", "n", ..., "interval_of"}``."""
        fake, real = self.rows("features", self.k + 1), self.rows("reference", self.k + 1)
        across = torch.cdist(fake, real)
        real_radius = torch.cdist(real, real).kthvalue(self.k + 1, dim=1).values
        fake_radius = torch.cdist(fake, fake).kthvalue(self.k + 1, dim=1).values
        inside = (across <= real_radius).any(dim=1).double()
        covered = (across <= fake_radius[:, None]).any(dim=0).double()
        more = {"k": self.k, "n": len(fake), "n_reference": len(real)}
        return {
            "precision": {**mean_interval(inside, self.resamples, self.seed), **more},
            "recall": {**mean_interval(covered, self.resamples, self.seed), **more},
        }
