"""Recall of a reference by the balls around images, and its variance over fresh draws of the images.

An image changes its neighbors' balls too, so recall is not a share of independent draws, and the jackknife counts the
joint effect of several images more than once. Halves measure this surplus: two disjoint halves are two draws, and half
of their squared difference is an unbiased estimate of the variance at half the number. The jackknife of the halves
divided by that estimate is the surplus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024  # rows of a distance matrix at once
MOST = 4096  # images, and reference images, used for the halves
SPLITS = 64  # splits into halves
QUARTERS = 32  # quarters left out, one at a time
UNSURE = 32  # n / (n + UNSURE) of the surplus is removed, in logarithms: few images measure it badly
LEAP = 5.0  # largest variance without a quarter, as a multiple of the jackknife's
WORTH = 8  # largest variance, as a multiple of that of independent images, or that of so few images
GAP = 2.5  # smallest ratio of the distances to the 3k-th and the nearest neighbor in a small mode
SMALL = 8.0  # standard deviations that balls of small modes may contribute by reaching the next mode
WHY = "recall jumps when some images are left out, so this one draw does not show how much it varies: use more images"


@dataclass(frozen=True)
class Balls:
    """The balls around n images, each up to the k-th neighbor.

    Attributes:
        reach: Radii, ``(n,)``.
        further: Distances to the next neighbor, ``(n,)``.
        nearest: The k neighbors, ``(n, k)``.
    """

    reach: Tensor
    further: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, distances: Tensor, indices: Tensor) -> "Balls":
        """From distances and indices of the k + 1 nearest, ``(n, k + 1)``."""
        return cls(distances[:, -2], distances[:, -1], indices[:, :-1])


@dataclass(frozen=True)
class Recall:
    """Recall by n images.

    Attributes:
        value: The share of the reference inside a ball.
        one: The same without each image, ``(n,)``.
    """

    value: float
    one: Tensor

    @property
    def jackknife(self) -> float:
        """The variance that leaving out each image gives."""
        n = len(self.one)
        return (n - 1) / n * float((self.one - self.one.mean()).square().sum())


@dataclass(frozen=True)
class Spread:
    """How recall varies over fresh draws.

    Attributes:
        variance: Variance of recall with as many images.
        why: Why there is no interval; empty if there is one.
    """

    variance: float
    why: str = ""


def nearest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest other rows, ascending, and their indices: both ``(n, k)``."""
    distances, indices = [], []
    for start in range(0, len(rows), CHUNK):
        apart = torch.cdist(rows[start : start + CHUNK], rows)
        apart[torch.arange(len(apart)), torch.arange(start, start + len(apart))] = torch.inf
        found = apart.topk(k, dim=1, largest=False)
        distances.append(found.values)
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def recall(fake: Tensor, real: Tensor, k: int) -> Recall:
    """Recall of ``real`` ``(m, d)`` by ``fake`` ``(n, d)``, n at least k + 2."""
    return _recalls(fake, real, [(torch.arange(len(fake), device=fake.device), Balls.of(*nearest(fake, k + 1)))])[0]


def spread(whole: Recall, fake: Tensor, real: Tensor, k: int, generator: torch.Generator) -> Spread:
    """The variance of recall: the jackknife's, less part of its surplus.

    There is no estimate where a mode has so few images that their balls reach the next mode as soon as one or two are
    missing: recall jumps. Leaving out a quarter may show this. So does comparing recall with the balls of modes of at
    most 3k images before and after such a jump.

    Args:
        whole: Result of :func:`recall` for the same features.
        fake: Features ``(n, d)``; for fewer than 4 (k + 1) the jackknife is used as it is.
        real: Features ``(m, d)``.
        k: See :class:`Balls`.
        generator: Chooses the halves.
    """
    if len(fake) < 4 * (k + 1):
        return Spread(whole.jackknife)
    n = min(len(fake), MOST) // 2 * 2
    some = fake[torch.randperm(len(fake), generator=generator)[:n].to(fake.device)]
    if len(real) > MOST:
        real = real[(real - real.mean(dim=0)).square().sum(dim=1).argsort(stable=True)]  # independent of their order
        real = real[torch.randperm(len(real), generator=generator)[:MOST].to(real.device)]
    apart = torch.cdist(some, some)
    apart.fill_diagonal_(torch.inf)
    shuffled = [torch.randperm(n, generator=generator).to(fake.device) for _ in range(SPLITS + QUARTERS)]
    halves = [half for order in shuffled[:SPLITS] for half in order.split(n // 2)]
    sets = [torch.arange(n, device=fake.device), *halves, *(order[n // 4 :] for order in shuffled[SPLITS:])]
    balls = [Balls.of(*apart[part][:, part].topk(k + 1, dim=1, largest=False)) for part in sets]
    every, *parts = _recalls(some, real, list(zip(sets, balls, strict=True)))

    values = torch.tensor([part.value for part in parts], dtype=torch.float64)
    pairs, most = values[: 2 * SPLITS].view(-1, 2), values[2 * SPLITS :]
    of_half = float((pairs[:, 0] - pairs[:, 1]).square().mean() / 2)
    jackknife = sum(part.jackknife for part in parts[: 2 * SPLITS]) / (2 * SPLITS)
    surplus = min(max(jackknife / of_half, 1.0), k + 1.0) if of_half > 0 else 1.0
    variance = whole.jackknife / surplus ** (n / (n + UNSURE))
    leaps = (
        3 * float(most.var()) > LEAP * max(every.jackknife, _independent(every.value, n))
        or of_half > _most(float(pairs.mean()), n // 2)
        or variance > _most(whole.value, len(fake))
        or _by_small_modes(apart, balls[0].reach, some, real, k) > SMALL * _independent(every.value, n) ** 0.5
    )
    return Spread(variance, WHY if leaps else "")


def _by_small_modes(apart: Tensor, reach: Tensor, fake: Tensor, real: Tensor, k: int) -> float:
    """How much recall grows if the balls of small modes reach the next mode.

    Args:
        apart: Distances between n images, ``(n, n)``, infinite on the diagonal.
        reach: Radii of their balls, ``(n,)``.
        fake: Their features ``(n, d)``.
        real: Features ``(m, d)``.
        k: See :class:`Balls`.
    """
    near = apart.topk(min(3 * k, len(apart) - 1), dim=1, largest=False).values
    small = near[:, -1] > GAP * near[:, 0]
    before, after = torch.where(small, near[:, 0], reach), torch.where(small, near[:, -1], reach)
    more = 0
    for chunk in real.split(CHUNK):
        across = torch.cdist(chunk, fake)
        more += int((across <= after).any(dim=1).sum() - (across <= before).any(dim=1).sum())
    return more / len(real)


def _independent(share: float, n: int) -> float:
    """The variance of a share of n independent images; above 0 also for shares of 0 and 1."""
    share = (n * share + 0.5) / (n + 1)
    return share * (1 - share) / n


def _most(share: float, n: int) -> float:
    """The largest accepted variance of recall with n images."""
    return max(WORTH, n / WORTH) * _independent(share, n)


def _recalls(fake: Tensor, real: Tensor, sets: Sequence[tuple[Tensor, Balls]]) -> list[Recall]:
    """Recall for each subset of the images, given as indices and balls.

    Without image i its ball is gone, and the balls of images that had it among their k nearest grow to the next.
    """
    covered = [0] * len(sets)
    without = [torch.zeros(len(part), dtype=torch.float64, device=fake.device) for part, _ in sets]
    for chunk in real.split(CHUNK):
        across = torch.cdist(chunk, fake)
        for number, (part, balls) in enumerate(sets):
            apart = across[:, part]
            inside = apart <= balls.reach
            gained = ((apart <= balls.further) & ~inside).float()
            left = inside.sum(dim=1, keepdim=True) - inside.float()
            for rank in range(balls.nearest.shape[1]):
                left.index_add_(1, balls.nearest[:, rank], gained)
            covered[number] += int(inside.any(dim=1).sum())
            without[number] += (left > 0).sum(dim=0)
    m = len(real)
    return [Recall(count / m, one / m) for count, one in zip(covered, without, strict=True)]
