"""The plots: their files, and numbers that cover neither each other nor a point."""

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from random_inputs import refused, row

from compress.jobs.benchmark.figures import PLOTS, _places, draw_plots


def test_both_plots_are_drawn_with_and_without_scores(tmp_path: Path):
    rows = [row("reference", psnr=None), row("a", latency=0.1), row("b", memory=2.0), refused("c")]
    rows[2]["dominated_by"] = "a"
    floor = row("other noise", psnr=13.0)["metrics"]
    assert list(draw_plots({"rows": rows, "best": "a", "noise_floor": floor}, tmp_path)) == list(PLOTS)
    wide = Image.open(tmp_path / "latency_quality.png").width
    for entry in rows[:3]:
        entry["metrics"]["clip_score"] = None
    draw_plots({"rows": rows, "best": None, "noise_floor": floor}, tmp_path)
    assert Image.open(tmp_path / "latency_quality.png").width < wide


@pytest.mark.parametrize("count", [1, 2, 5])
def test_numbers_of_points_in_one_place_stand_apart(count):
    figure = Figure(figsize=(4, 4), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    places = _places(axes, [(0.5, 0.5 + index / 1000) for index in range(count)])
    for (x, y), (u, v) in combinations(places, 2):
        assert abs(x - u) >= 7 or abs(y - v) >= 7
