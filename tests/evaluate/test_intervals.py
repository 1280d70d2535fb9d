"""Intervals against repeated draws and what statistics' tables say."""

import math
import re
from io import StringIO

import pytest
import scipy.stats
import torch
from rich.console import Console

from compress.evaluate.intervals import (
    difference,
    freedom,
    jackknife_interval,
    logarithm,
    mean_interval,
    no_interval,
    pair_corrected_variance,
    share_interval,
    steady,
)
from compress.jobs.score.report import print_scores
from compress.report.table import markdown_table


def test_mean_of_many_is_the_textbooks():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 5
    found = mean_interval(values, 4000)
    half = 1.96 * float(values.std()) / 2000**0.5
    assert found["value"] == pytest.approx(float(values.double().mean()))
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.08)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.08)
    assert found == mean_interval(values, 4000)
    assert found != mean_interval(values, 4000, seed=1)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    shuffled = mean_interval(values[order], 4000)
    assert shuffled["low"] == pytest.approx(found["low"], rel=1e-12)


@pytest.mark.parametrize("n", [12, 60])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_means_are_covered(n, kind):
    generator = torch.Generator().manual_seed(n)
    draws = torch.randn(400, n, generator=generator).double()
    if kind == "exponential":
        draws = -torch.rand(400, n, generator=generator).double().log() - 1
    rows = [mean_interval(row, 500) for row in draws]
    covered = sum(row["low"] <= 0 <= row["high"] for row in rows) / 400
    assert (0.90 if kind == "normal" else 0.85 if n == 12 else 0.89) < covered < 0.99


def test_values_that_do_not_vary_have_no_interval():
    found = mean_interval(torch.full((6,), 2.5))
    assert (found["low"], found["value"], found["high"]) == (2.5, 2.5, 2.5)
    single = mean_interval(torch.tensor([3.0]))
    assert (single["low"], single["high"], single["n"]) == (3, 3, 1)


def test_intervals_end_where_values_do():
    values = torch.tensor([0.9, 0.99, 0.999, 0.9999, 1.0])
    assert mean_interval(values)["high"] > 1
    bound = mean_interval(values, within=(0.95, 1.0))
    assert (bound["low"], bound["high"]) == (0.95, 1.0)


def test_jackknife_of_a_mean_is_the_interval_of_the_mean():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    one = (values.sum() - values) / 29
    found = jackknife_interval(float(values.mean()), one, float(values.var()) / 30)
    assert found == pytest.approx(mean_interval(values)) or found["low"] == pytest.approx(mean_interval(values)["low"])
    assert found["high"] == pytest.approx(mean_interval(values)["high"])


def test_pairs_are_counted_once():
    # The squared mean of centered values: all of its variance is that of pairs, and the jackknife gives it twice.
    generator, n, ratios = torch.Generator().manual_seed(0), 40, []
    pairs = torch.combinations(torch.arange(n))
    for _ in range(300):
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        x = x - x.mean() + 0.02 * torch.randn(1, generator=generator, dtype=torch.float64)
        square = float(x.mean() ** 2)
        one = ((x.sum() - x) / (n - 1)) ** 2
        two = ((x.sum() - x[pairs].sum(dim=1)) / (n - 2)) ** 2
        jackknife = float((n - 1) / n * (one - one.mean()).square().sum())
        ratios.append((jackknife, pair_corrected_variance(square, one, two, pairs)))
    jackknife, corrected = torch.tensor(ratios).mean(dim=0)
    assert corrected / jackknife == pytest.approx(0.75, abs=0.02)
    linear = torch.randn(n, generator=generator, dtype=torch.float64)
    one, two = (linear.sum() - linear) / (n - 1), (linear.sum() - linear[pairs].sum(dim=1)) / (n - 2)
    assert pair_corrected_variance(float(linear.mean()), one, two, pairs) == pytest.approx(float(linear.var()) / n)


def test_scales():
    low, high = logarithm(10.0, -2.0, 2.0)
    assert (low, high) == pytest.approx((10 * math.exp(-0.2), 10 * math.exp(0.2)))
    assert logarithm(1.0, -2.0, 3.0) == (0, 4)


def test_expectations_are_held_against_their_own_spread():
    # Without a slope it adds; with one the ends solve (t - v)^2 = z^2 (variance + slope (t - v)).
    assert steady(4.0, 1.0, 0.0)(0.5, -4.0, 4.0) == pytest.approx((-3.5, 4.5))
    low, high = steady(4.0, 0.0, 1.5)(2.0, -4.0, 4.0)
    for end in (low, high):
        assert (end - 2) ** 2 == pytest.approx(4 * (4 + 1.5 * (end - 2)))
    assert 2 - low < 4 < high - 2
    # What of the variance is there anyway, is there below the value too.
    assert steady(4.0, 3.9, 100.0)(2.0, -4.0, 4.0)[0] == pytest.approx(2 - 4 * (3.9 / 4) ** 0.5)
    assert steady(0.0, 0.0, 0.0)(2.0, 0.0, 0.0) == (2.0, 2.0)


@pytest.mark.parametrize(("hits", "n"), [(3, 20), (50, 100), (1, 64), (29_990, 30_000)])
def test_shares_are_jeffreys(hits, n):
    share = hits / n
    found = share_interval(share, share * (1 - share) / n, n)
    low, high = scipy.stats.beta(hits + 0.5, n - hits + 0.5).ppf([0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_shares_of_none_and_all():
    exact = scipy.stats.binomtest(0, 30).proportion_ci(method="exact")
    none, every = share_interval(0.0, 0.0, 30), share_interval(1.0, 0.0, 30)
    assert (none["low"], none["high"]) == pytest.approx((0, exact.high))
    assert (every["low"], every["high"]) == pytest.approx((1 - exact.high, 1))


def test_shares_of_what_varies_more_are_less_sure():
    few, many = share_interval(0.5, 0.01, 100), share_interval(0.5, 0.0025, 100)
    assert few["high"] - few["low"] == pytest.approx(2 * (many["high"] - many["low"]), rel=0.05)
    unsure = share_interval(0.5, 0.0025, 100, freedom=5)
    assert (unsure["high"] - unsure["low"]) / (many["high"] - many["low"]) == pytest.approx(2.571 / 1.96, rel=0.02)
    assert share_interval(0.5, 0.0025, 100, freedom=0.1) == share_interval(0.5, 0.0025, 100, freedom=2)
    assert share_interval(0.5, 0.0025, 100, freedom=5, sure=0.0025) == many
    half = share_interval(0.5, 0.0025, 100, freedom=5, sure=0.00125)
    assert many["high"] < half["high"] < unsure["high"]


@pytest.mark.parametrize("n", [16, 64, 400])
def test_shares_are_covered(n):
    """At every share, but where fewer than one draw in a hundred has a hit at all."""
    hits = torch.arange(n + 1, dtype=torch.float64)
    rows = [share_interval(x / n, x / n * (1 - x / n) / n, n) for x in range(n + 1)]
    for share in [0.011 / n, 0.1 / n, 0.17 / n, 0.4 / n, 1 / n, 2.4 / n, 3.7 / n, 0.2, 0.5]:
        chances = scipy.stats.binom.pmf(hits.numpy(), n, share)
        covered = sum(chances[x] for x, row in enumerate(rows) if row["low"] <= share <= row["high"])
        assert 0.895 < covered < 0.995, (share, covered)


def test_degrees_of_freedom():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert freedom(normal) == pytest.approx(20_000, rel=0.05)
    assert freedom(normal.pow(3)) < 2000


def test_no_interval():
    row = no_interval(0.5, 20, "reason")
    assert (row["value"], row["low"], row["high"], row["n"], row["why"]) == (0.5, None, None, 20, "reason")


def test_tables_say_why_there_is_no_interval():
    row = {**no_interval(0.25, 20, "too few images"), "network": "tiny", "network_sha256": "0" * 64}
    images = {"n": 20, "folder": "ours", "sizes": 1, "largest": "8x8", "smallest": "8x8", "on_white": 0}
    console = Console(width=100, record=True, file=StringIO())
    manifest = {"images": images, "reference": None, "paired": False}
    print_scores({"metrics": {"recall": row}, "manifest": manifest}, console)
    shown = console.export_text()
    assert re.search("recall ↑ +0.250 +– ", shown)
    assert "recall has no interval: too few images." in shown
    teacher = {**row, "low": 0.2, "high": 0.3}
    table = markdown_table(
        {"teacher": {"metrics": {"recall": teacher}}, "stages": [{"name": "a", "metrics": {"recall": row}}]}
    )
    assert "| teacher | 0.250 [0.200, 0.300] |" in table
    assert "| a | 0.250 |" in table  # and no mark of a difference within the noise
    assert "recall without an interval: too few images." in table


def test_difference():
    a, b = {"low": 1.0, "high": 7.0}, {"low": 0.0, "high": 8.0}
    assert difference(a, b) == pytest.approx(5)
