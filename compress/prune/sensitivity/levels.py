"""Sensitivity of each resolution level to the removal of channels."""

from collections.abc import Sequence

from compress.errors import UserError
from compress.prune.channels.report import NarrowedLevel, Pruner
from compress.prune.channels.target import Widths
from compress.prune.sensitivity.error import UnchangedPrediction
from compress.system.progress import track


def narrow_levels(
    widths: Sequence[int], prune: Pruner, reference: UnchangedPrediction, ratios: Sequence[float]
) -> list[NarrowedLevel]:
    """Prune one level at a time and measure the error of the prediction.

    Args:
        widths: Widths of the UNet's levels.
        prune: Prunes the UNet.
        reference: Predictions of the unchanged UNet.
        ratios: Shares of a level's channels to remove, each in (0, 1).

    Returns:
        Results in the order of levels and ratios, without ratios that are impossible for a level.

    Raises:
        UserError: All ratios are impossible for all levels, or the UNet cannot be pruned at all.
    """
    tried = [(level, ratio) for level in range(len(widths)) for ratio in sorted(ratios)]
    found: dict[tuple[int, int], NarrowedLevel] = {}
    refused: UserError | None = None
    for level, ratio in track(tried, "sensitivity of levels"):
        try:
            report = prune([ratio if i == level else 0 for i in range(len(widths))])
        except UserError as error:
            refused = error  # no width of this level is near enough to that ratio
            continue
        width = report.widths_after[level]
        if (level, width) not in found:
            found[level, width] = NarrowedLevel(level, width, 1 - width / widths[level], reference.error(report.unet))
    if not found and refused is not None:
        raise refused
    return list(found.values())


def predicted_error(found: Sequence[NarrowedLevel], full: Sequence[int], widths: Widths) -> float:
    """Predicted relative error with all levels narrowed, assuming that the errors of levels are independent.

    A level's squared error is interpolated linearly between measured widths and extrapolated beyond them. It never
    decreases with the removed share.

    Args:
        found: The result of :func:`narrow_levels`.
        full: Current widths.
        widths: New widths.
    """
    total = 0.0
    for level, (old, new) in enumerate(zip(full, widths, strict=True)):
        points = [(0.0, 0.0), *sorted((n.ratio, n.error.relative**2) for n in found if n.level == level)]
        total += interpolate(points, 1 - new / old)
    return total**0.5


def interpolate(points: list[tuple[float, float]], at: float) -> float:
    """A value between points that rise from (0, 0), linearly; beyond the last one as between the last two."""
    if at <= 0:
        return 0.0
    if len(points) == 1:
        return at  # this level was not measured: assume a large error
    rising = [points[0]]
    for x, y in points[1:]:
        rising.append((x, max(y, rising[-1][1])))
    after = next((i for i, (x, _) in enumerate(rising) if x >= at), len(rising) - 1)
    (x0, y0), (x1, y1) = rising[after - 1], rising[after]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
