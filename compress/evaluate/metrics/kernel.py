"""Kernel distances: squared maximum mean discrepancies of two sets of features."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from compress.evaluate.intervals import jackknife_interval, steady
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # rows of a kernel matrix at once
LEAST = 4  # images: fewer do not allow an estimate of the variance
SLOPE = 0.7  # factor on the estimated growth of the variance, which is as uncertain as the variance


@dataclass(frozen=True)
class KernelJackknife:
    """A distance without the reference's own term, also with images left out.

    Attributes:
        value: Of all n images.
        one: Without each image, ``(n,)``.
        fixed: Part of the variance that comes from pairs; it remains at a distance of 0.
        growing: Part of the variance that comes from single images.
        slope: How much the variance grows with the distance.
    """

    value: float
    one: torch.Tensor
    fixed: float
    growing: float
    slope: float


class KernelDistance(RowMetric):
    """Kernel Inception Distance: squared MMD with the kernel ``(x.y / d + 1)^3``.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401: the unbiased estimate over all pairs, not over random
    subsets. It may be below 0. ``std`` is the standard deviation over fresh draws of n images.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = False
    names = ("features", "reference")
    scale = 1.0

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Adds features ``(b, d)``; ``real`` marks the reference's. Each process adds its share of both sets.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: The width differs from that of the features before.
        """
        self.keep("reference" if real else "features", features)

    def kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The kernel of every row of ``a`` ``(p, d)`` with every row of ``b`` ``(q, d)``: ``(p, q)``."""
        return (a @ b.T / a.shape[1] + 1) ** 3

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "std", "n", "n_reference", "interval_of"}``.

        Raises:
            ValueError: There are fewer than 4 images or 2 reference images.
        """
        fake, real = self.rows("features", LEAST), self.rows("reference", 2)
        if fake.shape[1] != real.shape[1]:
            raise ValueError(f"features are {tuple(fake.shape)}, the reference's {tuple(real.shape)}")
        m = len(real)
        across = torch.cat([self.kernel(chunk, real).mean(dim=1) for chunk in fake.split(CHUNK)])
        every = float(torch.stack([self.kernel(chunk, real).sum() for chunk in real.split(CHUNK)]).sum())
        own = sum(float(self.kernel(chunk, chunk).trace()) for chunk in real.split(CHUNK))
        within, biased = (every - own) / (m * (m - 1)), every / m**2
        left = self._left_out(fake, across)
        value, one = self.scale * (left.value + within), self.scale * (left.one + within)
        fixed, variance = self.scale**2 * left.fixed, self.scale**2 * (left.fixed + left.growing)
        # The distance to the reference images themselves, not to their distribution, is at least 0. At 0 the growing
        # part of the variance is 0.
        distance = max(value + self.scale * (biased - within), variance**0.5)
        least = (variance - fixed) / distance if variance > 0 else 0.0
        scale = steady(variance, fixed, max(SLOPE * self.scale * left.slope, least))
        found = jackknife_interval(value, one, variance, self.resamples, self.seed, scale)
        return {**found, "std": variance**0.5, "n_reference": m}

    def _left_out(self, fake: torch.Tensor, across: torch.Tensor) -> KernelJackknife:
        """The distance without the reference's own term, with and without each image, and its variance.

        It is a U-statistic: the mean of ``h(x, y) = k(x, y) - g(x) - g(y)`` over pairs, with g an image's mean kernel
        with the reference. Sums over pairs, over pairs that share one image and over pairs that share none give the
        unbiased estimate of its variance (Hoeffding 1948). Regressing the images' contributions to the variance on
        their contributions to the distance gives the slope.
        """
        n, offset = len(fake), across.mean()  # subtracted from h to keep precision

        def rows(start: int) -> torch.Tensor:
            """Some rows of h."""
            chosen = slice(start, start + CHUNK)
            h = self.kernel(fake[chosen], fake) - across[chosen, None] - across + offset
            h[torch.arange(len(h)), torch.arange(start, start + len(h))] = 0
            return h

        sums, each = [], []
        for start in range(0, n, CHUNK):
            h = rows(start)
            sums.append(h.sum(dim=1))
            each.append(h.square().sum(dim=1))
        row, each_square = torch.cat(sums), torch.cat(each)
        mean = row.sum() / (n * (n - 1))
        weighted = torch.cat([rows(start) @ row for start in range(0, n, CHUNK)])
        # From here on h is centered; its diagonal stays 0.
        weighted = weighted - mean * (row.sum() - row) - (n - 1) * mean * (row - (n - 1) * mean)
        each_square = each_square - 2 * mean * row + (n - 1) * mean**2
        row, squares = row - (n - 1) * mean, each_square.sum()
        sharing = row.square().sum() - squares
        apart = (-2 * squares - 4 * sharing) / (n * (n - 1) * (n - 2) * (n - 3))
        first = (sharing / (n * (n - 1) * (n - 2)) - apart).clamp(min=0)
        second = (squares / (n * (n - 1)) - apart).clamp(min=0)
        adds = (row.square() - each_square + 2 * (weighted - each_square)) / ((n - 1) * (n - 2))
        slope = float(2 / n * (n - 1) * (adds - adds.mean()) @ row / row.square().sum())
        value, all_pairs = mean - offset, n * (n - 1)
        one = value - 2 * row / ((n - 1) * (n - 2))
        fixed, growing = float(2 * second / all_pairs), float(4 * (n - 2) * first / all_pairs)
        # Both sums are 0 for equal images, up to rounding.
        return KernelJackknife(float(value), one, fixed, growing, max(slope, 0.0) if math.isfinite(slope) else 0.0)


class MaximumMeanDiscrepancy(KernelDistance):
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of sigma 10 of normalized embeddings.

    Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603, with CLIP ViT-L/14 at 336 px there. This is the unbiased
    estimate. The published code keeps the diagonals of the kernel matrices, which adds about
    ``1000 (1 - k) (1 / n + 1 / m)`` for n images, m reference images and a mean kernel k.
    """

    scale = 1000.0

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Adds embeddings ``(b, d)`` of any length; ``real`` marks the reference's."""
        super().update(torch.nn.functional.normalize(features.double()), real)

    def kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The kernel of every row of ``a`` ``(p, d)`` with every row of ``b`` ``(q, d)``: ``(p, q)``."""
        squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
        return (-squared / 200).exp()
