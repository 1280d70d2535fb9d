"""The heat map: PSNR of the prediction when a level, block or attention loses a share of its channels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.prune.sensitivity.error import MOST
from compress.report.figures import DOTS

ROW = 0.2  # inches


def draw_heat_map(panels: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Draws the panels below each other, with a row for each part and a column for each share.

    Args:
        panels: Title to rows, each with a ``name`` and ``points`` of ``ratio`` and ``psnr``.
        file: A PNG file.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    filled = {title: rows for title, rows in panels.items() if rows}
    heights = [ROW * len(rows) + 0.2 for rows in filled.values()]
    seen = [point["psnr"] for rows in filled.values() for row in rows for point in row["points"]]
    seen = [value for value in seen if value < MOST] or [0.0, MOST]
    worst, best = min(seen), max(seen)
    longest = max(len(str(row["name"])) for rows in filled.values() for row in rows)
    left, right, gap = 0.075 * longest + 0.3, 0.9, 0.55  # inches
    wide, high = left + 3.6 + right, sum(heights) + gap * len(filled) + 0.2
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(wide, high), dpi=DOTS)
        FigureCanvasAgg(figure)
        top = high - 0.3
        for (title, rows), height in zip(filled.items(), heights, strict=True):
            ratios = sorted({point["ratio"] for row in rows for point in row["points"]})
            values = np.full((len(rows), len(ratios)), np.nan)
            for i, row in enumerate(rows):
                for point in row["points"]:
                    values[i, ratios.index(point["ratio"])] = point["psnr"]
            axes = figure.add_axes((left / wide, (top - height) / high, 3.6 / wide, height / high))
            image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=worst, vmax=best)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
            axes.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
            axes.tick_params(length=0)
            for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
                color = "black" if values[i, j] > (worst + best) / 2 else "white"
                axes.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center", color=color, fontsize=7)
            top -= height + gap
        bar = figure.add_axes(((wide - 0.7) / wide, 0.35 / high, 0.12 / wide, 1 - 0.7 / high))
        figure.colorbar(image, cax=bar, label="PSNR of the prediction (dB)")
        figure.canvas.print_png(file, metadata={"Software": None})  # type: ignore[attr-defined]
