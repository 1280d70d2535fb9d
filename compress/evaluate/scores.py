"""The metrics' numbers and their intervals.

All intervals are 95 % and speak of the choice of prompts and noise alone: real pictures, networks and the number of
pictures are held fixed. Means (CLIP score, PSNR, SSIM) use the percentile bootstrap. FID and KID use a jackknife over
groups of pictures: resampling with replacement leaves fewer different pictures, which biases FID upwards by more than
the interval is wide, while leaving out groups does not and errs on the wide side.
"""

from collections.abc import Callable

import torch

GROUPS = 32
Z = 1.959964  # of a 95 % interval
PSNR_CAP = 100.0  # dB, what a picture equal to the teacher's counts as


def frechet(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Fréchet distance of two sets of features, with an interval for ``fake``.

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500. With centered features ``A = X / sqrt(n - 1)`` the trace of
    ``sqrt(S1 S2)`` is the sum of the singular values of ``A1 A2^T``: exact, and small for few pictures. Biased
    upwards at small n, so it compares only with values at the same n; the interval is that of the value at this n.

    Args:
        real: ``(m, d)``, m at least 2.
        fake: ``(n, d)``, n at least 4.

    Returns:
        ``{"value", "low", "high"}``.
    """
    real, fake = real.double(), fake.double()
    mean, factor = real.mean(dim=0), _centered(real)
    spread = factor.square().sum()
    if factor.shape[0] > factor.shape[1]:
        factor = torch.linalg.qr(factor).R  # the same covariance in fewer rows
    projected = fake @ factor.T

    def distance(keep: torch.Tensor) -> torch.Tensor:
        chosen = fake[keep]
        crossed = _centered(projected[keep])
        gram = crossed @ crossed.T if crossed.shape[0] <= crossed.shape[1] else crossed.T @ crossed
        nuclear = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        shift = (chosen.mean(dim=0) - mean).square().sum()
        return shift + _centered(chosen).square().sum() + spread - 2 * nuclear

    value = float(distance(torch.ones(len(fake), dtype=torch.bool)))
    groups = _groups(len(fake))
    low, high = _jackknife(value, lambda group: distance(groups != group), int(groups.max()) + 1)
    return {"value": value, "low": max(low, 0.0), "high": high}


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Kernel Inception Distance of two sets of features, with an interval for ``fake``.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401: squared MMD with the kernel ``(x.y / d + 1)^3``, the
    unbiased estimate over all pairs rather than over random subsets. Unbiased at every n, and may be below 0.

    Args:
        real: ``(m, d)``, m at least 2.
        fake: ``(n, d)``, n at least 4.

    Returns:
        ``{"value", "low", "high"}``.
    """
    real, fake = real.double(), fake.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m, within_real = len(real), 0.0
    for chunk in real.split(1024):
        within_real += float(kernel(chunk, real).sum())
    within_real -= float(((real.square().sum(dim=1) / real.shape[1] + 1) ** 3).sum())
    within_real /= m * (m - 1)

    # Sums over pairs of groups are all that leaving a group out needs.
    groups = _groups(len(fake))
    count = int(groups.max()) + 1
    parts = [fake[groups == group] for group in range(count)]
    within = torch.tensor([[float(kernel(a, b).sum()) for b in parts] for a in parts], dtype=torch.float64)
    for group, part in enumerate(parts):
        within[group, group] -= kernel(part, part).diagonal().sum()
    across = torch.tensor([float(kernel(part, real).sum()) for part in parts], dtype=torch.float64)
    sizes = torch.tensor([len(part) for part in parts])

    def distance(keep: torch.Tensor) -> torch.Tensor:
        n = sizes[keep].sum()
        return within[keep][:, keep].sum() / (n * (n - 1)) + within_real - 2 * across[keep].sum() / (n * m)

    every = torch.arange(count)
    value = float(distance(every >= 0))
    low, high = _jackknife(value, lambda group: distance(every != group), count)
    return {"value": value, "low": low, "high": high}


def mean_score(values: torch.Tensor, resamples: int, seed: int = 0) -> dict[str, float]:
    """The mean with a percentile bootstrap interval.

    Args:
        values: ``(n,)``.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(resamples)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(values.mean()), "low": low, "high": high}


def psnr_values(pictures: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Peak signal-to-noise ratio of each picture to the teacher's, in dB.

    Args:
        pictures: uint8, ``(n, 3, height, width)``.
        teacher: The teacher's pictures of the same prompts and seeds.

    Returns:
        float64 ``(n,)``, at most :data:`PSNR_CAP`, and how many pictures are equal to the teacher's, whose ratio is
        infinite and counts as the cap.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    equal = (pictures == teacher).flatten(1).all(dim=1)
    values = torch.full((len(pictures),), PSNR_CAP, dtype=torch.float64)
    for index in torch.nonzero(~equal).flatten().tolist():
        values[index] = peak_signal_noise_ratio(pictures[index].double(), teacher[index].double(), data_range=255.0)
    return values.clamp(max=PSNR_CAP), int(equal.sum())


def ssim_values(pictures: torch.Tensor, teacher: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Structural similarity of each picture to the teacher's (Wang et al. 2004), Gaussian window of sigma 1.5 px.

    Args:
        pictures: uint8, ``(n, 3, height, width)``, sides of at least 6 px.
        teacher: The teacher's pictures of the same prompts and seeds.
        batch_size: Pictures at once.

    Returns:
        float64 ``(n,)``, in [-1, 1].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    batches = [
        structural_similarity_index_measure(a.float(), b.float(), data_range=255.0, reduction="none")
        for a, b in zip(pictures.split(batch_size), teacher.split(batch_size), strict=True)
    ]
    return torch.cat([torch.as_tensor(batch).reshape(-1) for batch in batches]).double()


def _centered(rows: torch.Tensor) -> torch.Tensor:
    """Rows without their mean, scaled so that ``A^T A`` is the covariance."""
    return (rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5


def _groups(n: int) -> torch.Tensor:
    """The group of each of n pictures, at most :data:`GROUPS` groups of nearly equal size."""
    return torch.arange(n) % min(GROUPS, n)


def _jackknife(value: float, without: Callable[[int], torch.Tensor], count: int) -> tuple[float, float]:
    """A 95 % interval from the values with one group left out (Efron 1982)."""
    left = torch.stack([without(group) for group in range(count)])
    error = float(((count - 1) / count * (left - left.mean()).square().sum()).sqrt())
    return value - Z * error, value + Z * error
