"""Widths that meet a target of measured latency."""

import math
from collections.abc import Callable
from typing import Any

from compress.errors import UserError, bad_value
from compress.prune.channels.target import Widths, choices_of, config_at
from compress.prune.sensitivity.levels import interpolate
from compress.prune.stopwatch import AIM, ATTEMPTS, TOLERANCE, MeasuredLatency, Stopwatch


class WidthLatencies:
    """The latency of a UNet at other widths, as a share of its current one.

    Each level is narrowed alone, to its least width and to a middle one, and the whole denoiser is measured. The
    product of these shares predicts the others: levels that are narrow together share less work that could be saved.
    Every further measurement corrects the prediction nearby.

    Args:
        unet: Only its config is used.
        stopwatch: Of this UNet.
        heads: See :class:`compress.prune.width.Config`.
        multiple: See :class:`compress.prune.width.Config`.

    Raises:
        UserError: No level can become narrower.
    """

    def __init__(self, unet: Any, stopwatch: Stopwatch, heads: str = "auto", multiple: int | None = None) -> None:
        self.unet, self.stopwatch, self.heads, self.multiple = unet, stopwatch, heads, multiple
        self.widths, self.choices = narrower_choices(unet, heads, multiple)
        self.measured: dict[Widths, float] = {self.widths: 1.0}
        self._alone: list[list[tuple[float, float]]] = []  # of each level: removed share of the width, saved latency
        for level, full in enumerate(self.widths):
            alone = [c for c in self.choices if _changed(c, self.widths) == [level]]
            points = {1 - c[level] / full: 1 - self.exact(c) for c in (*alone[:1], *alone[len(alone) // 2 :][:1])}
            self._alone.append([(0.0, 0.0), *sorted(points.items())])

    def exact(self, widths: Widths) -> float:
        """The measured share at these widths."""
        if widths not in self.measured:
            self.measured[widths] = self.stopwatch.share(config_at(self.unet, widths, self.heads, self.multiple))
        return self.measured[widths]

    def estimate(self, widths: Widths) -> float:
        """The predicted share: the measured ones are met, those between are corrected by the nearest of them."""
        near = {self._distance(widths, known): known for known in self.measured}
        if 0.0 in near:
            return self.measured[widths]
        weights = {known: distance**-2 for distance, known in near.items()}
        off = sum(weight * (self.measured[known] - self._product(known)) for known, weight in weights.items())
        return self._product(widths) + off / sum(weights.values())

    def check(self, share: float) -> None:
        """Refuse a target that the narrowest widths do not reach.

        Raises:
            UserError: With the share that they leave.
        """
        least = min(self.choices, key=sum)
        left = self.exact(least)
        if left > share * (1 + TOLERANCE):
            raise bad_value(
                "target.latency",
                share,
                f"at least {left:.2f}, which the narrowest widths ({_listed(least)}) leave in {self.stopwatch.engine}; "
                "prune=depth removes whole blocks",
            )

    def choose(self, share: float, predicted: Callable[[Widths], float]) -> tuple[Widths, MeasuredLatency]:
        """The widths with the least predicted error that meet a share, and what was measured.

        Args:
            share: To be left.
            predicted: Predicted error of widths.

        Raises:
            UserError: Of the widths predicted to meet it, none does; with the nearest ones.
        """
        tried: dict[Widths, float] = {}
        for _ in range(ATTEMPTS):
            off = {c: abs(self.estimate(c) / share - 1) for c in self.choices if c not in tried}
            if not off:
                break
            least = max(AIM, min(off.values()))
            chosen = min((c for c in off if off[c] <= least), key=lambda c: (predicted(c), c))
            estimated = self.estimate(chosen)
            tried[chosen] = self.exact(chosen)
            if abs(tried[chosen] / share - 1) <= TOLERANCE:
                again = self.stopwatch.confirm(config_at(self.unet, chosen, self.heads, self.multiple))
                if abs(again / share - 1) <= TOLERANCE:
                    return chosen, self._about(estimated, again, list(tried.values()))
                self.measured[chosen] = (tried[chosen] + again) / 2  # corrects the predictions nearby
        near = sorted(tried, key=lambda c: abs(tried[c] - share))[:2]
        listed = " or ".join(f"{tried[c]:.3f} (widths {_listed(c)})" for c in near)
        raise UserError(
            f"target.latency={share:g}: no widths of this UNet meet this within 5 % in {self.stopwatch.engine}; "
            f"nearest: {listed}"
        )

    def _about(self, predicted: float, measured: float, tried: list[float]) -> MeasuredLatency:
        table = [{"widths": list(widths), "share": share} for widths, share in self.measured.items()]
        return MeasuredLatency(self.stopwatch.engine, self.stopwatch.batch, predicted, measured, table, tried)

    def _product(self, widths: Widths) -> float:
        levels = zip(self._alone, widths, self.widths, strict=True)
        return math.prod(1 - interpolate(points, 1 - new / old) for points, new, old in levels)

    def _distance(self, one: Widths, other: Widths) -> float:
        return sum(((a - b) / full) ** 2 for a, b, full in zip(one, other, self.widths, strict=True)) ** 0.5


def narrower_choices(unet: Any, heads: str, multiple: int | None) -> tuple[Widths, list[Widths]]:
    """The current widths and all narrower ones.

    Raises:
        UserError: There are none.
    """
    full = tuple(int(width) for width in unet.config.block_out_channels)
    choices = [choice for choice in choices_of(unet.config, heads, multiple) if choice != full]
    if not choices:
        raise UserError(
            f"target.latency: no widths in multiples of {multiple} are narrower than {_listed(full)}; set multiple"
        )
    return full, choices


def _changed(widths: Widths, full: Widths) -> list[int]:
    return [level for level, (new, old) in enumerate(zip(widths, full, strict=True)) if new != old]


def _listed(widths: Widths) -> str:
    return ", ".join(map(str, widths))
