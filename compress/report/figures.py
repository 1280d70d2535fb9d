"""The images of a report: sample grid, size against quality, curves of the losses."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.report.images import pixels
from compress.report.table import METRICS, number, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    "#3b3b3b",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito, color-blind safe
DOTS = 160
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw_grid(grids: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Rows: teacher and stages; columns: prompts, written above. Pixels are enlarged without smoothing."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    filled = {name: grid for name, grid in grids.items() if grid}
    width = max(len(grid) for grid in filled.values())
    cell, left, gap = 1.25, 0.95, 0.06  # inches
    heads = next(grid for grid in filled.values() if len(grid) == width)
    prompts = [textwrap.fill(str(entry["prompt"]), 17, break_long_words=True) for entry in heads]
    top = 0.17 * max(text.count("\n") + 1 for text in prompts) + 0.12
    wide, high = left + width * (cell + gap), top + len(filled) * (cell + gap)
    with mpl.rc_context({"font.size": 8.5}):
        figure = Figure(figsize=(wide, high), dpi=DOTS)
        for row, (name, grid) in enumerate(filled.items()):
            bottom = high - top - (row + 1) * (cell + gap) + gap
            label = "\n".join(textwrap.wrap(name, 13, break_long_words=True))
            figure.text((left - 0.1) / wide, (bottom + cell / 2) / high, label, ha="right", va="center", weight="bold")
            for column, entry in enumerate(grid):
                x = left + column * (cell + gap)
                axes = figure.add_axes((x / wide, bottom / high, cell / wide, cell / high))
                axes.imshow(pixels(entry["image"]), interpolation="nearest")
                axes.set_axis_off()
                if row == 0:
                    place = ((x + cell / 2) / wide, 1 - (top - 0.06) / high)
                    figure.text(*place, prompts[column], ha="center", va="bottom", linespacing=1.1)
        _save(figure, file)


def draw_size_quality(result: Mapping[str, Any], file: Path) -> bool:
    """FID and PSNR over the bytes on disk, with their intervals; False (and no file) if neither was measured."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    entries = rows(result)
    shown = [
        column
        for column in METRICS
        if column.key in ("fid", "psnr") and any(number(entry, column) is not None for _, entry in entries)
    ]
    sizes = [size for _, entry in entries if (size := _megabytes(entry)) is not None]
    if not shown or not sizes:
        return False
    largest = max(sizes)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(shown), 3.6), dpi=DOTS, layout="constrained")
        for axes, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            points = []
            for index, (name, entry) in enumerate(entries):
                x, y = _megabytes(entry), number(entry, column)
                if x is None or y is None:
                    continue
                low, high = number(entry, column, "low"), number(entry, column, "high")
                bars = None if low is None or high is None else [[max(y - low, 0.0)], [max(high - y, 0.0)]]
                color = COLORS[index % len(COLORS)]
                axes.errorbar([x], [y], yerr=bars, fmt="o", color=color, capsize=3, markersize=6, zorder=3)
                right = x > 0.7 * largest  # labels stay inside
                axes.annotate(
                    name,
                    (x, y),
                    (-7 if right else 7, 5),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    va="bottom",
                    color=color,
                    weight="bold",
                    zorder=4,
                )
                points.append((x, y))
            if "refused" not in result:  # alternatives are no path
                axes.plot(*zip(*points, strict=True), color="#bbbbbb", linewidth=1, zorder=1)
            axes.margins(x=0.18, y=0.14)
            axes.set_xlabel("denoiser on disk (MB)")
            better = "lower" if column.better == "down" else "higher"
            axes.set_ylabel(f"{column.title}, {better} is better")
            if column.key == "psnr":
                axes.set_title("against the teacher's images", fontsize=9, color="#666666")
            _teacher_line(axes, entries, column.key)
            axes.set_xlim(left=0)
        _save(figure, file)
    return True


def _teacher_line(axes: "Axes", entries: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> None:
    """The teacher's size where its quality is unknown: its PSNR to itself is infinite."""
    for name, entry in entries:
        size = _megabytes(entry)
        if name == "teacher" and size is not None and not (entry.get("metrics") or {}).get(key):
            axes.axvline(size, color="#999999", linestyle="--", linewidth=1)
            axes.annotate(
                "teacher", (size, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", color="#777777"
            )


def _megabytes(entry: Mapping[str, Any]) -> float | None:
    size = (entry.get("cost") or {}).get("bytes")
    return size / 1e6 if isinstance(size, int | float) and math.isfinite(size) else None


def draw_losses(result: Mapping[str, Any], file: Path) -> bool:
    """A panel for each stage that has curves; False (and no file) if none has.

    The logarithmic axis shows positive finite values; a running mean lies over long curves.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [(stage["name"], curves) for stage in result.get("stages", []) if (curves := losses(stage))]
    if not panels:
        return False
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(panels), 3.6), dpi=DOTS, layout="constrained")
        for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for index, (label, points) in enumerate(curves.items()):
                color = COLORS[1 + index % (len(COLORS) - 1)]
                steps, values = zip(*points, strict=True)
                if len(points) >= 60:
                    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.25)
                    axes.plot(steps, smooth(values, len(values) // 20), color=color, linewidth=1.6, label=label)
                else:
                    marker = "o" if len(points) < 3 else None
                    axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)
            axes.set_yscale("log")
            axes.set_title(name, fontsize=10, weight="bold")
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.legend(fontsize=8)
        _save(figure, file)
    return True


def losses(stage: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The curves that can be drawn; where some are called losses, only these."""
    curves = {
        name: [(step, value) for step, value in points if value is not None and math.isfinite(value) and value > 0]
        for name, points in (stage.get("curves") or {}).items()
    }
    drawn = {name: points for name, points in curves.items() if points}
    named = {name: points for name, points in drawn.items() if "loss" in name.lower()}
    return named or drawn


def smooth(values: Sequence[float], half: int) -> list[float]:
    """Mean of the values at most ``half`` away; towards the ends fewer, always as many on both sides."""
    smooth = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        smooth.append(sum(window) / len(window))
    return smooth


def _save(figure: "Figure", file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
