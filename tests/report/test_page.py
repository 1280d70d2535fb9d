"""The page of a run: its numbers, and what it does in a browser. LaTeX and CSV hold the same numbers."""

import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bokeh.models import ColumnDataSource
from browser import chromium
from made import metric, write_run

from compress import report
from compress.report.best import best
from compress.report.charts import curve_styles, front_chart
from compress.report.pareto import fronts, is_dominated
from compress.report.table import columns, lines, number, rows


class Numbers(HTMLParser):
    """The tables of a page: for each its headings, and its rows' names with the numbers and texts of their cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables, self.into = [], None
        self.feed(page)

    def handle_starttag(self, tag, found):
        found = dict(found)
        if tag == "table":
            self.tables.append(([], []))
        if tag == "tr" and self.tables and self.tables[-1][0]:
            self.tables[-1][1].append([])
        if tag in ("th", "td"):
            headings, body = self.tables[-1]
            self.into = body[-1] if body else headings
            self.into.append(["", found.get("data-number"), found.get("class")])

    def handle_endtag(self, tag):
        self.into = None if tag in ("th", "td") else self.into

    def handle_data(self, data):
        if self.into is not None:
            self.into[-1][0] += data


@pytest.fixture
def folder(result, grids, tmp_path) -> Path:
    report.write_page(tmp_path, write_run(tmp_path, result, grids))
    return tmp_path


def test_the_numbers_on_the_page_and_in_the_csv_are_those_of_the_report(result, folder):
    page = Numbers((folder / "report.html").read_text())
    by_heading = {column.heading: column for column in columns(result)}
    seen = 0
    for headings, body in page.tables[:2]:
        for row in body:
            entry = dict(rows(result))[row[0][0]]
            for (heading, *_), (text, value, _) in zip(headings[1:], row[1:], strict=True):
                expected = number(entry, by_heading[heading])
                assert (None if value is None else float(value)) == expected
                assert (text == "–") == (expected is None)
                seen += 1
    assert seen == 5 * 8 + 4 * 5  # metrics of five rows, costs of four
    found = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert [row["stage"] for row in found] == [name for name, _ in rows(result)]
    assert float(found[-1]["fid"]) == 155.1 and found[0]["psnr"] == ""


def test_the_page_needs_nothing_else(folder):
    page = (folder / "report.html").read_text()
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!data:)', markup) and "url(" not in markup
    assert "<script src" not in page and len(page) < 3e6


def test_the_best_is_marked_only_beyond_the_noise(result, folder):
    page = Numbers((folder / "report.html").read_text())
    marked = {
        (row[0][0], heading[0])
        for headings, body in page.tables[:2]
        for row in body
        for heading, cell in zip(headings, row, strict=True)
        if cell[2] == "best"
    }
    assert ("quantize", "on disk (MB)") in marked and ("distill", "latency (ms)") in marked
    assert not {name for name, heading in marked if heading in ("FID ↓", "parameters (M)", "peak memory (MB)")}
    fid = next(column for column in columns(result) if column.key == "fid")
    students = result["stages"]
    for value, winner in ((153.2 + 7.0, []), (153.2 + 7.2, [1])):  # 5 and 5 draw a circle of 7.07
        students[2]["metrics"]["fid"] = metric(value, 5.0, "inception-2015-12-05")
        assert best(fid, students) == winner


def test_a_front_leaves_out_what_is_beaten_in_both(result):
    found = {(front.cost.key, front.quality.key): front for front in fronts(lines(result))}
    kept = {s.name for s in found["bytes", "fid"].spots if not s.dominated}
    assert kept == {"teacher", "quantize", "distill"}  # prune has distill's size and a larger FID
    assert {s.name for s in found["latency_s", "psnr"].spots} == {"prune", "distill", "quantize"}
    assert found["latency_s", "psnr"].floor == 9.0 and len(found) == 4
    assert not is_dominated((1, 1), [(1, 1), (0.5, 2)]) and is_dominated((1, 1), [(1, 0.5)])


def test_names_stay_inside_of_their_chart(result):
    front = next(found for found in fronts(lines(result)) if found.cost.key == "bytes")
    names = ["losses=" + "noise_1.0_" * 5 + end for end in "abcd"]
    front = replace(front, spots=tuple(map(lambda s, name: replace(s, name=name), front.spots, names)))
    source = next(s.data for s in front_chart(front).select(ColumnDataSource) if "label" in s.data)
    assert [text[0] + text[-1] for text in source["label"] if text] and {len(text) for text in source["label"]} <= {
        0,
        34,
    }
    right = [place for place, side in enumerate(source["side"]) if side == "right"]
    assert max(range(4), key=lambda place: source["x"][place]) in right and len(right) < 4
    assert all((source["beside"][place] < 0) == (place in right) for place in range(4))


def test_each_curve_is_named_below_its_chart(folder):
    page = (folder / "report.html").read_text()
    assert [name for name, *_ in curve_styles({"loss": [], "output": []})] == ["loss", "output"]
    assert re.search(r'<i style="border-top: 2px solid #\w{6}"></i>loss</span>', page)


def test_the_page_of_costs_alone_has_no_charts(result, tmp_path):
    for row in (result["teacher"], *result["stages"]):
        row["metrics"] = {}
        row["curves"] = {}
    del result["noise_floor"]
    report.write_page(tmp_path, write_run(tmp_path, result, {}))
    page = (tmp_path / "report.html").read_text()
    assert "Bokeh" not in page and len(page) < 50_000 and "7.10" in page


def test_the_page_in_a_browser(folder):
    with chromium() as browser:
        browser.get((folder / "report.html").as_uri())
        find = browser.find_elements
        assert all(image.get_property("naturalWidth") for image in find("css selector", "table.pictures img"))
        assert len(find("css selector", "table.pictures img")) == 12

        def column(place):
            return [
                cell.text.split()[0] for cell in find("css selector", f"#numbers table tbody tr td:nth-child({place})")
            ]

        sizes = [float(text) for text in column(4)[:4]]
        button = find("css selector", "#numbers thead th:nth-child(4) button")[0]
        button.click()
        assert [float(text) for text in column(4)[:4]] == sorted(sizes) != sizes
        button.click()
        assert [float(text) for text in column(4)[:4]] == sorted(sizes, reverse=True)

        cut = "return getComputedStyle(document.getElementById('above')).clipPath"
        before = browser.execute_script(cut)
        slide = find("id", "slide")[0]
        slide.send_keys("\ue012" * 5)  # the left arrow
        assert browser.execute_script(cut) != before and slide.get_property("value") == "45"
        sources = "return ['above', 'below'].map((id) => document.getElementById(id).src)"
        first = browser.execute_script(sources)
        assert first[0] != first[1]
        find("css selector", "#prompt option")[2].click()
        assert not set(first) & set(browser.execute_script(sources))
        drawn = "return [...document.querySelectorAll('[data-root-id]')].map((e) => !!e.firstElementChild.shadowRoot)"
        assert browser.execute_script(drawn) == [True] * 5
        browser.set_window_size(400, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not [line for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def compiles(folder: Path) -> None:
    """Runs pdflatex over ``report.tex`` of the folder, or skips the test."""
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex")
    whole = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx}\\begin{document}"
    (folder / "whole.tex").write_text(f"{whole}\\input{{report.tex}}\\end{{document}}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "whole.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow  # LaTeX takes its time
def test_the_latex_compiles(result, grids, tmp_path):
    result["stages"][0]["name"] = "50 % & [x]_y#1 ~ ü ∑"
    report.write_page(tmp_path, write_run(tmp_path, result, grids))
    compiles(tmp_path)
    text = (tmp_path / "report.tex").read_text()
    assert r"50 \% \& [x]\_y\#1" in text and r"155.1 {\scriptsize [150.1, 160.1]}" in text
