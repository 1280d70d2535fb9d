"""Precision and recall by hand, without each image in turn, and over fresh draws."""

import pytest
import torch

from compress.evaluate.metrics import PrecisionRecall
from compress.evaluate.metrics.recall import recall, spread
from tests.evaluate.metrics.draws import computed, draw


def by_hand(inner: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    """The share of ``inner`` within the balls of ``manifold``."""
    reach = [sorted(float((a - b).norm()) for b in manifold)[k] for a in manifold]
    inside = [any(float((x - a).norm()) <= r for a, r in zip(manifold, reach, strict=True)) for x in inner]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("k", [1, 3])
def test_agrees_with_loops(k, monkeypatch):
    monkeypatch.setattr("compress.evaluate.metrics.neighbors.CHUNK", 16)
    fake, real = draw(25, 6, 1, 0.2), draw(40, 6, 2)
    found = computed(PrecisionRecall(k), fake, real)
    assert found["precision"]["value"] == pytest.approx(by_hand(fake, real, k))
    assert found["recall"]["value"] == pytest.approx(by_hand(real, fake, k))
    assert 0 < found["recall"]["value"] < 1
    for row in found.values():
        assert 0 <= row["low"] < row["value"] < row["high"] <= 1
        assert (row["n"], row["n_reference"], row["k"]) == (25, 40, k)


def test_recall_without_each_image(monkeypatch):
    monkeypatch.setattr("compress.evaluate.metrics.recall.CHUNK", 16)
    fake, real = draw(25, 4, 1, 0.8, rectified=False), draw(60, 4, 2, rectified=False)
    found = recall(fake, real, 3)
    expected = [recall(torch.cat([fake[:i], fake[i + 1 :]]), real, 3).value for i in range(25)]
    assert found.one.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 3


def test_variance_of_recall_is_that_of_other_draws(monkeypatch):
    monkeypatch.setattr("compress.evaluate.metrics.recall.SPLITS", 8)
    real = draw(150, 8, 1, rectified=False)
    values, variances, jackknives = [], [], []
    for seed in range(100, 220):
        fake = draw(48, 8, seed, 0.3, rectified=False)
        found = recall(fake, real, 3)
        estimate = spread(found, fake, real, 3, torch.Generator().manual_seed(0))
        assert estimate.why == ""
        values.append(found.value)
        variances.append(estimate.variance)
        jackknives.append(found.jackknife)
    true = float(torch.tensor(values).var())
    assert sum(jackknives) / 120 > 1.6 * true  # what is counted more than once
    assert 0.9 < sum(variances) / 120 / true < 1.9


def test_few_images_keep_the_jackknife():
    fake, real = draw(15, 4, 1, rectified=False), draw(30, 4, 2, rectified=False)
    found = recall(fake, real, 3)
    assert spread(found, fake, real, 3, torch.Generator()).variance == found.jackknife


def test_part_of_a_large_reference_tells_the_spread(monkeypatch):
    fake, real = draw(60, 8, 1, 0.3, rectified=False), draw(400, 8, 2, rectified=False)
    whole = computed(PrecisionRecall(), fake, real)["recall"]
    monkeypatch.setattr("compress.evaluate.metrics.recall.MOST", 100)
    part = computed(PrecisionRecall(), fake, real)["recall"]
    assert part["value"] == whole["value"]
    assert part["low"] != whole["low"]
    assert part["high"] - part["low"] == pytest.approx(whole["high"] - whole["low"], rel=0.25)
    flipped = computed(PrecisionRecall(), fake, real.flip(0))["recall"]
    assert [flipped["low"], flipped["high"]] == pytest.approx([part["low"], part["high"]], rel=1e-9)


def modes(n: int, seed: int) -> torch.Tensor:
    """Six modes in many dimensions, two of them with a tenth of the images."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.3, 0.2, 0.15, 0.15, 0.1, 0.1])
    centers = 2 * torch.randn(6, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = torch.multinomial(shares, n, replacement=True, generator=generator)
    return centers[chosen] + 0.5 * torch.randn(n, 200, generator=generator, dtype=torch.float64)


def test_recall_that_jumps_has_no_interval():
    real, refused = modes(150, 1), 0
    real = 0.9 * real + 0.3 * real.std(dim=0)
    for seed in range(2, 7):
        found = computed(PrecisionRecall(), modes(64, seed), real)
        row = found["recall"]
        if row["low"] is None:
            refused += 1
            assert row["high"] is None
            assert "jumps" in row["why"]
            assert 0 <= row["value"] <= 1
        assert found["precision"]["low"] is not None
    assert refused == 5


def test_modes_dropped_and_modes_invented():
    real = torch.cat([draw(100, 4, 1), draw(100, 4, 2) + 50])
    half = computed(PrecisionRecall(), draw(80, 4, 3), real)
    assert half["precision"]["value"] > 0.9
    assert half["recall"]["value"] < 0.55
    other = computed(PrecisionRecall(), torch.cat([draw(80, 4, 3), draw(80, 4, 4) - 50]), real)
    assert 0.4 < other["precision"]["value"] < 0.55
    apart = computed(PrecisionRecall(), draw(30, 4, 3) + 500, real)
    assert apart["precision"]["value"] == apart["recall"]["value"] == 0
    assert 0 < apart["precision"]["high"] < 0.2


def test_too_few_images():
    with pytest.raises(ValueError, match="at least 5 of features, not 4"):
        computed(PrecisionRecall(), draw(4, 4, 3), draw(9, 4, 2))
    with pytest.raises(ValueError, match="at least 4 of reference, not 3"):
        computed(PrecisionRecall(), draw(9, 4, 3), draw(3, 4, 2))
