"""The charts of the page, drawn by Bokeh.

Bokeh, because its script is 1.3 MB in a page that works without a network, and its package is pure Python on top of
what is installed anyway. Plotly's script is 4.8 MB, and every run has a page; Vega's needs a second package with a
JavaScript engine; smaller ones come without a Python package. It draws intervals, logarithmic axes and vectors for
print.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.report.figures import COLORS, smooth
from compress.report.pareto import Front, Spot

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

LABELED = 8  # up to so many spots all have their names beside them; of more only those of the front
DRAWN = 200  # points of a curve
CURVES = 20  # curves in a chart
PIXELS = (480, 285)  # of the plane of a chart, about
Curve = Sequence[tuple[float, float]]


def embed(figures: Sequence["Figure"]) -> tuple[str, str, list[str]]:
    """Bokeh's script, the script that draws, and a ``<div>`` for each figure; empty without figures."""
    if not figures:
        return "", "", []
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, divs = components(tuple(figures))
    return Resources(mode="inline", components=["bokeh"]).render_js(), script, list(divs)


def front_chart(front: Front) -> "Figure":
    """Quality over cost: the front in color, joined by steps; dominated rows gray; the teacher a diamond."""
    from bokeh.models import ColumnDataSource, HoverTool, LabelSet, Span, Whisker

    wide = _range([spot.x for spot in front.spots], 0.08, 0.3)  # room for names on the right
    high = _range([end for spot in front.spots for end in (spot.low, spot.high)], 0.1, 0.12)
    labels, above = _labels(front.spots, wide, high)
    drawn = _figure(front.cost.title, front.quality.heading, x_range=wide, y_range=high)
    kept = [spot for spot in front.spots if not spot.dominated]
    if len(kept) > 1:
        way = sorted(kept, key=lambda spot: spot.x)
        drawn.step([s.x for s in way], [s.y for s in way], mode="after", color=COLORS[1], alpha=0.5, line_width=1.5)
    if front.floor is not None:
        drawn.add_layout(Span(location=front.floor, dimension="width", line_color="#999999", line_dash="dashed"))
    colors = [COLORS[0] if s.teacher else "#b0b0b0" if s.dominated else COLORS[1] for s in front.spots]
    source = ColumnDataSource(
        {
            **{key: [getattr(spot, key) for spot in front.spots] for key in ("name", "x", "y", "low", "high")},
            "color": colors,
            "marker": ["diamond" if spot.teacher else "circle" for spot in front.spots],
            "size": [14 if spot.teacher else 9 for spot in front.spots],
            "label": labels,
            "above": above,
        }
    )
    whisker = Whisker(base="x", lower="low", upper="high", source=source, line_color="color", line_alpha=0.6)
    for head in (whisker.upper_head, whisker.lower_head):
        head.size, head.line_color, head.line_alpha = 6, "gray", 0.6
    drawn.add_layout(whisker)
    glyphs = drawn.scatter("x", "y", source=source, color="color", marker="marker", size="size")
    drawn.add_layout(
        LabelSet(x="x", y="y", text="label", source=source, x_offset=7, y_offset="above", text_font_size="11px")
    )
    drawn.add_tools(
        HoverTool(
            renderers=[glyphs],
            tooltips=[("", "@name"), (front.cost.title, "@x{0.[000]}"), (front.quality.title, "@y{0.[000]}")],
        )
    )
    return drawn


def _range(values: Sequence[float], before: float, after: float) -> tuple[float, float]:
    """From the smallest to the largest with shares of that length added at the ends."""
    length = (max(values) - min(values)) or abs(max(values)) or 1.0
    return min(values) - before * length, max(values) + after * length


def _labels(spots: Sequence[Spot], wide: tuple[float, float], high: tuple[float, float]) -> tuple[list[str], list[int]]:
    """The names to write, and how many pixels above its spot each stands; one with no room is left to the pointer."""
    to_pixels = [PIXELS[axis] / (end - begin) for axis, (begin, end) in enumerate((wide, high))]
    placed: list[tuple[float, float, float]] = []  # left end, right end, bottom
    names, above = [], []
    named = [not spot.dominated or len(spots) <= LABELED for spot in spots]
    for spot, is_named in zip(spots, named, strict=True):
        left = (spot.x - wide[0]) * to_pixels[0]
        right, y = left + 6.5 * len(spot.name) + 10, (spot.y - high[0]) * to_pixels[1]
        free = [
            offset
            for offset in (4, -18)
            if not any(left < r and right > b and abs(y + offset - bottom) < 14 for b, r, bottom in placed)
        ]
        names.append(spot.name if is_named and free else "")
        above.append(free[0] if free else 0)
        if names[-1]:
            placed.append((left, right, y + above[-1]))
    return names, above


def curve_chart(curves: Mapping[str, Curve]) -> "Figure":
    """Losses over steps, on a logarithmic axis; long curves as running means."""
    from bokeh.models import HoverTool

    drawn = _figure("step", "loss", y_axis_type="log")
    for index, (name, points) in enumerate(list(curves.items())[:CURVES]):
        steps, values = zip(*points, strict=True)
        if len(values) >= 60:
            values = tuple(smooth(values, len(values) // 20))
        every = -(-len(values) // DRAWN)
        color = COLORS[1 + index % (len(COLORS) - 1)]
        dash = "solid" if index < len(COLORS) - 1 else "dashed"
        line = drawn.line(
            steps[::every], values[::every], name=name, color=color, line_width=1.8, line_dash=dash, legend_label=name
        )
        drawn.add_tools(HoverTool(renderers=[line], tooltips=[("", "$name"), ("step", "$snap_x"), ("loss", "$snap_y")]))
    drawn.legend.click_policy = "mute"
    drawn.legend.background_fill_alpha = 0.6
    drawn.legend.border_line_alpha = 0
    drawn.legend.label_text_font_size = "11px"
    if len(curves) > 6:
        drawn.legend.visible = False  # names show on hover
    return drawn


def _figure(x: str, y: str, **more: Any) -> "Figure":
    """A figure as wide as its place, transparent, with vectors in place of pixels."""
    from bokeh.plotting import figure

    drawn = figure(
        height=340, sizing_mode="stretch_width", output_backend="svg", tools="pan,box_zoom,reset,save",
        active_drag=None, x_axis_label=x, y_axis_label=y, background_fill_alpha=0, border_fill_alpha=0,
        outline_line_alpha=0, min_border_right=12, **more,
    )  # fmt: skip
    drawn.toolbar.autohide = True
    drawn.toolbar.logo = None
    for axis in drawn.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_color = axis.major_label_text_color = "#333333"
    drawn.grid.grid_line_color = "#e5e5e5"
    return drawn
