"""The base of all metrics: it keeps every image's numbers until the end, in all processes."""

from typing import Any

import torch
from torchmetrics import Metric


class RowMetric(Metric):
    """A metric that keeps rows of numbers.

    Rows are stored flat in float64 states, which torchmetrics joins across processes. A process may have none. The
    order of the rows changes a result by rounding only.

    Args:
        resamples: Bootstrap resamples, if the metric's interval is a bootstrap.
        seed: Seed of the resampling.
        kwargs: See :class:`torchmetrics.Metric`.

    Attributes:
        names: Of the kept states.
    """

    is_differentiable = False
    full_state_update = False
    names: tuple[str, ...] = ()

    def __init__(self, resamples: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resamples, self.seed = resamples, seed
        for name in self.names:
            self.add_state(name, default=[], dist_reduce_fx="cat")
            self.add_state(f"{name}_width", default=torch.tensor(0), dist_reduce_fx="max")
        self.set_dtype(torch.float64)

    def keep(self, name: str, rows: torch.Tensor) -> None:
        """Keeps more rows.

        Args:
            name: One of ``names``.
            rows: ``(b,)`` or ``(b, d)``, d the same at every call.

        Raises:
            FloatingPointError: A number is not finite.
            ValueError: The shape differs from that of the rows before.
        """
        rows = rows.detach().to(self.device, torch.float64)
        if rows.ndim not in (1, 2):
            raise ValueError(f"expected rows (b,) or (b, d), not {tuple(rows.shape)}")
        width = 1 if rows.ndim == 1 else rows.shape[1]
        state = getattr(self, f"{name}_width")
        known = int(state)
        if known not in (0, width):
            raise ValueError(f"{name}: expected {known} numbers a row, not {width}")
        if not rows.isfinite().all():
            raise FloatingPointError(f"{type(self).__name__}: {name} hold NaN or infinite numbers")
        setattr(self, f"{name}_width", torch.full_like(state, width))
        getattr(self, name).append(rows.flatten())

    def rows(self, name: str, least: int = 1) -> torch.Tensor:
        """All rows of one state, float64 ``(n, d)``.

        Raises:
            ValueError: There are fewer than ``least`` rows.
        """
        state, width = getattr(self, name), max(1, int(getattr(self, f"{name}_width")))
        flat = state if isinstance(state, torch.Tensor) else torch.cat([torch.empty(0, device=self.device), *state])
        found = flat.double().view(-1, width)
        if len(found) < least:
            raise ValueError(f"{type(self).__name__} needs at least {least} of {name}, not {len(found)}")
        return found
