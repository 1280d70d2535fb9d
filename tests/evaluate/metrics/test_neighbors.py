"""Precision and recall by hand."""

import pytest
import torch

from compress.evaluate.metrics import PrecisionRecall
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
    assert 0 <= found["precision"]["low"] < found["precision"]["value"] < found["precision"]["high"] <= 1
    assert (found["recall"]["low"], found["recall"]["high"]) == (None, None)
    assert "neighbors" in found["recall"]["why"]
    for row in found.values():
        assert (row["n"], row["n_reference"], row["k"]) == (25, 40, k)


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
