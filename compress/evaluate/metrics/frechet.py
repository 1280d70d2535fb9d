"""Fréchet distance of two sets of features."""

from dataclasses import dataclass
from typing import Any

import torch

from compress.evaluate.config import EXTRAPOLATED_FROM
from compress.evaluate.intervals import jackknife_interval, logarithm, pair_corrected_variance
from compress.evaluate.metrics.nuclear import directions, falls
from compress.evaluate.metrics.rows import RowMetric

LEAST = 4  # images: two of them can be left out
PAIRS = 512  # pairs of images left out together, a random choice
CHUNK = 4096  # rows at once
POINTS = 15  # points of the extrapolation, as published


class FrechetDistance(RowMetric):
    """Fréchet distance between Gaussian fits of two sets of features (FID if the features are Inception's).

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500. With centered features A and B of n and m images, the trace
    of ``sqrt(S1 S2)`` is the sum of the singular values of ``A B^T / sqrt((n - 1)(m - 1))``. This is exact, also with
    fewer images than features. The distance is biased upwards at small n: compare only values at the same n.

    ``infinite`` extrapolates to infinitely many images (Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023): the
    intercept of a line through the values of 15 random subsets over 1 / size, from ``infinite_from`` images on. It
    needs many more images than features.

    The interval is that of the value at this n, see :func:`compress.evaluate.intervals.jackknife_interval`.

    Args:
        paired: Row i of both sets belongs to one prompt and noise (the teacher's and the student's image), so both sets
            vary together. Otherwise the reference is fixed.
        resamples: Bootstrap resamples.
        seed: Seed of everything random.
    """

    higher_is_better = False
    names = ("features", "reference")

    def __init__(self, paired: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.paired = paired

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Adds features ``(b, d)``; ``real`` marks the reference's.

        With several processes each adds its share of both sets; if ``paired``, in the same order.

        Raises:
            FloatingPointError: A feature is not finite.
            ValueError: The width differs from that of the features before.
        """
        self.keep("reference" if real else "features", features)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "n_reference", "infinite", "infinite_from", "interval_of"}``.

        Raises:
            ValueError: There are fewer than 4 images or 2 reference images, or the numbers of pairs differ.
        """
        fake, real = self.rows("features", LEAST), self.rows("reference", 2)
        if fake.shape[1] != real.shape[1] or (self.paired and len(fake) != len(real)):
            raise ValueError(f"features are {tuple(fake.shape)}, the reference's {tuple(real.shape)}")
        # Sorted, so that the random choices do not depend on the order of the images.
        order = (fake - real.mean(dim=0)).square().sum(dim=1).argsort(stable=True)
        fake, real = fake[order], real[order] if self.paired else real
        found = frechet_interval(fake, real, self.paired, self.resamples, self.seed)
        infinite, smallest = _extrapolate(fake, real, self.paired, torch.Generator().manual_seed(self.seed))
        return {**found, "n_reference": len(real), "infinite": infinite, "infinite_from": smallest}


def frechet_interval(
    fake: torch.Tensor, real: torch.Tensor, paired: bool = False, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The distance between features ``(n, d)`` and a reference's ``(m, d)``, with its interval.

    Args:
        fake: float64; n at least 4.
        real: float64; m at least 2, and n if paired.
        paired: See :class:`FrechetDistance`.
        resamples: Bootstrap resamples.
        seed: Seed of everything random.

    Returns:
        ``{"value", "low", "high", "n", "interval_of"}``.
    """
    pairs = _random_pairs(len(fake), torch.Generator().manual_seed(seed))
    left = _leave_out(fake, real, pairs, paired)
    variance = pair_corrected_variance(left.value, left.one, left.two, pairs)
    return jackknife_interval(max(left.value, 0.0), left.one, variance, resamples, seed, logarithm)


@dataclass(frozen=True)
class FrechetJackknife:
    """The distance of n draws, and the distances with draws left out.

    Attributes:
        value: Of all draws.
        one: Without each draw, ``(n,)``.
        two: Without each of p pairs of draws, ``(p,)``.
    """

    value: float
    one: torch.Tensor
    two: torch.Tensor


def _leave_out(fake: torch.Tensor, real: torch.Tensor, pairs: torch.Tensor, paired: bool) -> FrechetJackknife:
    """The exact distance, also without each row and without each pair of rows ``(p, 2)``."""
    a, b = fake - fake.mean(dim=0), real - real.mean(dim=0)
    mean = fake.mean(dim=0) - real.mean(dim=0)
    (basis, core), (other_basis, other_core) = _reduced(a), _reduced(b)
    u, sigma, vh = torch.linalg.svd(core @ other_core.T, full_matrices=False)
    above = sigma > sigma[0] * max(core.shape) * torch.finfo(sigma.dtype).eps
    u, v = u[:, above], vh[above].T
    u = u if basis is None else basis @ u
    v = (v if other_basis is None else other_basis @ v) if paired else None

    def without(rows: torch.Tensor) -> torch.Tensor:
        k, n, m = rows.shape[1], len(a), len(b)
        nuclear = sigma.sum()
        if above.any():
            nuclear = nuclear - falls(sigma[above], directions(u, rows), None if v is None else directions(v, rows))
        shift = mean - a[rows].sum(dim=1) / (n - k)
        spread = _spread(a, rows) / (n - k - 1)
        if paired:
            shift = shift + b[rows].sum(dim=1) / (n - k)
            spread = spread + _spread(b, rows) / (n - k - 1)
            left = (n - k - 1) ** 2
        else:
            spread = spread + b.square().sum() / (m - 1)
            left = (n - k - 1) * (m - 1)
        return shift.square().sum(dim=1) + spread - 2 * nuclear / left**0.5

    def all_without(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([without(chunk) for chunk in rows.split(CHUNK)])

    spread = a.square().sum() / (len(a) - 1) + b.square().sum() / (len(b) - 1)
    value = mean.square().sum() + spread - 2 * sigma.sum() / ((len(a) - 1) * (len(b) - 1)) ** 0.5
    return FrechetJackknife(
        float(value), all_without(torch.arange(len(a), device=a.device)[:, None]), all_without(pairs)
    )


def _spread(centered: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The sum of squared distances from the mean without some rows ``(p, k)``: ``(p,)``."""
    gone, k = centered[rows], rows.shape[1]
    lost = gone.square().sum(dim=(1, 2)) + gone.sum(dim=1).square().sum(dim=1) / (len(centered) - k)
    return centered.square().sum() - lost


def _reduced(rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The QR decomposition of the rows; None and the rows if there are no more rows than columns."""
    if rows.shape[0] <= rows.shape[1]:
        return None, rows
    q, r = torch.linalg.qr(rows)
    return q, r


def _random_pairs(n: int, generator: torch.Generator) -> torch.Tensor:
    """Pairs of different rows, ``(PAIRS, 2)``; each pair once if there are no more than that."""
    if n * (n - 1) // 2 <= PAIRS:
        return torch.combinations(torch.arange(n))
    first = torch.randint(n, (PAIRS,), generator=generator)
    return torch.stack([first, (first + torch.randint(1, n, (PAIRS,), generator=generator)) % n], dim=1)


def _extrapolate(fake: torch.Tensor, real: torch.Tensor, paired: bool, generator: torch.Generator) -> tuple[float, int]:
    """The distance extrapolated to infinitely many images, and the size of the smallest subset."""
    n = len(fake)
    smallest = min(EXTRAPOLATED_FROM, n // 2)
    sizes = torch.linspace(smallest, n, POINTS, dtype=torch.float64).round().long().tolist()
    values = []
    if not paired:  # the reference is the same for all
        factor = _reduced(real - real.mean(dim=0))[1] / (len(real) - 1) ** 0.5
        products, mean, spread = fake @ factor.T, real.mean(dim=0), factor.square().sum()
    for size in sizes:
        chosen = torch.randperm(n, generator=generator)[:size]
        a = fake[chosen] - fake[chosen].mean(dim=0)
        if paired:
            mean, b = real[chosen].mean(dim=0), (real[chosen] - real[chosen].mean(dim=0)) / (size - 1) ** 0.5
            product, spread = _reduced(a)[1] @ _reduced(b)[1].T, b.square().sum()
        else:
            product = products[chosen] - products[chosen].mean(dim=0)
        shift = (fake[chosen].mean(dim=0) - mean).square().sum()
        values.append(float(shift + a.square().sum() / (size - 1) + spread - 2 * _nuclear(product) / (size - 1) ** 0.5))
    lines = torch.stack([torch.ones(POINTS, dtype=torch.float64), 1 / torch.tensor(sizes, dtype=torch.float64)], dim=1)
    fitted = torch.linalg.lstsq(lines, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return float(fitted[0, 0]), smallest


def _nuclear(product: torch.Tensor) -> torch.Tensor:
    """The nuclear norm to about seven digits, from the smaller Gram matrix."""
    gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
