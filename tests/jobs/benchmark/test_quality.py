"""Likeness to the reference row and scores, against what can be worked out by hand."""

import pytest
import torch

from compress.jobs.benchmark.quality import Quality


class ByColor:
    """A network whose embeddings are the images' mean colors, and those of captions red."""

    name, sha256 = "by-color", "0" * 64

    def __call__(self, images):
        return images.float().mean(dim=(2, 3))

    def text(self, captions):
        return torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(captions), 1)


def images(red: int, green: int) -> torch.Tensor:
    """Four images of nearly one color."""
    noise = torch.randint(0, 4, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return (noise + torch.tensor([red, green, 0])[None, :, None, None]).to(torch.uint8)


def test_likeness_and_scores():
    reference, other = images(200, 0), images(100, 100)
    quality = Quality(reference, ["red"] * 4, ByColor(), resamples=50)
    own = quality(reference)
    assert own["psnr"] is own["ssim"] is own["clip_difference"] is None
    assert own["clip_score"]["value"] > 99
    found = quality(other)
    mse = (2 * 100**2) / 3
    assert found["psnr"]["value"] == pytest.approx(10 * torch.tensor(255**2 / mse).log10().item(), rel=1e-6)
    assert found["ssim"]["value"] < 0.9
    assert found["clip_score"]["value"] == pytest.approx(100 * 0.5**0.5, abs=1)
    difference = found["clip_difference"]
    assert difference["value"] == pytest.approx(found["clip_score"]["value"] - own["clip_score"]["value"], abs=1e-9)
    assert difference["low"] <= difference["value"] <= difference["high"] < 0
    assert difference["n"] == 4
    assert found["clip_score"]["network"] == "by-color"


def test_a_copy_of_the_reference_is_equal_and_differs_by_nothing():
    reference = images(200, 0)
    found = Quality(reference, ["red"] * 4, ByColor(), resamples=50)(reference.clone())
    assert (found["psnr"]["value"], found["psnr"]["equal"]) == (100.0, 4)
    assert found["clip_difference"]["value"] == found["clip_difference"]["low"] == 0.0


def test_without_a_network_there_is_likeness_alone():
    found = Quality(images(200, 0), ["red"] * 4, None, resamples=50)(images(100, 0))
    assert found["clip_score"] is found["clip_difference"] is None
    assert found["psnr"]["value"] > 0
