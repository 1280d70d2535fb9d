"""Precision and recall of a set of features."""

from typing import Any

import torch

from compress.evaluate.intervals import freedom, no_interval, share_interval
from compress.evaluate.metrics.recall import nearest, recall, spread
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # rows of a distance matrix at once


class PrecisionRecall(RowMetric):
    """Improved precision and recall.

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991: the share of the images within the reference's
    manifold, and the share of the reference within the images'. Both depend on the numbers of images.

    Precision is a share of independent draws. Recall is not: see :mod:`compress.evaluate.metrics.recall`, which also
    says where its interval cannot be had.

    Args:
        k: A set's manifold is the union of the balls around its images that reach to their k-th neighbors.
        seed: Of everything random.
    """

    higher_is_better = True

    def __init__(self, k: int = 3, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.k, self.seed = k, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes features ``(b, d)``; ``real`` says that they are the reference's.

        Under several processes each gives its own share of both sets.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: Features of another width than before.
        """
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"precision", "recall"}``, each ``{"value", "low", "high", "n", "n_reference", "k", "interval_of"}``.

        Where recall's interval cannot be had, ``low`` and ``high`` are None, and ``why`` says why.

        Raises:
            ValueError: There are fewer than k + 2 images or k + 1 of the reference.
        """
        fake, real = self.rows("features", self.k + 2), self.rows("reference", self.k + 1)
        if fake.shape[1] != real.shape[1]:
            raise ValueError(f"features are {tuple(fake.shape)}, the reference's {tuple(real.shape)}")
        # In an order of their own, so that what is random does not depend on the order in which they came.
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
