"""The Fréchet distance against scipy, closed forms and itself without rows, one at a time."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from compress.evaluate.metrics import FrechetDistance
from compress.evaluate.metrics.frechet import _leave_out
from tests.evaluate.metrics.draws import computed, draw


def by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    """As published: mean and covariance of both, and the matrix square root of the product."""
    a, b = a.numpy(), b.numpy()
    one, other = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = scipy.linalg.sqrtm(one @ other)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root.real))


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 24), (100, 400, 48), (60, 60, 1)])
@pytest.mark.parametrize("paired", [False, True])
def test_agrees_with_scipy(n, m, d, paired):
    fake, real = draw(n, d, 1, 0.2), draw(n if paired else m, d, 2)
    found = computed(FrechetDistance(paired=paired), fake, real)
    assert found["value"] == pytest.approx(by_scipy(fake, real), rel=1e-6)
    assert (found["n"], found["n_reference"]) == (len(fake), len(real))
    assert found["low"] < found["value"] < found["high"]


def test_fewer_images_than_features():
    # The square root of a singular matrix is more than scipy's sqrtm can do: by the eigenvalues of S2^1/2 S1 S2^1/2.
    fake, real = draw(20, 60, 1, 0.2), draw(90, 60, 2, rectified=False)
    one, other = np.cov(fake.numpy(), rowvar=False), np.cov(real.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(other).real
    values = scipy.linalg.eigvalsh(root @ one @ root)
    shift = ((fake.mean(0) - real.mean(0)) ** 2).sum()
    expected = float(shift) + np.trace(one + other) - 2 * np.sqrt(values[-19:]).sum()
    assert computed(FrechetDistance(), fake, real)["value"] == pytest.approx(expected, rel=1e-6)
    same = computed(FrechetDistance(), fake, fake)
    assert same["value"] == pytest.approx(0, abs=1e-9)


def exactly(covariance: torch.Tensor, mean: float, n: int = 200) -> torch.Tensor:
    """Rows whose mean and covariance are exactly these."""
    rows = torch.randn(n, len(covariance), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * (n - 1) ** 0.5
    return rows @ torch.linalg.cholesky(covariance).T + mean


def test_closed_forms_of_gaussians():
    # |m1 - m2|^2 + sum (s1 - s2)^2 where the covariances commute.
    one, other = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    expected = 3 * 0.7**2 + (1 + 1 + 2.5**2)
    for turn in (torch.eye(3).double(), torch.linalg.qr(draw(3, 3, 0)).Q):
        fake, real = exactly(turn @ one.diag() @ turn.T, 0.7), exactly(turn @ other.diag() @ turn.T, 0.0)
        assert computed(FrechetDistance(), fake, real)["value"] == pytest.approx(expected, rel=1e-9)
    # Scaling all features scales the distance with the square.
    assert computed(FrechetDistance(), 3 * fake, 3 * real)["value"] == pytest.approx(9 * expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(25, 60, 8), (16, 12, 40), (16, 60, 40), (12, 12, 12)])
@pytest.mark.parametrize("paired", [False, True])
def test_what_is_left_out_is_as_if_it_had_not_been_there(n, m, d, paired):
    fake = draw(n, d, 1, 0.3, rectified=False)
    real = fake * 0.5 + draw(n, d, 3) if paired else draw(m, d, 2)
    pairs = torch.combinations(torch.arange(n))[::7]
    left = _leave_out(fake, real, pairs, paired)

    def without(rows) -> float:
        keep = torch.ones(n, dtype=torch.bool)
        keep[rows] = False
        few = torch.zeros(0, 2, dtype=torch.long)
        return _leave_out(fake[keep], real[keep] if paired else real, few, paired).value

    one = [without(row) for row in range(n)]
    assert left.one.tolist() == pytest.approx(one, rel=1e-8)
    assert left.two.tolist() == pytest.approx([without(pair) for pair in pairs], rel=1e-8)
    assert np.std(one) > 1e-3  # they do differ


def test_the_bias_falls_with_n_and_the_extrapolation_is_nearly_without():
    real = draw(4000, 12, 0)
    many = computed(FrechetDistance(), draw(20000, 12, 1, 0.3), real)["value"]
    few = [computed(FrechetDistance(), draw(100, 12, seed, 0.3), real) for seed in range(2, 42)]
    bias = np.mean([row["value"] for row in few]) - many
    assert few[0]["infinite_from"] == 50
    assert bias > 0.1
    assert abs(np.mean([row["infinite"] for row in few]) - many) < 0.6 * bias


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_hold_the_value_of_other_draws(shift):
    real = draw(300, 40, 1)
    rows = [computed(FrechetDistance(resamples=300), draw(32, 40, seed, shift), real) for seed in range(100, 220)]
    center = sum(row["value"] for row in rows) / len(rows)
    covered = sum(row["low"] <= center <= row["high"] for row in rows)
    assert covered >= 106  # of 120, where 114 are expected
    width = sum(row["high"] - row["low"] for row in rows) / len(rows) / 3.92
    assert 0.8 < width / torch.tensor([row["value"] for row in rows]).std() < 1.5


def test_more_shift_is_further_away():
    real = draw(300, 16, 1)
    values = [computed(FrechetDistance(), draw(200, 16, 2, shift), real)["value"] for shift in (0, 0.2, 0.5, 1)]
    assert values == sorted(values)
    assert values[-1] > 10 * values[0]


def test_degenerate_sets():
    constant = torch.ones(10, 6)
    found = computed(FrechetDistance(), constant, draw(20, 6, 1))
    assert all(math.isfinite(found[key]) for key in ("value", "low", "high", "infinite"))
    twice = draw(5, 6, 1).repeat(4, 1)
    found = computed(FrechetDistance(), twice, draw(20, 6, 1, 0.2))
    assert found["low"] < found["value"] < found["high"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs at least 4 of features, not 3"):
        computed(FrechetDistance(), draw(3, 6, 1), draw(20, 6, 1))
    with pytest.raises(ValueError, match="features are"):
        computed(FrechetDistance(), draw(9, 6, 1), draw(20, 7, 1))
    with pytest.raises(ValueError, match="features are"):
        computed(FrechetDistance(paired=True), draw(9, 6, 1), draw(8, 6, 1))
    broken = draw(9, 6, 1)
    broken[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        FrechetDistance().update(broken, real=False)
    metric = FrechetDistance()
    metric.update(draw(9, 6, 1), real=False)
    with pytest.raises(ValueError, match="expected 6 numbers a row, not 7"):
        metric.update(draw(9, 7, 1), real=False)
