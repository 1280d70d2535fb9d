"""Recall of a reference by the balls around images, and how much it varies over fresh draws of the images.

A image moves its neighbors' balls as well as its own, so recall is no share of independent draws. The jackknife
counts what several images do together more than once. How much too large that makes it shows on smaller sets: two
halves of the images that share none are two draws of their own, and half of their squared difference is an unbiased
estimate of the variance at half the number; the jackknife of the halves over that is its surplus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024  # rows of a distance matrix at once
MOST = 4096  # images from which the halves come, and of the reference that theirs is the recall of
SPLITS = 64  # into halves
QUARTERS = 32  # that are left out, one after another
UNSURE = 32  # of n images n / (n + UNSURE) of the surplus is taken off, in logarithms: few show it unsurely
LEAP = 5.0  # how many times as much as the jackknife says recall may vary where a quarter is left out
WORTH = 8  # recall may vary this many times as much as a share of independent images, or as that of so many alone
GAP = 2.5  # how many times as far as its nearest neighbor the 3k-th of a image in a small mode is at least
SMALL = 8.0  # standard deviations by which recall may depend on whether the balls in small modes reach for the next
WHY = (
    "recall leaps where some images are left out, so that this one draw does not tell how much it varies: "
    "take more images"
)


@dataclass(frozen=True)
class Balls:
    """The balls around n images that reach to their k-th neighbors.

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
        """From the k + 1 nearest."""
        return cls(distances[:, -2], distances[:, -1], indices[:, :-1])


@dataclass(frozen=True)
class Recall:
    """Recall by n images.

    Attributes:
        value: The share of the reference inside a ball.
        one: Without each image, ``(n,)``.
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
        variance: Of recall by as many images.
        why: Why no interval can be had; empty where it can.
    """

    variance: float
    why: str = ""


def nearest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest other rows, ascending, and which they are: both ``(n, k)``."""
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

    No variance can be had where few images in a mode have to reach for the next mode's as soon as one or two are
    missing: recall leaps then, or has leapt. Leaving out one image does not show it, but leaving out a quarter may,
    and so does recall with all balls in modes of at most 3k images as they are before a leap and after it.

    Args:
        whole: From :func:`recall` of the same.
        fake: Features ``(n, d)``; under 4 (k + 1) of them the jackknife is taken as it is.
        real: Features ``(m, d)``.
        k: See :class:`Balls`.
        generator: Chooses the halves.
    """
    if len(fake) < 4 * (k + 1):
        return Spread(whole.jackknife)
    n = min(len(fake), MOST) // 2 * 2
    some = fake[torch.randperm(len(fake), generator=generator)[:n].to(fake.device)]
    if len(real) > MOST:
        real = real[(real - real.mean(dim=0)).square().sum(dim=1).argsort(stable=True)]  # in whatever order they came
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
    """How much more of the reference is inside if the balls of small modes reach for the next mode's than if not.

    Args:
        apart: Distances of n images to each other, ``(n, n)``, infinite to themselves.
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
    """The variance of a share of n independent images, above 0 for shares of 0 and 1 too."""
    share = (n * share + 0.5) / (n + 1)
    return share * (1 - share) / n


def _most(share: float, n: int) -> float:
    """The largest variance that recall by n images may have."""
    return max(WORTH, n / WORTH) * _independent(share, n)


def _recalls(fake: Tensor, real: Tensor, sets: Sequence[tuple[Tensor, Balls]]) -> list[Recall]:
    """Recall by some of the images at a time, given which and their balls.

    Without image i its ball is gone, and the balls of those that had it among their k nearest reach to the next.
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
