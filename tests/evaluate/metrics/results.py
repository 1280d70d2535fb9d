"""What every metric gives for the same rows on one process or two, split unevenly."""

import pytest
import torch

from compress.evaluate.metrics import (
    PSNR,
    SSIM,
    CLIPScore,
    FrechetDistance,
    KernelDistance,
    LatentPSNR,
    MaximumMeanDiscrepancy,
    MeanScore,
    MultiScaleSSIM,
    PrecisionRecall,
    Retrieval,
)
from tests.evaluate.metrics.draws import draw


def results(rank: int, world: int, batch: int, order: torch.Tensor, few: int) -> dict:
    """All metrics' results, with the rows before ``few`` on the first process and the others on the last."""
    fake, real = draw(40, 6, 1, 0.2), draw(50, 6, 2)
    images = (draw(40, 3 * 12 * 12, 3) * 200).clamp(0, 255).to(torch.uint8).view(40, 3, 12, 12)
    teacher = (images.int() + 9 * torch.arange(40).view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)
    mine = order if world == 1 else order[:few] if rank == 0 else order[few:]
    found = {}
    for name, metric, rows in (
        ("fid", FrechetDistance(), real),
        ("paired", FrechetDistance(paired=True), None),
        ("kid", KernelDistance(), real),
        ("cmmd", MaximumMeanDiscrepancy(), real),
        ("pr", PrecisionRecall(), real),
    ):
        for chunk in mine.split(batch):
            metric.update(fake[chunk], real=False)
            if rows is None:
                metric.update(real[chunk], real=True)
        if rows is not None and rank == 0:
            metric.update(rows, real=True)
        found[name] = metric.compute()
    pairs = {
        "psnr": (PSNR(), images, teacher),
        "ssim": (SSIM(), images, teacher),
        "ms_ssim": (MultiScaleSSIM(), images, teacher),
        "latents": (LatentPSNR(), fake.view(40, 1, 2, 3) + 1, real[:40].view(40, 1, 2, 3)),
        "clip": (CLIPScore(), fake, real[:40]),
        "mean": (MeanScore(), fake[:, 0]),
        "retrieval": (Retrieval(), fake, real[torch.arange(40) // 2], torch.arange(40) // 2),
    }
    for name, (metric, *values) in pairs.items():
        for chunk in mine.split(batch):
            metric.update(*(value[chunk] for value in values))
        found[name] = metric.compute()
    return found


def flat(found: dict, path: str = "") -> dict:
    """Nested results as one level."""
    items = {}
    for key, value in found.items():
        items |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return items


def same(found: dict, alone: dict) -> None:
    """Fails where flat results differ by more than rounding."""
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        assert found[key] == (
            value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-9)
        ), key
