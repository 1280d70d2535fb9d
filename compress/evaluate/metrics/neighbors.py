"""Precision and recall of a set of features."""

from typing import Any

import torch

from compress.evaluate.intervals import freedom, no_interval, share_interval
from compress.evaluate.metrics.recall import nearest, recall, spread
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # rows of a distance matrix at once


class PrecisionRecall(RowMetric):
    """Improved precision and recall.

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991: the share of images inside the reference's manifold, and
    the share of reference images inside the images' manifold. Both depend on the numbers of images.

    Precision is a share of independent draws. Recall is not, and sometimes has no interval: see
    :mod:`compress.evaluate.metrics.recall`.

    Args:
        k: A set's manifold is the union of balls around its images, each up to the k-th neighbor.
        seed: Seed of everything random.
    """

    higher_is_better = True

    def __init__(self, k: int = 3, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.k, self.seed = k, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Adds features ``(b, d)``; ``real`` marks the reference's. Each process adds its share of both sets.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: The width differs from that of the features before.
        """
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"precision", "recall"}``, each ``{"value", "low", "high", "n", "n_reference", "k", "interval_of"}``.

        Where recall has no interval, ``low`` and ``high`` are None and ``why`` gives the reason.

        Raises:
            ValueError: There are fewer than k + 2 images or k + 1 reference images.
        """
        fake, real = self.rows("features", self.k + 2), self.rows("reference", self.k + 1)
        if fake.shape[1] != real.shape[1]:
            raise ValueError(f"features are {tuple(fake.shape)}, the reference's {tuple(real.shape)}")
        # Sorted, so that the random choices do not depend on the order of the images.
        fake = fake[(fake - real.mean(dim=0)).square().sum(dim=1).argsort(stable=True)]
        n, reach = len(fake), nearest(real, self.k)[0][:, -1]
        inside = sum(int((torch.cdist(chunk, real) <= reach).any(dim=1).sum()) for chunk in fake.split(CHUNK))
        more = {"n_reference": len(real), "k": self.k}
        return {
            "precision": {**share_interval(inside / n, inside / n * (1 - inside / n) / n, n), **more},
            "recall": {**self._recall(fake, real), **more},
        }

    def _recall(self, fake: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
        found = recall(fake, real, self.k)
        over_draws = spread(found, fake, real, self.k, torch.Generator().manual_seed(self.seed))
        if over_draws.why:
            return no_interval(found.value, len(fake), over_draws.why)
        return share_interval(found.value, over_draws.variance, len(fake), freedom(found.one))
