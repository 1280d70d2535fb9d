"""How much a nuclear norm falls when rows are left out, for all rows at once, from one decomposition.

``P = U diag(sigma) V^T`` is a product ``A B^T`` of matrices whose columns have mean 0. Leaving a row out of A and
centering again projects the direction ``u = (e_i - 1/n) / sqrt(1 - 1/n)`` out of the rows of P. Leaving it out of both
A and B does the same to the columns. The nuclear norm is ``tr sqrt(P P^T)``, with
``sqrt(x) = 1/(2 pi) int log(1 + x/s) s^(-1/2) ds``. The determinant of a principal minor is that of a block of the
inverse, so the norm falls by ``1/(2 pi) int -log(rho(s)) s^(-1/2) ds``, where ``rho`` is a determinant of quadratic
forms in ``u`` of diagonal matrices. The integrand is analytic in ``log s``: equally spaced nodes give nine digits or
more.
"""

import math

import torch

STEP = 0.8  # in log s; the error falls with exp(-2 pi^2 / step)
NODES = torch.arange(-57.6, 21.0, STEP, dtype=torch.float64)  # log(s / largest sigma^2)
IN_SPAN = 1e-9  # squared length outside the span of U up to which it counts as rounding


def directions(left: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The orthonormal directions that are projected out when rows are left out, in coordinates of U.

    Args:
        left: U, ``(n, r)``.
        rows: Indices of rows left out together, ``(p, 1)`` or ``(p, 2)``.

    Returns:
        ``(p, 1, r)`` or ``(p, 2, r)``.
    """
    n, chosen = len(left), left[rows]
    if rows.shape[1] == 1:
        return chosen / (1 - 1 / n) ** 0.5
    one, other = chosen.unbind(dim=1)
    return torch.stack([(one - other) / 2**0.5, (one + other) / (2 * (1 - 2 / n)) ** 0.5], dim=1)


def falls(sigma: torch.Tensor, left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """By how much the nuclear norm falls without some directions.

    Args:
        sigma: Singular values above 0, ``(r,)``.
        left: Directions projected out of the rows of P, from :func:`directions`: ``(p, k, r)``, k 1 or 2.
        right: Directions projected out of its columns, same shape; None for none.

    Returns:
        ``(p,)``.
    """
    scale = sigma.max()
    sigma, s = sigma / scale, NODES.exp().to(sigma.device)
    inner = s / (sigma.square()[:, None] + s)
    block = _outside(left) + _forms(left, left, inner)
    slope = (left * sigma).square().sum(dim=(1, 2))  # -log(rho) nears slope / s
    if right is None:
        rho = _determinant(block)
    else:
        other = _outside(right) + _forms(right, right, inner)
        cross = _forms(left, right, s.sqrt() * sigma[:, None] / (sigma.square()[:, None] + s))
        slope = slope + (right * sigma).square().sum(dim=(1, 2))
        slope = slope - ((left * sigma) @ right.transpose(1, 2)).square().sum(dim=(1, 2))
        above = torch.cat([block, -cross], dim=-1)
        rho = _determinant(torch.cat([above, torch.cat([cross.transpose(-1, -2), other], dim=-1)], dim=-2))
    # log(1 + slope/s) has the same tail and the integral sqrt(slope); the rest of the integrand falls with s^-2.
    rest = -rho.clamp(min=torch.finfo(torch.float64).tiny).log() - (slope[:, None] / s).log1p()
    return scale * (slope.sqrt() + rest @ s.sqrt() * STEP / (2 * math.pi))


def _forms(a: torch.Tensor, b: torch.Tensor, diagonals: torch.Tensor) -> torch.Tensor:
    """``a diag(d) b^T`` for every column d of ``diagonals`` ``(r, q)``: ``(p, q, k, k)``."""
    products = a[:, :, None] * b[:, None]
    return (products @ diagonals).permute(0, 3, 1, 2)


def _outside(a: torch.Tensor) -> torch.Tensor:
    """``1 - a a^T``, the part outside the span of U, with rounding set to 0: ``(p, 1, k, k)``."""
    found = torch.eye(a.shape[1], dtype=a.dtype, device=a.device) - a @ a.transpose(1, 2)
    return torch.where(found.abs() < IN_SPAN, 0, found)[:, None]


def _determinant(matrices: torch.Tensor) -> torch.Tensor:
    """Determinants of matrices ``(..., k, k)``."""
    if matrices.shape[-1] == 1:
        return matrices[..., 0, 0]
    if matrices.shape[-1] == 2:
        return matrices[..., 0, 0] * matrices[..., 1, 1] - matrices[..., 0, 1] * matrices[..., 1, 0]
    return torch.linalg.det(matrices)
