"""Similarity of each image to the teacher's image of the same prompt and noise."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from compress.errors import UserError
from compress.evaluate.intervals import mean_interval
from compress.evaluate.metrics.rows import RowMetric

PSNR_CAP = 100.0  # dB of an image that equals the teacher's
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest first
WINDOW = 11  # px of SSIM's Gaussian; only positions with the whole window inside the image count

Images: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


class PSNR(RowMetric):
    """Peak signal-to-noise ratio in dB, the mean over images.

    An image equal to the teacher's has an infinite ratio and counts as :data:`PSNR_CAP`.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = True
    names = ("errors",)

    def update(self, images: Images, teacher: Images) -> None:
        """Adds uint8 images, ``(b, 3, height, width)`` or b of ``(3, height, width)``, and the teacher's.

        Raises:
            ValueError: They differ in number or size.
        """
        for ours, theirs in _batches(images, teacher):
            difference = ours.to(self.device, torch.float64) - theirs.to(self.device, torch.float64)
            self.keep("errors", difference.square().flatten(1).mean(dim=1) / 255**2)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "equal", "cap", "interval_of"}``; ``equal`` counts equal images."""
        return _ratio(self.rows("errors").flatten(), self.resamples, self.seed)


class LatentPSNR(PSNR):
    """PSNR of latents in dB, where the peak is the range (largest minus smallest number) of the teacher's latent.

    After one denoising step from the same noise it is a cheap estimate of how much the images differ.
    """

    def update(self, latents: torch.Tensor, teacher: torch.Tensor) -> None:
        """Adds float latents ``(b, channels, height, width)`` and the teacher's.

        Raises:
            ValueError: They differ in shape, or a latent of the teacher is constant.
        """
        if latents.shape != teacher.shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, the teacher's {tuple(teacher.shape)}")
        ours, theirs = (rows.to(self.device, torch.float64).flatten(1) for rows in (latents, teacher))
        peak = theirs.amax(dim=1) - theirs.amin(dim=1)
        if (peak == 0).any():
            raise ValueError("a latent of the teacher is constant")
        self.keep("errors", (ours - theirs).square().mean(dim=1) / peak.square())


class SSIM(RowMetric):
    """Structural similarity with a Gaussian window of sigma 1.5 px, the mean over images, in [-1, 1].

    Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = True
    names = ("values",)

    def update(self, images: Images, teacher: Images) -> None:
        """Adds uint8 images, ``(b, 3, height, width)`` or b of ``(3, height, width)``, and the teacher's.

        Raises:
            UserError: A side is under 11 px.
            ValueError: They differ in number or size.
        """
        for ours, theirs in _batches(images, teacher):
            _check_side(ours, "SSIM")
            self.keep("values", _similarity(ours.to(self.device).float(), theirs.to(self.device).float()))

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "interval_of"}``."""
        return mean_interval(self.rows("values").flatten(), self.resamples, self.seed, (-1.0, 1.0))


class MultiScaleSSIM(RowMetric):
    """Multi-scale structural similarity, the mean over images, in [0, 1].

    Wang et al. 2003, https://doi.org/10.1109/ACSSC.2003.1292216, halves an image four times. Images too small for that
    use as many scales as the smallest image allows (a side of at least 11 px at the coarsest), and the weights of the
    finest scales are divided by their sum. Values with different ``scales`` do not compare.

    Args:
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
    """

    higher_is_better = True
    scales: torch.Tensor
    names = ("contrasts", "similarities")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scales", default=torch.tensor(len(SCALES)), dist_reduce_fx="min")

    def update(self, images: Images, teacher: Images) -> None:
        """Adds uint8 images, ``(b, 3, height, width)`` or b of ``(3, height, width)``, and the teacher's.

        Raises:
            UserError: A side is under 11 px.
            ValueError: They differ in number or size.
        """
        for ours, theirs in _batches(images, teacher):
            _check_side(ours, "MS-SSIM")
            side = min(ours.shape[-2:])
            scales = min(len(SCALES), (side // WINDOW).bit_length())
            found = torch.zeros(2, len(SCALES), len(ours), dtype=torch.float64, device=self.device)
            a, b = ours.to(self.device).float(), theirs.to(self.device).float()
            for scale in range(scales):
                found[0, scale], found[1, scale] = _similarity(a, b), _contrast(a, b)
                a, b = torch.nn.functional.avg_pool2d(a, 2), torch.nn.functional.avg_pool2d(b, 2)
            self.keep("similarities", found[0].T)
            self.keep("contrasts", found[1].T)
            self.scales = self.scales.clamp(max=scales)

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "scales", "interval_of"}``."""
        scales = int(self.scales)
        factors = self.rows("contrasts")[:, :scales].clone()
        factors[:, -1] = self.rows("similarities")[:, scales - 1]
        weights = torch.tensor(SCALES[:scales], dtype=torch.float64, device=factors.device)
        values = factors.clamp(min=0).pow(weights / weights.sum()).prod(dim=1)
        return {**mean_interval(values, self.resamples, self.seed, (0.0, 1.0)), "scales": scales}


class LPIPS(RowMetric):
    """Learned perceptual distance, the mean over images, at least 0 and 0 for equal images.

    Zhang et al. 2018, https://arxiv.org/abs/1801.03924.

    Args:
        network: Maps two batches of float images in [-1, 1], ``(b, 3, height, width)``, to distances ``(b,)``; None for
            torchmetrics' AlexNet, whose weights torchvision downloads.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        UserError: torchvision is missing.
    """

    higher_is_better = False
    names = ("values",)

    def __init__(
        self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.network = alexnet() if network is None else network

    @torch.no_grad()
    def update(self, images: Images, teacher: Images) -> None:
        """Adds uint8 images, ``(b, 3, height, width)`` or b of ``(3, height, width)``, and the teacher's.

        Raises:
            ValueError: They differ in number or size.
        """
        for ours, theirs in _batches(images, teacher):
            scaled = (batch.to(self.device).float() / 127.5 - 1 for batch in (ours, theirs))
            self.keep("values", self.network(*scaled).flatten())

    def compute(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n", "interval_of"}``."""
        return mean_interval(self.rows("values").flatten(), self.resamples, self.seed, (0.0, math.inf))


def alexnet() -> torch.nn.Module:
    """LPIPS' AlexNet of torchmetrics, one distance a pair; torchvision downloads its weights.

    Raises:
        UserError: torchvision is missing.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UserError(f"LPIPS needs torchvision ({error}): pip install 'compress[lpips]'") from None
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(net="alex").eval()


def _batches(images: Images, teacher: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both as batches of images of one size."""
    if len(images) != len(teacher):
        raise ValueError(f"there are {len(images)} images and {len(teacher)} of the teacher's")
    if isinstance(images, torch.Tensor) and isinstance(teacher, torch.Tensor):
        pairs = [(images, teacher)]
    else:
        pairs = [(a[None], b[None]) for a, b in zip(images, teacher, strict=True)]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(f"images are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}")
        if ours.dtype != torch.uint8 or theirs.dtype != torch.uint8:
            raise ValueError(f"expected images of uint8, not {ours.dtype} and {theirs.dtype}")
        if len(ours):
            yield ours, theirs


def _check_side(images: torch.Tensor, name: str) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < WINDOW:
        raise UserError(f"{name} needs images with sides of at least {WINDOW} px, not {width}x{height}")


def _similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM of each image, ``(b,)``, without the border, where torchmetrics reflects the window."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    whole = ssim(a, b, data_range=255.0, reduction="none", return_full_image=True)[1]
    border = WINDOW // 2
    return whole[..., border:-border, border:-border].flatten(1).mean(dim=1)


def _contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The contrast and structure part of SSIM of each image, without the border: ``(b,)``."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    return ssim(a, b, data_range=255.0, reduction="none", return_contrast_sensitivity=True)[1]


def _ratio(errors: torch.Tensor, resamples: int, seed: int) -> dict[str, Any]:
    """The mean ratio in dB of squared errors relative to the squared peak."""
    values = (-10 * errors.log10()).clamp(max=PSNR_CAP)
    found = mean_interval(values, resamples, seed, (-math.inf, PSNR_CAP))
    return {**found, "equal": int((errors == 0).sum()), "cap": PSNR_CAP}
