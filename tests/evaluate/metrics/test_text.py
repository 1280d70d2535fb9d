"""Text alignment by hand."""

import pytest
import torch

from compress.evaluate.metrics import CLIPScore, MeanScore, Retrieval
from tests.evaluate.metrics.draws import draw


def test_clip_score():
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]])
    texts = torch.tensor([[2.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    metric = CLIPScore()
    metric.update(images[:1], texts[:1])
    metric.update(images[1:], texts[1:])
    found = metric.compute()
    assert found["value"] == pytest.approx(100 * (1 + 0.6 + 0) / 3)
    assert found["cosine"] == pytest.approx((1 + 0.6 - 1) / 3)
    assert found["low"] < found["value"] < found["high"]
    assert found["n"] == 3


def by_hand(images, texts, ids, k) -> float:
    """The share of images with fewer than k other captions nearer than their own."""
    pool = {int(i): text for i, text in zip(ids, texts, strict=True)}
    hits = 0
    for image, own in zip(images, ids, strict=True):
        cosines = {i: float(torch.cosine_similarity(image, text, dim=0)) for i, text in pool.items()}
        hits += sum(value > cosines[int(own)] for value in cosines.values()) < k
    return hits / len(images)


def test_retrieval(monkeypatch):
    ids = torch.arange(40) // 2 * 7 + 2**47  # two images a caption, and numbers as large as hashes
    texts = draw(40, 8, 1)[torch.arange(40) // 2 * 2]
    images = texts + 0.7 * draw(40, 8, 2, rectified=False)
    metric = Retrieval()
    metric.update(images, texts, ids)
    found = metric.compute()
    for k in (1, 5):
        row = found[f"r_at_{k}"]
        assert row["value"] == pytest.approx(by_hand(images, texts, ids, k))
        assert 0 < row["low"] < row["value"] < row["high"] < 1
        assert (row["n"], row["among"]) == (40, 20)
    assert found["r_at_1"]["value"] < found["r_at_5"]["value"]

    monkeypatch.setattr("compress.evaluate.metrics.text.CHUNK", 7)
    other, order = Retrieval(), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for chunk in order.split(13):
        other.update(images[chunk], texts[chunk], ids[chunk])
    assert other.compute() == found


def test_captions_that_say_the_same_do_not_stand_before_each_other():
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(21, 128, generator=generator))
    texts = torch.cat([texts, texts * (1 + 1e-7)])  # as "Red heart" and "red heart", in another batch
    images = texts + 0.25 * torch.randn(42, 128, generator=generator)
    metric, merged = Retrieval(), Retrieval()
    metric.update(images, texts, torch.arange(42))
    merged.update(images, texts, torch.arange(42) % 21)
    found, expected = metric.compute(), merged.compute()
    assert found["r_at_1"]["value"] == expected["r_at_1"]["value"]
    assert 0.5 < found["r_at_1"]["value"] < 1


def test_retrieval_of_shuffled_captions_is_chance():
    texts = draw(200, 8, 1, rectified=False)
    images = texts + 0.3 * draw(200, 8, 2, rectified=False)
    right, wrong = Retrieval(), Retrieval()
    right.update(images, texts, torch.arange(200))
    wrong.update(images, texts.roll(1, dims=0), torch.arange(200))
    assert right.compute()["r_at_1"]["low"] > 0.5
    assert wrong.compute()["r_at_1"]["high"] < 0.1


def test_retrieval_at_the_ends_has_an_interval():
    metric = Retrieval()
    metric.update(torch.eye(6), torch.eye(6), torch.arange(6))
    row = metric.compute()["r_at_1"]
    assert row["value"] == row["high"] == 1
    assert 0.5 < row["low"] < 0.9
    single = Retrieval()
    single.update(torch.eye(3), torch.ones(3, 3), torch.zeros(3))
    assert (single.compute()["r_at_1"]["value"], single.compute()["r_at_1"]["among"]) == (1, 1)


def test_variance_of_retrieval_is_that_of_other_draws():
    rows = []
    for seed in range(150):
        texts = draw(60, 6, 2 * seed, rectified=False)
        metric = Retrieval()
        metric.update(texts + 0.6 * draw(60, 6, 2 * seed + 1, rectified=False), texts, torch.arange(60))
        rows.append(metric.compute()["r_at_1"])
    values = torch.tensor([row["value"] for row in rows], dtype=torch.float64)
    width = sum(row["high"] - row["low"] for row in rows) / len(rows) / 3.92
    assert 0.85 < width / float(values.std()) < 1.35
    covered = sum(row["low"] <= values.mean() <= row["high"] for row in rows)
    assert 0.88 < covered / len(rows) < 0.995


def test_mean_score():
    metric = MeanScore()
    metric.update(torch.tensor([1.0, 2.0]))
    metric.update(torch.tensor([6.0]))
    assert metric.compute()["value"] == 3
    with pytest.raises(FloatingPointError, match="NaN"):
        metric.update(torch.tensor([torch.nan]))


def test_numbers_must_fit():
    with pytest.raises(ValueError, match="as many images as captions"):
        Retrieval().update(torch.eye(3), torch.eye(3), torch.arange(2))
