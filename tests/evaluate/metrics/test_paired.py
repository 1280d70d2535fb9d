"""Likeness to the teacher's images against formulas and scipy."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from compress.errors import UserError
from compress.evaluate.metrics import LPIPS, PSNR, SSIM, LatentPSNR, MultiScaleSSIM
from compress.evaluate.metrics.paired import PSNR_CAP, SCALES


def images(n: int = 5, side: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noisy(teacher: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    return (teacher + strength * noise).clamp(0, 255).round().to(torch.uint8)


def computed(metric, *arguments):
    metric.update(*arguments)
    return metric.compute()


def test_psnr():
    teacher = images()
    student = teacher.clone()
    student[1] = (teacher[1].int() + 10).clamp(max=255).to(torch.uint8)
    student[2] = 255 - teacher[2]
    student[3, 0, 8, 8] ^= 128
    found = computed(PSNR(), student, teacher)
    errors = (student.double() - teacher.double()).square().mean(dim=(1, 2, 3))
    expected = [PSNR_CAP if e == 0 else float(10 * torch.log10(255**2 / e)) for e in errors]
    assert found["value"] == pytest.approx(sum(expected) / 5)
    assert (found["equal"], found["cap"], found["n"]) == (2, PSNR_CAP, 5)
    assert found["low"] < found["value"] < found["high"]


def by_scipy(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast and structure part of two images of one channel, as published: no border counts."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    mean_a, mean_b = mean(a), mean(b)
    both = mean(a * b) - mean_a * mean_b
    spread = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    contrast = (2 * both + (0.03 * 255) ** 2) / (spread + (0.03 * 255) ** 2)
    light = (2 * mean_a * mean_b + (0.01 * 255) ** 2) / (mean_a**2 + mean_b**2 + (0.01 * 255) ** 2)
    return float((light * contrast).mean()), float(contrast.mean())


def similarities(student: torch.Tensor, teacher: torch.Tensor) -> np.ndarray:
    """:func:`by_scipy` of each image, the mean over its channels: ``(n, 2)``."""
    pairs = zip(student.double().flatten(0, 1).numpy(), teacher.double().flatten(0, 1).numpy(), strict=True)
    return np.array([by_scipy(a, b) for a, b in pairs]).reshape(len(student), 3, 2).mean(axis=1)


@pytest.mark.parametrize("side", [11, 24, 50])
def test_ssim_agrees_with_scipy(side):
    teacher = images(3, side)[..., :19, :]
    student = noisy(teacher, 30)
    expected = similarities(student, teacher)[:, 0].mean()
    assert computed(SSIM(), student, teacher)["value"] == pytest.approx(expected, rel=1e-5)
    assert computed(SSIM(), teacher, teacher)["value"] == pytest.approx(1)
    with pytest.raises(UserError, match="SSIM needs images with sides of at least 11 px, not 10x10"):
        SSIM().update(images(side=10), images(side=10))


@pytest.mark.parametrize(("side", "scales"), [(11, 1), (21, 1), (22, 2), (64, 3), (99, 4), (176, 5)])
def test_multiscale_ssim_agrees_with_scipy(side, scales):
    teacher, student = images(2, side), noisy(images(2, side), 60)
    expected, a, b = np.ones(2), student.double(), teacher.double()
    for scale in range(scales):
        part = similarities(a, b)[:, 0 if scale == scales - 1 else 1]
        expected *= part ** (SCALES[scale] / sum(SCALES[:scales]))
        a, b = (torch.nn.functional.avg_pool2d(rows, 2) for rows in (a, b))
    found = computed(MultiScaleSSIM(), student, teacher)
    assert found["scales"] == scales
    assert found["value"] == pytest.approx(expected.mean(), rel=1e-4)
    assert 0 < found["value"] < 1


def test_multiscale_ssim_uses_the_scales_that_all_images_have():
    one, other = images(1, 64), images(1, 30)
    both = MultiScaleSSIM()
    both.update([noisy(one, 60)[0], noisy(other, 60)[0]], [one[0], other[0]])
    found = both.compute()
    assert (found["scales"], found["n"]) == (2, 2)
    alone = computed(MultiScaleSSIM(), noisy(other, 60), other)["value"]
    crop = one[..., :30, :30]
    assert alone < found["value"] * 2  # a mean of two, of which this is one
    assert found["value"] != pytest.approx(alone)
    assert computed(MultiScaleSSIM(), crop, crop)["value"] == pytest.approx(1)
    with pytest.raises(UserError, match="MS-SSIM needs images with sides of at least 11 px, not 10x10"):
        MultiScaleSSIM().update(images(side=10), images(side=10))


@pytest.mark.parametrize("metric", [PSNR, SSIM, MultiScaleSSIM])
def test_order_and_batches_change_nothing_and_noise_lowers(metric):
    teacher = images(7)
    student = torch.cat([noisy(teacher[i : i + 1], 5 * (i + 1)) for i in range(7)])
    whole = computed(metric(), student, teacher)
    parts, order = metric(), [3, 1, 0, 6, 2, 5, 4]
    parts.update(student[order[:3]], teacher[order[:3]])
    parts.update([*student[order[3:]]], [*teacher[order[3:]]])
    found = parts.compute()
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(whole[key], rel=1e-5)
    values = [computed(metric(), noisy(teacher, strength), teacher)["value"] for strength in (2, 10, 40, 120)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_psnr_of_latents():
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    student = teacher + 0.1 * noise
    found = computed(LatentPSNR(), student, teacher)
    expected = [
        10 * torch.log10((t.max() - t.min()) ** 2 / (s - t).square().mean())
        for s, t in zip(student.double(), teacher.double(), strict=True)
    ]
    assert found["value"] == pytest.approx(float(sum(expected) / 3))
    assert computed(LatentPSNR(), 7 * student, 7 * teacher)["value"] == pytest.approx(found["value"], rel=1e-5)
    assert computed(LatentPSNR(), teacher, teacher)["equal"] == 3
    with pytest.raises(ValueError, match="constant"):
        LatentPSNR().update(teacher, torch.ones(3, 4, 8, 8))
    with pytest.raises(ValueError, match="the teacher's"):
        LatentPSNR().update(teacher[:2], teacher)
    with pytest.raises(FloatingPointError, match="NaN"):
        LatentPSNR().update(teacher * torch.nan, teacher)


def test_lpips_takes_any_network(monkeypatch):
    seen = []

    def network(a, b):
        seen.append((float(a.min()), float(a.max())))
        return (a - b).abs().mean(dim=(1, 2, 3))

    teacher, student = images(), noisy(images(), 30)
    found = computed(LPIPS(network), student, teacher)
    expected = (student.double() - teacher.double()).abs().mean() / 127.5
    assert found["value"] == pytest.approx(float(expected), rel=1e-5)
    assert seen[0] == (-1, 1)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"LPIPS needs torchvision.*compress\[lpips\]"):
        LPIPS()


@pytest.mark.parametrize("metric", [PSNR, SSIM, MultiScaleSSIM])
def test_what_does_not_pair_is_refused(metric):
    with pytest.raises(ValueError, match="5 images and 4 of the teacher's"):
        metric().update(images(5), images(4))
    with pytest.raises(ValueError, match="the teacher's"):
        metric().update(images(side=24), images(side=25))
    with pytest.raises(ValueError, match="uint8"):
        metric().update(images().float(), images().float())
