"""Two plots of a benchmark: quality over latency, and quality over memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.jobs.benchmark.choose import PSNR_CAP, measured
from compress.report.figures import COLORS, DOTS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Point = tuple[float, float]
PLOTS = {
    "latency_quality.png": ("latency_s", 1.0, "latency of a call (s)", "Latency and quality"),
    "memory_quality.png": ("peak_memory_bytes", 1e-6, "peak memory (MB)", "Memory and quality"),
}
WIDE = 4.0  # ratio of largest to smallest value above which an axis is logarithmic
# Positions of a label relative to its point, in points: on rings around it, the nearest first.
PLACES = [(ring * math.cos(turn), ring * math.sin(turn)) for ring in (9, 18, 28, 38) for turn in range(12)]
KEY = 3.3  # width in inches of the list of rows
ROOM = (12.0, 9.0)  # width and height of a label in points


def draw_plots(result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws both plots, with a panel for PSNR and, if there is one, for the CLIP score.

    Rows are numbered, with their names beside. Dominated rows are hollow, the best row is a star. The dotted line is
    the noise floor, the reference row with other noise.

    Args:
        result: Result of :func:`compress.jobs.benchmark.benchmark`.
        folder: Where the files go.

    Returns:
        Titles by file name.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = measured(result["rows"])
    score = next((row["metrics"]["clip_score"]["network"] for row in rows if row["metrics"]["clip_score"]), None)
    panels = [("psnr", "PSNR to the reference row (dB)"), *([("clip_score", f"{score} score")] if score else [])]
    for name, (key, scale, axis, _) in PLOTS.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(4.3 * len(panels) + KEY, max(4.0, 0.17 * len(rows) + 0.9)), dpi=DOTS)
            FigureCanvasAgg(figure)
            right = 1 - (KEY - 0.1) / figure.get_figwidth()
            figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=right, bottom=0.13, top=0.95, wspace=0.2)
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for panel, (metric, title) in zip(axes, panels, strict=True):
                panel.set_xlabel(axis)
                panel.set_ylabel(f"{title}, higher is better")
                panel.axhline(result["noise_floor"][metric]["value"], color="#999999", linestyle=":", linewidth=0.9)
                _draw_panel(panel, rows, [row["cost"][key] * scale for row in rows], metric, result["best"])
            names = [f"{index}  {_named(row, result)}" for index, row in enumerate(rows, 1)]
            listed = "\n".join([*names, "", "dotted: noise floor"])
            figure.text(right + 0.15 / figure.get_figwidth(), 0.95, listed, va="top", fontsize=7.5, linespacing=1.35)
            figure.canvas.print_png(folder / name, metadata={"Software": None})  # type: ignore[attr-defined]
    return {name: title for name, (*_, title) in PLOTS.items()}


def _named(row: Row, result: Mapping[str, Any]) -> str:
    if row["name"] == result["best"]:
        return f"{row['name']} (best)"
    return f"{row['name']} (dominated)" if row.get("dominated_by") else row["name"]


def _draw_panel(axes: "Axes", rows: Sequence[Row], across: Sequence[float], metric: str, best: str | None) -> None:
    """One metric over one cost, with the 95 % intervals of the metric."""
    from matplotlib.ticker import LogLocator, NullLocator

    points = [
        (x, PSNR_CAP if (found := row["metrics"][metric]) is None else found["value"])
        for x, row in zip(across, rows, strict=True)
    ]
    if max(across) > WIDE * min(across) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    for (x, y), row in zip(points, rows, strict=True):
        found = row["metrics"][metric]
        hollow = bool(row.get("dominated_by"))
        star = row["name"] == best
        color = COLORS[2] if star else "#999999" if hollow else COLORS[1]
        if found is not None:
            bars = [[max(y - found["low"], 0.0)], [max(found["high"] - y, 0.0)]]
            axes.errorbar([x], [y], yerr=bars, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5, zorder=1)
        marker, size = ("*", 12) if star else ("o", 6)
        axes.plot([x], [y], marker, markersize=size, color=color, mfc="white" if hollow else color, zorder=3)
    axes.margins(x=0.1, y=0.1)
    axes.autoscale_view()
    for index, (place, (x, y)) in enumerate(zip(_places(axes, points), points, strict=True), 1):
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 0}
        text = axes.annotate(str(index), (x, y), place, textcoords="offset points", arrowprops=line, fontsize=7.5)
        text.set(ha="center", va="center", zorder=4)


def _places(axes: "Axes", points: Sequence[Point]) -> list[Point]:
    """The position of each point's label relative to it, in points, with the least overlap of labels and points."""
    to_points = 72 / DOTS
    at = [tuple(float(value) * to_points for value in axes.transData.transform(point)) for point in points]
    taken: list[Point] = list(at)  # type: ignore[arg-type]
    chosen: list[Point] = []
    for x, y in at:
        crowd = {
            place: sum(
                abs(x + place[0] - u) < ROOM[0] and abs(y + place[1] - v) < ROOM[1]
                for u, v in taken
                if (u, v) != (x, y)
            )
            for place in PLACES
        }
        place = min(PLACES, key=lambda place: crowd[place])  # the nearest of the emptiest
        taken.append((x + place[0], y + place[1]))
        chosen.append(place)
    return chosen
