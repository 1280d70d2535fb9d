"""95 % intervals of the metrics, by a bootstrap over the images' contributions. No network runs again.

An interval covers the expectation of the same statistic over fresh draws of n images with the reference fixed. A metric
that is biased at small n, such as the Fréchet distance, keeps its bias: rows compare only at the same n.

Resampling images does not give this for a distance of sets. A resample holds 63 % of the images, as if n were smaller;
that moves the distance by more than the interval's width. Contributions are resampled instead: the values for a mean,
Tukey's pseudo-values (the change when one image is left out) for a statistic of the whole set. Their means are scaled
to the standard deviation of fresh draws and widened by Student's t for the contributions' number and kurtosis.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.special import betaincinv, ndtri, stdtrit

INTERVAL_OF = "expectation of the same statistic over fresh draws of n images, reference held fixed"
Z = float(ndtri(0.975))  # half the width of a 95 % interval, in standard deviations
CHUNK = 10_000_000  # numbers drawn at once

Scale = Callable[[float, float, float], tuple[float, float]]


def mean_interval(
    values: torch.Tensor, resamples: int = 1000, seed: int = 0, within: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, Any]:
    """The mean of independent values with a bootstrap interval.

    Args:
        values: ``(n,)``, n at least 1; of a single value the interval is the value.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        within: Smallest and largest possible value; the interval is clipped to them.

    Returns:
        ``{"value", "low", "high", "n", "interval_of"}``.
    """
    values, n = values.double().cpu(), len(values)
    value, variance = float(values.mean()), float(values.var()) / n if n > 1 else 0.0
    low, high = _offsets(values, variance, resamples, seed)
    return _row(value, max(value + low, min(within[0], value)), min(value + high, max(within[1], value)), n)


def jackknife_interval(
    value: float,
    one: torch.Tensor,
    variance: float,
    resamples: int = 1000,
    seed: int = 0,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """A statistic of a set of images with a bootstrap interval.

    Args:
        value: The statistic of all n images.
        one: The statistic without each image, ``(n,)``.
        variance: Variance of the statistic over fresh draws of n images.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        scale: Maps the value and the interval's two offsets from it to the interval, so that a bounded distance stays
            within its bound. None adds the offsets.

    Returns:
        ``{"value", "low", "high", "n", "interval_of"}``.
    """
    one, n = one.double().cpu(), len(one)
    low, high = _offsets(n * value - (n - 1) * one, variance, resamples, seed)
    low, high = (value + low, value + high) if scale is None else scale(value, low, high)
    return _row(value, low, high, n)


def logarithm(value: float, low: float, high: float) -> tuple[float, float]:
    """The interval on a logarithmic scale, for a distance whose spread grows with it.

    A small sample without outliers gives a small distance with a variance that is too small.
    """
    if value <= max(-low, high):  # the offsets are too large for a logarithm
        return min(max(value + low, 0.0), value), value + high
    return value * math.exp(low / value), value * math.exp(high / value)


def steady(variance: float, fixed: float, slope: float) -> Scale:
    """An interval of all expectations that are near the value, measured with the variance at *each expectation*.

    The variance of a squared distance grows with the distance, so a draw that happens to be small also has a small
    variance. The variance at the value itself would give intervals that miss too often. This is the step from Wald's to
    Wilson's interval of a share.

    Args:
        variance: Variance of the value.
        fixed: Part of the variance that is the same at any expectation.
        slope: How much the variance grows with the expectation, at least 0.
    """

    def scale(value: float, low: float, high: float) -> tuple[float, float]:
        if variance <= 0:
            return value + low, value + high

        def end(offset: float) -> float:
            """The t with ``(t - value)^2 = offset^2 (variance + slope (t - value)) / variance``, relative to it."""
            ratio = offset**2 / variance
            return ratio * slope / 2 + math.copysign(((ratio * slope / 2) ** 2 + offset**2) ** 0.5, offset)

        return value + min(end(low), low * (fixed / variance) ** 0.5), value + end(high)

    return scale


def pair_corrected_variance(value: float, one: torch.Tensor, two: torch.Tensor, pairs: torch.Tensor) -> float:
    """The variance over fresh draws, from leaving out single images and pairs.

    The jackknife (Efron and Stein 1981, https://doi.org/10.1214/aos/1176345462) counts the joint effect of a pair
    twice. Near the reference that is most of a Fréchet distance's variance. Leaving out both images of a pair measures
    it. Only half of the surplus is subtracted: the estimate is uncertain, and subtracting all of it gives intervals
    that are too narrow for few and uneven images.

    Args:
        value: The statistic of all n images.
        one: The statistic without each image, ``(n,)``.
        two: The statistic without both images of some pairs, ``(p,)``.
        pairs: Indices of these pairs, ``(p, 2)``, chosen at random.
    """
    n = len(one)
    jackknife = (n - 1) / n * (one - one.mean()).square().sum()
    together = n * value - (n - 1) * one[pairs].sum(dim=1) + (n - 2) * two
    surplus = n * (n - 1) / 2 * ((together - together.mean()) / n).square().mean()
    return float(jackknife - torch.minimum(surplus, jackknife / 2) / 2)


def share_interval(
    share: float, variance: float, n: int, freedom: float = math.inf, sure: float = 0.0
) -> dict[str, Any]:
    """A share of images with Jeffreys' interval, which also works near 0 and 1, where all resamples are the same.

    Brown, Cai and DasGupta 2001, https://doi.org/10.1214/ss/1009213286: the middle 95 % of the posterior. At shares of
    0 and 1 it reaches the end, and as far as the Clopper-Pearson interval.

    Args:
        share: In [0, 1].
        variance: Variance over fresh draws; ``share (1 - share) / n`` for independent images.
        n: Number of images.
        freedom: Degrees of freedom of the variance if it was estimated.
        sure: Part of the variance that is known without an estimate.

    Returns:
        ``{"value", "low", "high", "n", "interval_of"}``.
    """
    spread = share * (1 - share)
    variance += max(variance - sure, 0.0) * (_student(freedom) ** 2 - 1)
    effective = min(spread / variance, 100.0 * n) if variance > 0 and spread > 0 else float(n)
    hits, farthest = share * effective, 1 - 0.025 ** (1 / effective)
    low, high = betaincinv(hits + 0.5, effective - hits + 0.5, [0.025, 0.975]).tolist()
    low = 0.0 if share <= 0 else min(low, 1 - farthest, share)
    high = 1.0 if share >= 1 else max(high, farthest, share)
    return _row(share, low, high, n)


def no_interval(value: float, n: int, why: str) -> dict[str, Any]:
    """A row without an interval.

    Returns:
        ``{"value", "low", "high", "n", "interval_of", "why"}``, both ends None.
    """
    return {**_row(value, value, value, n), "low": None, "high": None, "why": why}


def freedom(contributions: torch.Tensor) -> float:
    """Degrees of freedom of the variance of contributions: ``2 n / (kurtosis - 1)``, n for a normal distribution."""
    centered = contributions - contributions.mean()
    spread = centered.square().mean()
    kurtosis = float(centered.pow(4).mean() / spread.square()) if spread > 0 else 1.0
    return 2 * len(contributions) / max(kurtosis - 1, 1e-3)


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Half the width of the 95 % interval of the difference of two independently drawn rows.

    Args:
        a: With ``low`` and ``high``.
        b: With ``low`` and ``high``.

    Returns:
        The half width. A difference of the two values that is not larger is within the noise.
    """
    return float(((a["high"] - a["low"]) ** 2 + (b["high"] - b["low"]) ** 2) ** 0.5 / 2)


def _row(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"value": float(value), "low": float(low), "high": float(high), "n": n, "interval_of": INTERVAL_OF}


def _offsets(contributions: torch.Tensor, variance: float, resamples: int, seed: int) -> tuple[float, float]:
    """Both ends of the interval relative to the value."""
    n = len(contributions)
    centered = (contributions - contributions.mean()).sort().values  # sorted: the order of the images does not matter
    spread = centered.square().mean()
    if variance <= 0 or spread <= 0:
        return 0.0, 0.0
    generator = torch.Generator().manual_seed(seed)
    counts = [min(resamples - start, max(1, CHUNK // n)) for start in range(0, resamples, max(1, CHUNK // n))]
    means = torch.cat([centered[torch.randint(n, (count, n), generator=generator)].mean(dim=1) for count in counts])
    quantiles = torch.quantile(means / (spread / n).sqrt(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (quantiles * variance**0.5 * _student(freedom(centered))).tolist()
    return min(low, 0.0), max(high, 0.0)


def _student(freedom: float) -> float:
    """Width of Student's t relative to a normal distribution, middle 95 %; below 2 degrees of freedom as for 2."""
    return float(stdtrit(max(freedom, 2.0), 0.975)) / Z
