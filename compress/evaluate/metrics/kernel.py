"""Kernel distances: squared maximum mean discrepancies of two sets of features."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from compress.evaluate.intervals import jackknife_interval, steady
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # rows of a kernel matrix at once
LEAST = 4  # images, below which the variance cannot be estimated
SLOPE = 0.7  # of how the variance grows with the distance that is taken, it being as unsure as the variance itself


@dataclass(frozen=True)
class LeftOut:
    """A distance, but for the reference's own part, and what it would be with other images.

    Attributes:
        value: Of all n images.
        one: Without each, ``(n,)``.
        fixed: The part of the variance that comes from pairs, which is there at a distance of 0 too.
        growing: The part that comes from single images.
        slope: By how much the variance grows with the distance.
    """

    value: float
    one: torch.Tensor
    fixed: float
    growing: float
    slope: float


class KernelDistance(RowMetric):
    """Kernel Inception Distance: squared MMD with the kernel ``(x.y / d + 1)^3``.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401: the unbiased estimate, over all pairs rather than over
    random subsets. Unbiased at every n, and may be below 0. ``std`` is the standard deviation over fresh draws of n
    images.

    Args:
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = False
    scale = 1.0

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("features", "reference", **kwargs)
        self.resamples, self.seed = resamples, seed

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes features ``(b, d)``; ``real`` says that they are the reference's.

        Under several processes each gives its own share of both sets.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: Features of another width than before.
        """
        self.keep("reference" if real else "features", features)

    def kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The kernel of every row of ``a`` ``(p, d)`` with every row of ``b`` ``(q, d)``: ``(p, q)``."""
        return (a @ b.T / a.shape[1] + 1) ** 3

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "std", "n", "n_reference", "interval_of"}``.

        Raises:
            ValueError: There are fewer than 4 images or 2 of the reference.
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
        # To the very images of the reference, rather than to what they were drawn from, the distance is at least 0,
        # and at 0 nothing of the growing part is left.
        distance = max(value + self.scale * (biased - within), variance**0.5)
        least = (variance - fixed) / distance if variance > 0 else 0.0
        scale = steady(variance, fixed, max(SLOPE * self.scale * left.slope, least))
        found = jackknife_interval(value, one, variance, self.resamples, self.seed, scale)
        return {**found, "std": variance**0.5, "n_reference": m}

    def _left_out(self, fake: torch.Tensor, across: torch.Tensor) -> LeftOut:
        """The distance without the reference's own part, the same without each image, and its variance.

        It is a U-statistic, the mean of ``h(x, y) = k(x, y) - g(x) - g(y)`` over pairs, with g a image's mean kernel
        with the reference; sums over pairs, over pairs that share one image and over those that share none give the
        unbiased estimate of its variance (Hoeffding 1948). How that variance moves with the distance is the slope of
        what each image adds to the one over what it adds to the other.
        """
        n, offset = len(fake), across.mean()  # a constant taken off h, so that no digits are lost

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
        # From here on of h without its mean; the diagonal stays 0.
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
        # Of equal images both sums are 0, but for rounding.
        return LeftOut(float(value), one, fixed, growing, max(slope, 0.0) if math.isfinite(slope) else 0.0)


class MaximumMeanDiscrepancy(KernelDistance):
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of sigma 10, of embeddings brought to length 1.

    Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603, there with CLIP ViT-L/14 at 336 px. The unbiased estimate;
    the published code keeps the diagonals of the kernel matrices, which at n images and m of the reference adds
    about ``1000 (1 - k) (1 / n + 1 / m)``, k the mean kernel of two images.
    """

    scale = 1000.0

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Takes embeddings ``(b, d)`` of any length; ``real`` says that they are the reference's."""
        super().update(torch.nn.functional.normalize(features.double()), real)

    def kernel(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The kernel of every row of ``a`` ``(p, d)`` with every row of ``b`` ``(q, d)``: ``(p, q)``."""
        squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
        return (-squared / 200).exp()
