"""Alignment of images with their captions, and the mean of scores per image."""

from typing import Any

import torch

from compress.evaluate.intervals import freedom, mean_interval, share_interval
from compress.evaluate.metrics.rows import RowMetric

CHUNK = 1024  # images at once
NEAR = 1e-6  # cosines that differ by less count as equal: single precision and the batch size cause that much
SURE = 0.5  # of the variance of independent images: known without the estimate


class MeanScore(RowMetric):
    """The mean of a number per image, such as a preference model's score.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = True
    names = ("values",)

    def update(self, values: torch.Tensor) -> None:
        """Adds the numbers of a batch, ``(b,)``."""
        self.keep("values", values)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "interval_of"}``."""
        return mean_interval(self.rows("values").flatten(), self.resamples, self.seed)


class CLIPScore(RowMetric):
    """100 max(cos, 0) of each image's and its caption's embedding.

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with the usual factor 100 instead of their 2.5.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = True
    names = ("cosines",)

    def update(self, image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> None:
        """Adds both embeddings of a batch, each ``(b, d)``, of any length."""
        images, texts = image_embeddings.double(), text_embeddings.double()
        self.keep("cosines", torch.nn.functional.cosine_similarity(images, texts))

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "cosine", "n", "interval_of"}``; ``cosine`` is the mean of the raw cosines."""
        cosines = self.rows("cosines").flatten()
        found = mean_interval(100 * cosines.clamp(min=0), self.resamples, self.seed, (0.0, 100.0))
        return {**found, "cosine": float(cosines.mean())}


class Retrieval(RowMetric):
    """Share of the images whose own caption is among the k nearest of all distinct captions (R@1 and R@5)."""

    higher_is_better = True
    names = ("images", "texts", "ids")

    def update(self, image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, ids: torch.Tensor) -> None:
        """Adds both embeddings of a batch, each ``(b, d)``, and an integer for each distinct caption, ``(b,)``.

        Images of one caption have the same id in every process.
        """
        if not len(image_embeddings) == len(text_embeddings) == len(ids):
            raise ValueError("expected as many images as captions and ids")
        self.keep("images", torch.nn.functional.normalize(image_embeddings.double()))
        self.keep("texts", torch.nn.functional.normalize(text_embeddings.double()))
        self.keep("ids", torch.as_tensor(ids))

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"r_at_1", "r_at_5"}``, each ``{"value", "low", "high", "n", "among", "interval_of"}``.

        ``among`` is the number of distinct captions; compare scores only at the same number. A caption that is as near
        as the image's own (within :data:`NEAR`) does not rank before it.
        """
        images, texts, ids = self.rows("images"), self.rows("texts"), self.rows("ids").flatten()
        distinct, own = ids.unique(return_inverse=True)
        pool = torch.empty(len(distinct), texts.shape[1], dtype=texts.dtype, device=texts.device)
        pool[own] = texts
        return {f"r_at_{k}": _retrieved(images, pool, own, k) for k in (1, 5)}


def _retrieved(images: torch.Tensor, pool: torch.Tensor, own: torch.Tensor, k: int) -> dict[str, Any]:
    """The share of images ``(n, d)`` whose caption, row ``own`` of ``pool``, is among the k nearest of the pool.

    A draw varies in its captions, each with its images: whether they are hits, and which others a caption pushes out.
    The first gives the variance of independent captions. The second is the number of images that would be hits without
    the caption; the part of its square that comes from single captions is chance and is subtracted.
    """
    n, captions = len(images), len(pool)
    order = own.argsort(stable=True)
    images, own = images[order], own[order]
    counts = own.bincount(minlength=captions)
    ends = [0, *counts.cumsum(dim=0).tolist()]
    hits = torch.zeros(captions, dtype=torch.float64, device=images.device)
    pushed, chance = hits.clone(), hits.clone()
    for first in range(0, captions, CHUNK):
        last = min(first + CHUNK, captions)
        mine = own[ends[first] : ends[last]]
        cosines = images[ends[first] : ends[last]] @ pool.T
        before = cosines > cosines.gather(1, mine[:, None]) + NEAR
        rank = before.sum(dim=1)
        hits.index_add_(0, mine, (rank < k).double())
        out = (before & (rank == k)[:, None]).double()  # without any of these it would be a hit
        of_caption = out.new_zeros(last - first, captions).index_add_(0, mine - first, out)
        pushed += of_caption.sum(dim=0)
        chance += of_caption.square().sum(dim=0)
    share = float(hits.sum()) / n
    more = {"n": n, "among": captions}
    if captions == 1 or share in (0.0, 1.0):
        return {**share_interval(share, 0.0, captions), **more}
    own_part = hits - share * counts
    whole = own_part - (pushed - pushed.mean())
    independent = float(own_part.square().sum())
    variance = max(float(whole.square().sum() - chance.sum()), independent) * captions / (captions - 1) / n**2
    sure = SURE * share * (1 - share) / n
    return {**share_interval(share, variance, captions, freedom(whole), sure), **more}
