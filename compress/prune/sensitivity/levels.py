"""Each resolution level against the share of its channels that is removed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError
from compress.progress import track
from compress.prune.importance.score import Scorer
from compress.prune.rebuild import prune_unet
from compress.prune.sensitivity.error import Error, Reference
from compress.prune.target import Widths


@dataclass(frozen=True)
class Narrowed:
    """One level alone made narrower.

    Attributes:
        level: Counted from the highest resolution.
        width: Channels left.
        ratio: Share removed; differs from the one asked for where that is not possible.
        error: Of the prediction.
    """

    level: int
    width: int
    ratio: float
    error: Error


def narrow_levels(unet: Any, scorer: Scorer, reference: Reference, ratios: Sequence[float]) -> list[Narrowed]:
    """Prunes one level at a time and looks at the prediction.

    Args:
        unet: Stays unchanged.
        scorer: Decides which channels go.
        reference: Of the unet.
        ratios: Shares of a level's channels to remove, each in (0, 1).

    Returns:
        In the order of levels and ratios; without ratios that a level cannot lose.
    """
    full = [int(width) for width in unet.config.block_out_channels]
    tried = [(level, ratio) for level in range(len(full)) for ratio in sorted(ratios)]
    found: dict[tuple[int, int], Narrowed] = {}
    for level, ratio in track(tried, "sensitivity of levels"):
        try:
            report = prune_unet(unet, [ratio if i == level else 0 for i in range(len(full))], scorer)
        except UserError:
            continue  # no width of this level is near enough to that ratio
        width = report.widths_after[level]
        if (level, width) not in found:
            error = reference.error(report.unet)
            found[level, width] = Narrowed(level, width, 1 - width / full[level], error)
    return list(found.values())


def predicted_error(found: Sequence[Narrowed], full: Sequence[int], widths: Widths) -> float:
    """Relative error of the prediction with all levels narrowed, had each its error alone and independently.

    Between two measured widths a level's squared error is interpolated linearly, and beyond them extrapolated; it never
    falls with the share removed.

    Args:
        found: What :func:`narrow_levels` gave.
        full: The widths now.
        widths: The widths then.
    """
    total = 0.0
    for level, (old, new) in enumerate(zip(full, widths, strict=True)):
        points = [(0.0, 0.0), *sorted((n.ratio, n.error.relative**2) for n in found if n.level == level)]
        total += _interpolate(points, 1 - new / old)
    return total**0.5


def _interpolate(points: list[tuple[float, float]], at: float) -> float:
    if at <= 0:
        return 0.0
    if len(points) == 1:
        return at  # nothing is known of this level: as bad as can be
    rising = [points[0]]
    for x, y in points[1:]:
        rising.append((x, max(y, rising[-1][1])))
    after = next((i for i, (x, _) in enumerate(rising) if x >= at), len(rising) - 1)
    (x0, y0), (x1, y1) = rising[after - 1], rising[after]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
