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
NAME = 34  # letters of a name, its last ones; so many have room on one side of every spot
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
    labels = _labels(front.spots, wide, high)
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
            **labels,
        }
    )
    whisker = Whisker(base="x", lower="low", upper="high", source=source, line_color="color", line_alpha=0.6)
    for head in (whisker.upper_head, whisker.lower_head):
        head.size, head.line_color, head.line_alpha = 6, "gray", 0.6
    drawn.add_layout(whisker)
    glyphs = drawn.scatter("x", "y", source=source, color="color", marker="marker", size="size")
    drawn.add_layout(
        LabelSet(
            x="x",
            y="y",
            text="label",
            source=source,
            x_offset="beside",
            y_offset="above",
            text_align="side",
            text_font_size="11px",
        )
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


def _labels(spots: Sequence[Spot], wide: tuple[float, float], high: tuple[float, float]) -> dict[str, list[Any]]:
    """The names to write and where each stands; one without room, and a long one's beginning, show on hover.

    Returns:
        ``label``; ``side``, the end of the name that is at its spot; ``beside`` and ``above`` it in pixels.
    """
    to_pixels = [PIXELS[axis] / (end - begin) for axis, (begin, end) in enumerate((wide, high))]
    placed: list[tuple[float, float, float]] = []  # left end, right end, bottom
    found: dict[str, list[Any]] = {"label": [], "side": [], "beside": [], "above": []}
    for spot in spots:
        name = spot.name if len(spot.name) <= NAME else f"…{spot.name[1 - NAME :]}"
        x, y, width = (spot.x - wide[0]) * to_pixels[0], (spot.y - high[0]) * to_pixels[1], 6.5 * len(name) + 10
        to_right = x + width <= PIXELS[0]
        left, right = (x, x + width) if to_right else (x - width, x)
        free = [
            offset
            for offset in (4, -18)
            if not any(left < r and right > b and abs(y + offset - bottom) < 14 for b, r, bottom in placed)
        ]
        is_named = bool(free) and (not spot.dominated or len(spots) <= LABELED)
        place = (name if is_named else "", "left" if to_right else "right", 7 if to_right else -7, (free or [0])[0])
        for key, value in zip(found, place, strict=True):
            found[key].append(value)
        if is_named:
            placed.append((left, right, y + place[-1]))
    return found


def curve_styles(curves: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """Name, color and ``"solid"`` or ``"dashed"`` of each curve that is drawn."""
    colors = COLORS[1:]
    return [
        (name, colors[index % len(colors)], "solid" if index < len(colors) else "dashed")
        for index, name in enumerate(list(curves)[:CURVES])
    ]


def curve_chart(curves: Mapping[str, Curve]) -> "Figure":
    """Losses over steps, on a logarithmic axis; long curves as running means."""
    from bokeh.models import HoverTool

    drawn = _figure("step", "loss", y_axis_type="log")
    for name, color, dash in curve_styles(curves):
        steps, values = zip(*curves[name], strict=True)
        if len(values) >= 60:
            values = tuple(smooth(values, len(values) // 20))
        every = -(-len(values) // DRAWN)
        line = drawn.line(steps[::every], values[::every], name=name, color=color, line_width=1.8, line_dash=dash)
        if len(values) < 3:  # no line, or one too short to see
            drawn.scatter(steps, values, color=color, size=7)
        drawn.add_tools(HoverTool(renderers=[line], tooltips=[("", "$name"), ("step", "$snap_x"), ("loss", "$snap_y")]))
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
