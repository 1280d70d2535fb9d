"""Alignment of pictures with their captions, and scores that a model gives to each picture."""

from typing import Any

import torch

from compress.evaluate.intervals import mean_interval, share_interval
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # pictures at once


class MeanScore(RowMetric):
    """The mean of a number per picture, such as a preference model's score.

    Args:
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = True

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("values", **kwargs)
        self.resamples, self.seed = resamples, seed

    def update(self, values: torch.Tensor) -> None:
        """Takes the numbers of a batch, ``(b,)``."""
        self.keep("values", values)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "interval_of"}``."""
        return mean_interval(self.rows("values").flatten(), self.resamples, self.seed)


class CLIPScore(RowMetric):
    """100 max(cos, 0) of each picture's and its caption's embedding.

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with the factor 100 that is usual instead of their 2.5.

    Args:
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = True

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("cosines", **kwargs)
        self.resamples, self.seed = resamples, seed

    def update(self, image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> None:
        """Takes both embeddings of a batch, each ``(b, d)``, of any length."""
        images, texts = image_embeddings.double(), text_embeddings.double()
        self.keep("cosines", torch.nn.functional.cosine_similarity(images, texts))

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "cosine", "n", "interval_of"}``; ``cosine`` is the mean of the raw cosines."""
        cosines = self.rows("cosines").flatten()
        found = mean_interval(100 * cosines.clamp(min=0), self.resamples, self.seed)
        return {**found, "cosine": float(cosines.mean())}


class Retrieval(RowMetric):
    """Share of the pictures whose own caption is among the k nearest of all distinct captions (R@1 and R@5)."""

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("images", "texts", "ids", **kwargs)

    def update(self, image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, ids: torch.Tensor) -> None:
        """Takes both embeddings of a batch, each ``(b, d)``, and the whole number of each distinct caption, ``(b,)``.

        Pictures of one caption have the same id, on every process.
        """
        if not len(image_embeddings) == len(text_embeddings) == len(ids):
            raise ValueError("expected as many pictures as captions and ids")
        self.keep("images", torch.nn.functional.normalize(image_embeddings.double()))
        self.keep("texts", torch.nn.functional.normalize(text_embeddings.double()))
        self.keep("ids", torch.as_tensor(ids))

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"r_at_1", "r_at_5"}``, each ``{"value", "low", "high", "n", "among", "interval_of"}``.

        ``among`` is the number of distinct captions; a score is comparable only at the same one. A caption that is as
        near as the picture's own does not stand before it.
        """
        images, texts, ids = self.rows("images"), self.rows("texts"), self.rows("ids").flatten()
        distinct, own = ids.unique(return_inverse=True)
        pool = torch.empty(len(distinct), texts.shape[1], dtype=texts.dtype, device=texts.device)
        pool[own] = texts
        return {f"r_at_{k}": _retrieved(images, pool, own, k) for k in (1, 5)}


def _retrieved(images: torch.Tensor, pool: torch.Tensor, own: torch.Tensor, k: int) -> dict[str, Any]:
    """The share of pictures ``(n, d)`` whose caption, row ``own`` of ``pool``, is among the k nearest of the pool.

    The variance comes from leaving out each caption in turn with its pictures, which also lets others move up.
    """
    n, captions = len(images), len(pool)
    hits, without = 0, torch.zeros(captions, dtype=torch.float64, device=images.device)
    for start in range(0, n, CHUNK):
        mine = own[start : start + CHUNK]
        cosines = images[start : start + CHUNK] @ pool.T
        before = cosines > cosines.gather(1, mine[:, None])
        rank = before.sum(dim=1, keepdim=True)
        found = ((rank - before.long()) < k).double()
        found.scatter_(1, mine[:, None], 0)
        hits += int((rank < k).sum())
        without += found.sum(dim=0)
    pictures = own.bincount(minlength=captions)
    if captions == 1:
        return {**share_interval(hits / n, 0.0, 1), "n": n, "among": captions}
    one = without / (n - pictures)
    variance = (captions - 1) / captions * float((one - one.mean()).square().sum())
    share = hits / n
    if share in (0.0, 1.0):
        variance = 0.0
    return {**share_interval(share, variance, captions), "n": n, "among": captions}
