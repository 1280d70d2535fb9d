"""The metrics against torchmetrics, and their intervals against repeated draws."""

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from compress.evaluate.scores import PSNR_CAP, frechet, kernel_distance, mean_score, psnr_values, ssim_values


class Same(torch.nn.Module):
    """Takes features for pictures, as torchmetrics wants a network."""

    num_features = 48

    def forward(self, x):
        return x


def draw(n, seed, shift=0.0, d=48):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, d)[:, None]
    return (torch.randn(n, d, generator=generator) @ mix.T + shift).relu()


@pytest.mark.parametrize(("real", "fake"), [(100, 30), (30, 100), (40, 40), (200, 150)])
def test_frechet_distance_is_torchmetrics(real, fake):
    metric = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    a, b = draw(real, 1).double(), draw(fake, 2, 0.3).double()
    metric.update(a, real=True)
    metric.update(b, real=False)
    found = frechet(a, b)
    assert found["value"] == pytest.approx(float(metric.compute()), rel=1e-3)
    assert found["low"] < found["value"] < found["high"]


def test_kernel_distance_is_torchmetrics():
    a, b = draw(50, 1), draw(50, 2, 0.3)
    metric = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=50)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    found = kernel_distance(a, b)
    assert found["value"] == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    assert found["low"] < found["value"] < found["high"]
    # Real pictures in several chunks, and unequal numbers: all pairs once.
    a, b = draw(1100, 3), draw(6, 4)
    within_a = sum(float((a[i] @ a.T / 48 + 1).pow(3).sum() - (a[i] @ a[i] / 48 + 1) ** 3) for i in range(1100))
    within_b = sum(float((b[i] @ b[j] / 48 + 1) ** 3) for i in range(6) for j in range(6) if i != j)
    expected = within_a / (1100 * 1099) + within_b / 30 - 2 * float((b @ a.T / 48 + 1).pow(3).mean())
    assert kernel_distance(a, b)["value"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("distance", [frechet, kernel_distance])
def test_intervals_hold_the_value_of_other_draws(distance):
    real = draw(300, 1)
    results = [distance(real, draw(64, seed, 0.2)) for seed in range(100, 160)]
    center = sum(result["value"] for result in results) / len(results)
    covered = sum(result["low"] <= center <= result["high"] for result in results) / len(results)
    assert covered >= 0.85
    spread = torch.tensor([result["value"] for result in results]).std()
    width = sum(result["high"] - result["low"] for result in results) / len(results) / (2 * 1.96)
    assert 0.7 < width / spread < 2.0


def test_mean_and_its_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    found = mean_score(values, 500)
    assert found == mean_score(values, 500)
    assert found["value"] == pytest.approx(float(values.mean()))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 / 20, rel=0.2)


def test_psnr_and_ssim():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    student = teacher.clone()
    student[1] = (teacher[1].int() + 10).clamp(max=255).to(torch.uint8)
    student[2] = 255 - teacher[2]
    student[3, 0, 8, 8] ^= 128
    values, equal = psnr_values(student, teacher)
    assert equal == 2
    assert values[0] == values[4] == PSNR_CAP
    for index in (1, 2, 3):
        error = (student[index].double() - teacher[index].double()).square().mean()
        assert values[index] == pytest.approx(float(10 * torch.log10(255**2 / error)))
    similar = ssim_values(student, teacher, batch_size=2)
    assert similar.shape == (5,)
    assert similar[0] == pytest.approx(1)
    assert 0.9999 > similar[3] > similar[1] > similar[2]
    assert similar[2] < 0.1
