"""Quality of a row's images: similarity to the reference row's, and alignment with their captions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.evaluate.metrics import PSNR, SSIM, CLIPScore, MeanScore

if TYPE_CHECKING:
    import torch

    from compress.evaluate.networks.clip import Clip


class Quality:
    """Compares each row's images with the reference row's of the same prompts and noise.

    Args:
        reference: The reference row's images, uint8, ``(n, 3, height, width)``.
        captions: Their n prompts.
        clip: The network of the CLIP score; None for no CLIP score.
        resamples: Bootstrap resamples of the intervals.
    """

    def __init__(
        self, reference: "torch.Tensor", captions: Sequence[str], clip: "Clip | None", resamples: int = 1000
    ) -> None:
        self.reference, self.clip, self.resamples = reference, clip, resamples
        self.text = None if clip is None else clip.text(captions)
        self.scores = self._scores(reference)

    def __call__(self, images: "torch.Tensor") -> dict[str, dict[str, Any] | None]:
        """``psnr``, ``ssim``, ``clip_score`` and ``clip_difference`` (to the reference row, image by image).

        Args:
            images: uint8, ``(n, 3, height, width)``.

        Returns:
            Each with ``value``, ``low`` and ``high`` (95 % interval over prompts and noise) and ``n``; None for the
            reference row's comparison with itself, or without a network.
        """
        found: dict[str, dict[str, Any] | None] = dict.fromkeys(("psnr", "ssim", "clip_score", "clip_difference"))
        if images is not self.reference:
            for name, metric in (("psnr", PSNR(self.resamples)), ("ssim", SSIM(self.resamples))):
                metric.update(images, self.reference)
                found[name] = metric.compute()
        if self.clip is None or self.text is None or self.scores is None:
            return found
        seen = {"network": self.clip.name, "network_sha256": self.clip.sha256}
        score = CLIPScore(self.resamples)
        embeddings = self.clip(images)
        score.update(embeddings, self.text)
        found["clip_score"] = {**score.compute(), **seen}
        if images is not self.reference:
            difference = MeanScore(self.resamples)
            difference.update(_values(embeddings, self.text) - self.scores)
            found["clip_difference"] = {**difference.compute(), **seen}
        return found

    def _scores(self, images: "torch.Tensor") -> "torch.Tensor | None":
        if self.clip is None or self.text is None:
            return None
        return _values(self.clip(images), self.text)


def _values(images: "torch.Tensor", texts: "torch.Tensor") -> "torch.Tensor":
    """100 max(cos, 0) of each pair of embeddings."""
    from torch.nn.functional import cosine_similarity

    return 100 * cosine_similarity(images.double(), texts.double()).clamp(min=0)
