"""The assignment of bits to layers with the least error for a size, or the least size for an error."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Table = Mapping[str, Mapping[int, float]]
"""Name of a layer to a number for each number of bits."""


def assign(sizes: Table, errors: Table, *, size: float | None = None, error: float | None = None) -> dict[str, int]:
    """Chooses one number of bits for each layer: a multiple-choice knapsack, solved exactly by HiGHS.

    The errors of layers add up, which holds for small and independent ones.

    Args:
        sizes: Bytes of each layer at each number of bits.
        errors: Mean squared error of the prediction with that layer alone rounded.
        size: Most bytes of all; the error is then the least possible.
        error: Most error of all; the size is then the least possible. Give one of the two.

    Returns:
        Name of a layer to its bits.

    Raises:
        ValueError: No assignment is within the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = [(layer, bits) for layer, row in sizes.items() for bits in row]
    bytes_ = np.array([sizes[layer][bits] for layer, bits in names], dtype=float)
    losses = np.array([errors[layer][bits] for layer, bits in names], dtype=float)
    one = np.array([[float(layer == name) for layer, _ in names] for name in sizes])
    goal, limited, limit = (losses, bytes_, size) if size is not None else (bytes_, losses, error)
    assert limit is not None
    scale = max(float(limited.max()), 1e-300)  # the solver's tolerances are absolute
    found: Any = milp(
        goal / max(float(goal.max()), 1e-300),
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(limited[None] / scale, -np.inf, limit / scale)],
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        raise ValueError("no assignment is within the limit")
    return {layer: bits for (layer, bits), chosen in zip(names, found.x, strict=True) if chosen > 0.5}
