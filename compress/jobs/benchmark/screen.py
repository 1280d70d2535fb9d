"""Prints the result of a benchmark."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.jobs.benchmark.table import cells, headings, marks, notes, unmeasured, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from compress.jobs.benchmark.job import Job

TITLE = 10  # characters per line of a heading, unless a word is longer
NAME = 20  # smallest width of a row's name in characters
# Columns left out on a narrow screen, in this order; the report has them all.
EXPENDABLE = ("SSIM", "score", "images/s")


def print_end(result: Mapping[str, Any], job: "Job", console: "Console") -> None:
    """Prints the table, the best row with its code, and the paths."""
    head = headings(result)
    shown = list(range(len(head)))
    for word in EXPENDABLE:
        if _width(result, shown, console) > console.width:
            shown = [index for index in shown if word not in head[index]]
    console.print(_table(result, shown))
    hidden = [head[index] for index in range(len(head)) if index not in shown]
    left_out = [f"The screen is too narrow for {', '.join(hidden)}: see report.md."] if hidden else []
    for line in (*unmeasured(result), *notes(result), *left_out):
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"\n{verdict(result)}\n", style="bold", markup=False, highlight=False)
    if result["code"]:
        console.print(result["code"], markup=False, highlight=False, soft_wrap=True)
    found = sum(row["cached"] for row in result["rows"])
    where = {
        "report": str(job.out / "report.md"),
        "store": f"{job.store} ({found} of {len(result['rows'])} rows were there)",
        "time": f"{result['seconds']:.0f} s",
    }
    for name, value in where.items():
        console.print(f"{name:11}{value}", markup=False, highlight=False, soft_wrap=True)


def _table(result: Mapping[str, Any], shown: Sequence[int]) -> "Table":
    """The measured rows with some columns; an interval is below its number."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    head, rows = headings(result), [row for row in result["rows"] if row["status"] == "measured"]
    written = [["\n".join(filter(None, cell)) for cell in cells(result, row)] for row in rows]
    for index in shown:
        if index == 0:
            table.add_column(head[0], min_width=NAME)
            continue
        title = "\n".join(textwrap.wrap(head[index], TITLE, break_long_words=False, break_on_hyphens=False))
        # Otherwise rich cuts numbers off.
        wide = max(
            cell_len(line) for text in (title, *(row[index - 1] for row in written)) for line in text.split("\n")
        )
        table.add_column(title, justify="right", no_wrap=True, min_width=wide)
    for row, texts in zip(rows, written, strict=True):
        name = Text(row["name"], style="bold" if row["name"] == result["best"] else "")
        line = [name.append(f" {marks(result, row)}")]
        for text in texts:
            value, below, interval = text.partition("\n")
            line.append(Text(value).append(below + interval, style="dim"))
        table.add_row(*(line[index] for index in shown))
    return table


def _width(result: Mapping[str, Any], shown: Sequence[int], console: "Console") -> int:
    """The smallest width of the table with these columns."""
    return console.measure(_table(result, shown), options=console.options.update(max_width=10_000)).minimum
