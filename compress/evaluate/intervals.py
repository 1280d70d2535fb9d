"""95 % intervals of the metrics.

Every interval is of the expectation of the same statistic over fresh draws of as many pictures, with the reference
held fixed.
"""

from typing import Any

import torch

INTERVAL_OF = "expectation of the same statistic over fresh draws of n pictures, reference held fixed"


def mean_interval(values: torch.Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The mean with a percentile bootstrap interval.

    Args:
        values: ``(n,)``.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        ``{"value", "low", "high", "n", "interval_of"}``.
    """
    values = values.double().sort().values
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(resamples)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values), "interval_of": INTERVAL_OF}


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Half the width of the 95 % interval of the difference of two independently drawn rows.

    Args:
        a: With ``low`` and ``high``.
        b: With ``low`` and ``high``.

    Returns:
        The half width; a difference of the two values that is no larger lies inside the noise.
    """
    return float(((a["high"] - a["low"]) ** 2 + (b["high"] - b["low"]) ** 2) ** 0.5 / 2)
