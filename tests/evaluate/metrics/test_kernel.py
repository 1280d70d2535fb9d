"""Kernel distances against double loops, closed forms and repeated draws."""

import math

import numpy as np
import pytest
import torch

from compress.evaluate.metrics import KernelDistance, MaximumMeanDiscrepancy
from tests.evaluate.metrics.draws import computed, draw


def by_numpy(x: np.ndarray, y: np.ndarray, kernel) -> float:
    """The unbiased squared MMD, pair by pair."""
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def cubic(a, b):
    return (a @ b / len(a) + 1) ** 3


def gaussian(a, b):
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 1000 * np.exp(-((a - b) ** 2).sum() / (2 * 10**2))


METRICS = [(KernelDistance, cubic), (MaximumMeanDiscrepancy, gaussian)]


@pytest.mark.parametrize(("metric", "kernel"), METRICS)
@pytest.mark.parametrize(("n", "m", "d"), [(30, 41, 7), (12, 9, 50)])
def test_agrees_with_numpy(metric, kernel, n, m, d):
    fake, real = draw(n, d, 1, 0.3, rectified=False), draw(m, d, 2, rectified=False)
    found = computed(metric(), fake, real)
    assert found["value"] == pytest.approx(by_numpy(fake.numpy(), real.numpy(), kernel), rel=1e-6)
    assert (found["n"], found["n_reference"]) == (n, m)


@pytest.mark.parametrize("metric", [KernelDistance, MaximumMeanDiscrepancy])
def test_chunks_change_nothing(metric, monkeypatch):
    fake, real = draw(50, 6, 1, 0.3), draw(70, 6, 2)
    whole = computed(metric(), fake, real)
    monkeypatch.setattr("compress.evaluate.metrics.kernel.CHUNK", 16)
    parts = computed(metric(), fake, real)
    assert {k: v for k, v in parts.items() if k != "interval_of"} == pytest.approx(
        {k: v for k, v in whole.items() if k != "interval_of"}, rel=1e-9
    )


def test_closed_form_of_gaussians():
    # d = 1, x ~ N(1, 1), y ~ N(0, 1): E (x x' + 1)^3 = 1 + 3 m1^2 + 3 m2^2 + m3^2 with the moments of each.
    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(4000, 1, generator=generator, dtype=torch.float64) + 1
    real = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    own, theirs = (1.0, 2.0, 4.0), (0.0, 1.0, 0.0)
    expected = sum(weight * (a - b) ** 2 for weight, a, b in zip((3, 3, 1), own, theirs, strict=True))
    found = computed(KernelDistance(), fake, real)
    assert abs(found["value"] - expected) < 4 * found["std"] + 0.05 * expected


@pytest.mark.parametrize("metric", [KernelDistance, MaximumMeanDiscrepancy])
def test_deviation_and_interval_are_those_of_other_draws(metric):
    real = draw(200, 10, 1)
    for shift, most in ((0.1, 2.2), (1.2, 1.35)):  # near 0 a variance that cannot be negative errs on the wide side
        rows = [computed(metric(resamples=300), draw(40, 10, seed, shift), real) for seed in range(100, 300)]
        values = torch.tensor([row["value"] for row in rows], dtype=torch.float64)
        variances = torch.tensor([row["std"] ** 2 for row in rows], dtype=torch.float64)
        assert 0.7 < float(variances.mean() / values.var()) < most
        covered = sum(row["low"] <= values.mean() <= row["high"] for row in rows) / len(rows)
        assert covered > 0.88


@pytest.mark.parametrize(("metric", "kernel"), METRICS)
def test_the_slope_is_how_the_variance_moves_with_the_distance(metric, kernel):
    """Leaving images out moves distance and variance together, by the slope."""
    fake, real = draw(60, 3, 1, 0.5), draw(70, 3, 2)
    if metric is MaximumMeanDiscrepancy:
        fake, real = (torch.nn.functional.normalize(rows) for rows in (fake, real))

    def left_out(rows):
        return metric()._left_out(rows, metric().kernel(rows, real).mean(dim=1))

    every = left_out(fake)
    few = [left_out(torch.cat([fake[:i], fake[i + 1 :]])) for i in range(60)]
    values = torch.tensor([found.value for found in few]).double()
    assert values.tolist() == pytest.approx(every.one.tolist())
    growing = torch.tensor([found.growing for found in few]).double()
    centered = values - values.mean()
    assert every.slope == pytest.approx(float(growing @ centered / centered.square().sum()), rel=0.15)


def test_unbiased_where_both_are_the_same():
    rows = [computed(KernelDistance(resamples=10), draw(20, 5, 2 * i), draw(20, 5, 2 * i + 1)) for i in range(150)]
    values = torch.tensor([row["value"] for row in rows])
    assert values.min() < 0
    assert abs(values.mean()) < 3 * values.std() / 150**0.5


@pytest.mark.parametrize("metric", [KernelDistance, MaximumMeanDiscrepancy])
def test_equal_images_have_finite_ends(metric):
    real = draw(30, 2048, 1).float()
    for n, seed in [(6, 5), (6, 0), (12, 2), (24, 2), (33, 1)]:
        found = computed(metric(), draw(1, 2048, seed).float().repeat(n, 1), real)
        assert found["low"] <= found["value"] <= found["high"]
        assert math.isfinite(found["std"])


def test_cmmd_does_not_see_lengths():
    fake, real = draw(20, 6, 1, 0.3), draw(30, 6, 2)
    scaled = computed(MaximumMeanDiscrepancy(), fake * torch.arange(1, 21)[:, None], 5 * real)
    assert scaled["value"] == pytest.approx(computed(MaximumMeanDiscrepancy(), fake, real)["value"], rel=1e-9)


@pytest.mark.parametrize("metric", [KernelDistance, MaximumMeanDiscrepancy])
def test_what_cannot_be_is_refused(metric):
    with pytest.raises(ValueError, match="at least 4 of features, not 3"):
        computed(metric(), draw(3, 6, 1), draw(20, 6, 1))
    with pytest.raises(ValueError, match="features are"):
        computed(metric(), draw(9, 6, 1), draw(20, 7, 1))
    with pytest.raises(FloatingPointError, match="NaN"):
        metric().update(torch.full((4, 2), torch.nan), real=True)
