"""Alignment of pictures with their captions, and scores that a model gives to each picture."""

from typing import Any

import torch

from compress.evaluate.intervals import mean_interval
from compress.evaluate.metrics.rows import RowMetric


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
    """Share of the pictures whose own caption is among the k nearest of all distinct captions (R@1 and R@5).

    Args:
        resamples: Of the bootstrap behind the interval.
        seed: Of the resampling.
    """

    higher_is_better = True

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__("images", "texts", "ids", **kwargs)
        self.resamples, self.seed = resamples, seed

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
        """``{"r_at_1": {...}, "r_at_5": {...}}``, each ``{"value", "low", "high", "n", "among", "interval_of"}``."""
        images, texts, ids = self.rows("images"), self.rows("texts"), self.rows("ids").flatten()
        distinct, own = ids.unique(return_inverse=True)
        pool = torch.zeros(len(distinct), texts.shape[1], dtype=torch.float64).index_copy(0, own, texts)
        cosines = images @ pool.T
        rank = (cosines > cosines.gather(1, own[:, None])).sum(dim=1)
        return {
            f"r_at_{k}": {
                **mean_interval((rank < k).double(), self.resamples, self.seed),
                "among": len(distinct),
            }
            for k in (1, 5)
        }
