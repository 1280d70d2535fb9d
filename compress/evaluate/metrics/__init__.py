"""The metrics: each a ``torchmetrics.Metric`` whose ``compute`` gives a value with its 95 % interval."""

from compress.evaluate.metrics.frechet import FrechetDistance
from compress.evaluate.metrics.kernel import KernelDistance, MaximumMeanDiscrepancy
from compress.evaluate.metrics.neighbors import PrecisionRecall
from compress.evaluate.metrics.paired import LPIPS, PSNR, SSIM, LatentPSNR, MultiScaleSSIM
from compress.evaluate.metrics.text import CLIPScore, MeanScore, Retrieval

__all__ = [
    "LPIPS",
    "PSNR",
    "SSIM",
    "CLIPScore",
    "FrechetDistance",
    "KernelDistance",
    "LatentPSNR",
    "MaximumMeanDiscrepancy",
    "MeanScore",
    "MultiScaleSSIM",
    "PrecisionRecall",
    "Retrieval",
]
