"""The time embedding at Stable Diffusion's size, fitted to a narrower sinusoid in closed form."""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from compress.prune.channels.time_embedding import RIDGES, _fit_second, refit

WIDTH, HIDDEN, NARROW = 320, 1280, 256


def sinusoid(width: int, steps: torch.Tensor) -> torch.Tensor:
    return Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(steps)


def embedding(smooth: bool) -> TimestepEmbedding:
    """With random weights; or as training leaves it: high frequencies count little, and few directions are used."""
    torch.manual_seed(0)
    module = TimestepEmbedding(WIDTH, HIDDEN).requires_grad_(False)
    if smooth:
        frequencies = torch.exp(-torch.arange(WIDTH // 2) / (WIDTH // 2) * 9.2).repeat(2)
        module.linear_1.weight.mul_(3 / (1 + 50 * frequencies))
        left, right = torch.randn(HIDDEN, 32), torch.randn(32, HIDDEN)
        module.linear_2.weight.copy_(left @ right / 32 / HIDDEN**0.5)
    return module


@pytest.mark.parametrize(
    ("smooth", "dtype", "most"),
    [(False, torch.float32, 0.005), (True, torch.float32, 0.002), (True, torch.bfloat16, 0.03)],
)
@torch.no_grad()
def test_stable_diffusion_s_embedding_is_kept(smooth: bool, dtype: torch.dtype, most: float) -> None:
    given = embedding(smooth).to(dtype)
    steps = torch.arange(1000)
    fitted, residual = refit(given, sinusoid(WIDTH, steps), sinusoid(NARROW, steps))
    assert fitted.linear_1.weight.shape == (HIDDEN, NARROW)
    assert {weight.dtype for weight in fitted.parameters()} == {dtype}
    assert residual < most
    between = torch.arange(999) + 0.5  # timesteps that schedulers with other spacings use
    wanted = given(sinusoid(WIDTH, between).to(dtype)).float()
    found = fitted(sinusoid(NARROW, between).to(dtype)).float()
    assert (found - wanted).norm() / wanted.norm() < 1.2 * most


@torch.no_grad()
def test_the_second_layer_follows_by_ridge_regression() -> None:
    torch.manual_seed(0)
    module = TimestepEmbedding(4, 6).double()
    inputs, wanted = torch.randn(5, 4).double(), torch.randn(5, 6).double()
    found = _fit_second(module, inputs, wanted, RIDGES)
    hidden = module.act(module.linear_1(inputs))
    rows = torch.cat([hidden, torch.ones(5, 1).double()], 1)
    top = torch.linalg.matrix_norm(rows, 2) ** 2
    for ridge, one in zip(RIDGES, found, strict=True):
        normal = rows.T @ rows + ridge * top * torch.eye(7).double()
        change = torch.linalg.solve(normal, rows.T @ (wanted - module.linear_2(hidden)))
        torch.testing.assert_close(one.linear_2.weight, module.linear_2.weight + change[:-1].T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.linear_2.bias, module.linear_2.bias + change[-1], rtol=1e-4, atol=1e-6)
