"""Precision and recall of a set of features."""

from typing import Any

import torch

from compress.evaluate.intervals import no_interval, share_interval
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # rows of a distance matrix at once
WHY = "an image changes its neighbors' balls, so one set of images does not tell how much recall varies"


class PrecisionRecall(RowMetric):
    """Improved precision and recall.

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991: the share of images inside the reference's manifold, and
    the share of reference images inside the images' manifold. Both depend on the numbers of images.

    Precision is a share of independent draws and has an interval. Recall is not, and has none.

    Args:
        k: A set's manifold is the union of balls around its images, each up to the k-th neighbor.
    """

    higher_is_better = True
    names = ("features", "reference")

    def __init__(self, k: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Adds features ``(b, d)``; ``real`` marks the reference's. Each process adds its share of both sets.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: The width differs from that of the features before.
        """
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"precision", "recall"}``, each ``{"value", "low", "high", "n", "n_reference", "k", "interval_of"}``.

        Recall's ``low`` and ``high`` are None, and ``why`` gives the reason.

        Raises:
            ValueError: There are fewer than k + 2 images or k + 1 reference images.
        """
        fake, real = self.rows("features", self.k + 2), self.rows("reference", self.k + 1)
        if fake.shape[1] != real.shape[1]:
            raise ValueError(f"features are {tuple(fake.shape)}, the reference's {tuple(real.shape)}")
        n, precision, recall = len(fake), _inside(fake, real, self.k), _inside(real, fake, self.k)
        more = {"n_reference": len(real), "k": self.k}
        return {
            "precision": {**share_interval(precision, precision * (1 - precision) / n, n), **more},
            "recall": {**no_interval(recall, n, WHY), **more},
        }


def _inside(rows: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    """The share of ``rows`` ``(n, d)`` within a ball around one of ``manifold`` ``(m, d)``."""
    reach = []
    for start in range(0, len(manifold), CHUNK):
        apart = torch.cdist(manifold[start : start + CHUNK], manifold)
        apart[torch.arange(len(apart)), torch.arange(start, start + len(apart))] = torch.inf
        reach.append(apart.topk(k, dim=1, largest=False).values[:, -1])
    radii = torch.cat(reach)
    return sum(int((torch.cdist(chunk, manifold) <= radii).any(dim=1).sum()) for chunk in rows.split(CHUNK)) / len(rows)
