"""Fits a time embedding to a sinusoid of another width.

The sinusoid that embeds a UNet's timestep has as many channels as the first level. Pruning this level changes all
frequencies, so channels cannot be selected: the layers after the sinusoid are fitted instead.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.system.progress import bar

TIMESTEPS = 1000
EXACT = 1e-6  # relative error below which least squares on the first layer is sufficient
# Singular values below this share of the largest would make the first layer's weights large, and half precision and
# int8 cannot add up large weights that cancel each other: on the embedded model, 64 to 48 channels, 1e-5 leaves an
# error of 2.1 % in float32 and 10.7 % in bfloat16, 1e-2 one of 2.3 % in both.
CUTOFF = 1e-2
RIDGES = (1e-6, 1e-7, 1e-8, 1e-10)  # shares of the largest eigenvalue; the best one depends on the weights' precision
ITERATIONS = 600  # maximum of L-BFGS
MOST_PASSES = ITERATIONS * 5 // 4  # including line searches; the default of max_eval


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt()


@torch.no_grad()
def _fit_first(fitted: nn.Module, sinusoid: Tensor, hidden: Tensor, cutoff: float) -> None:
    """Least squares for ``linear_1``; singular values below ``cutoff`` of the largest count as 0."""
    inputs = torch.cat([sinusoid, torch.ones_like(sinusoid[:, :1])], dim=1)
    solution = torch.linalg.lstsq(inputs, hidden, rcond=cutoff, driver="gelsd").solution
    fitted.linear_1.weight.copy_(solution[:-1].T)
    fitted.linear_1.bias.copy_(solution[-1])


@torch.no_grad()
def _fit_second(fitted: nn.Module, sinusoid: Tensor, wanted: Tensor, ridges: Sequence[float]) -> list[nn.Module]:
    """For each ridge, correct the remaining error by the smallest change of ``linear_2`` (ridge regression)."""
    hidden = fitted.act(fitted.linear_1(sinusoid))
    inputs = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    values, vectors = torch.linalg.eigh(inputs @ inputs.T)  # one row per timestep: fewer than hidden units
    left = vectors.T @ (wanted - fitted.linear_2(hidden))
    found = []
    for ridge in ridges:
        change = inputs.T @ (vectors @ (left / (values + ridge * values[-1])[:, None]))
        candidate = copy.deepcopy(fitted)
        candidate.linear_2.weight.add_(change[:-1].T)
        candidate.linear_2.bias.add_(change[-1])
        found.append(candidate)
    return found


def _fit_both(fitted: nn.Module, sinusoid: Tensor, wanted: Tensor) -> None:
    """Full-batch L-BFGS on all weights: the problem is smooth, small and deterministic."""
    scale = wanted.square().mean()
    optimizer = torch.optim.LBFGS(
        fitted.parameters(), max_iter=ITERATIONS, max_eval=MOST_PASSES, history_size=20, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        progress.advance(task)
        optimizer.zero_grad()
        value = (fitted(sinusoid) - wanted).square().mean() / scale
        value.backward()
        return value

    with torch.enable_grad(), bar() as progress:
        task = progress.add_task("fitting the time embedding", total=MOST_PASSES)
        optimizer.step(loss)
        progress.update(task, completed=MOST_PASSES)


def sinusoids(old: nn.Module, new: nn.Module) -> tuple[Tensor, Tensor]:
    """What the time embeddings of two UNets get, for every timestep, each of shape ``(timesteps, width)``.

    Raises:
        UserError: One is not finite, as of two channels with ``freq_shift=1``.
    """
    steps = torch.arange(TIMESTEPS)
    found = old.time_proj(steps), new.time_proj(steps)
    for sinusoid in found:
        if not sinusoid.isfinite().all():
            raise UserError(f"the time embedding of a level with {sinusoid.shape[1]} channels is NaN: keep it wider")
    return found


def refit(embedding: nn.Module, old: Tensor, new: Tensor) -> tuple[nn.Module, float]:
    """Fit both layers of a diffusers ``TimestepEmbedding`` so that its outputs for ``new`` equal those for ``old``.

    The first layer is solved by least squares. If this is not exact and there are at least as many hidden units as
    timesteps (Stable Diffusion has 1280), the second layer is solved too, with the first one rounded to the embedding's
    precision. With fewer hidden units, both layers are optimized by L-BFGS, which takes a few seconds.

    Args:
        embedding: With layers ``linear_1`` and ``linear_2``; stays unchanged.
        old: Sinusoids, shape ``(timesteps, old width)``.
        new: Sinusoids of the same timesteps, shape ``(timesteps, new width)``.

    Returns:
        The new module in the dtype and on the device of the old one, and its relative error: root mean square error
        over the root mean square of the old embedding.
    """
    weight = embedding.linear_1.weight
    fitted = copy.deepcopy(embedding).cpu().double().requires_grad_(False)
    old64, new64 = old.cpu().double(), new.cpu().double()
    hidden, wanted = fitted.linear_1(old64), fitted(old64)
    fitted.linear_1 = nn.utils.skip_init(nn.Linear, new.shape[1], weight.shape[0], dtype=torch.float64)
    _fit_first(fitted, new64, hidden, cutoff=1e-12)
    candidates = [fitted]
    if _error(fitted(new64), wanted) > EXACT:
        _fit_first(fitted, new64, hidden, CUTOFF)
        if weight.shape[0] >= len(old):
            fitted.linear_1.to(weight.dtype).double()
            candidates = _fit_second(fitted, new64, wanted, RIDGES)
        else:
            fitted = fitted.float().to(weight.device).requires_grad_(True)
            _fit_both(fitted, new64.float().to(weight.device), wanted.float().to(weight.device))
            candidates = [fitted]
    rounded = [candidate.to(weight.device, weight.dtype) for candidate in candidates]
    with torch.no_grad():
        inputs = new.to(weight.device, weight.dtype)
        residuals = [float(_error(candidate(inputs).cpu().double(), wanted)) for candidate in rounded]
    best = min(range(len(rounded)), key=residuals.__getitem__)
    return rounded[best], residuals[best]
