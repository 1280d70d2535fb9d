"""The table of a run: teacher and stages by row, cost and quality by column, each number with its interval."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.report.footer import NOISE, footer, values

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: where its number stands and how it is written.

    Attributes:
        group: ``"cost"`` or ``"metrics"``.
        key: Name within the group.
        title: Heading, with the unit.
        scale: Factor from the stored unit to the written one.
        digits: Decimals; None writes three significant digits.
        better: ``"down"``, ``"up"`` or ``""``: where the better values are.
        ends: Keys of the interval's ends, for a cost; a metric has its own ``low`` and ``high``.
    """

    group: str
    key: str
    title: str
    scale: float = 1.0
    digits: int | None = None
    better: str = ""
    ends: tuple[str, str] = ("", "")

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better values, before the unit."""
        name, space, unit = self.title.partition(" (")
        return name + {"down": " ↓", "up": " ↑", "": ""}[self.better] + space + unit


COST = (
    Column("cost", "params", "parameters (M)", 1e-6),
    Column("cost", "macs", "MACs (G)", 1e-9),
    Column("cost", "bytes", "on disk (MB)", 1e-6),
    Column("cost", "latency_s", "latency (ms)", 1e3, ends=("latency_low_s", "latency_high_s")),
    Column("cost", "peak_memory_bytes", "peak memory (MB)", 1e-6),
)
METRICS = (
    Column("metrics", "fid", "FID", digits=1, better="down"),
    Column("metrics", "kid", "KID", digits=4, better="down"),
    Column("metrics", "clip_score", "CLIP score", digits=2, better="up"),
    Column("metrics", "psnr", "PSNR (dB)", digits=2, better="up"),
    Column("metrics", "ssim", "SSIM", digits=3, better="up"),
)


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        value: The number as written.
        interval: ``"[low, high]"`` or empty.
        ratio: Share of the teacher's number, ``"0.58x"``, or empty.
        noise: Whether the interval overlaps that of the row above.
    """

    value: str = MISSING
    interval: str = ""
    ratio: str = ""
    noise: bool = False

    def line(self) -> str:
        """The cell in one line."""
        parts = (self.value + (NOISE if self.noise else ""), self.interval, self.ratio and f"({self.ratio})")
        return " ".join(part for part in parts if part)


def rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and entry (``cost``, ``metrics``) of the teacher and each stage."""
    teacher = [("teacher", result["teacher"])] if result.get("teacher") else []
    return teacher + [(stage["name"], stage) for stage in result.get("stages", [])]


def columns(result: Mapping[str, Any]) -> list[Column]:
    """The columns that hold a number in some row; metrics this module does not know come last."""
    entries = [entry for _, entry in rows(result)]
    known = {column.key for column in METRICS}
    names = list(dict.fromkeys(name for entry in entries for name in entry.get("metrics") or {}))
    others = [Column("metrics", name, name.replace("_", " "), digits=3) for name in names if name not in known]
    found = [
        column for column in (*COST, *METRICS, *others) if any(number(entry, column) is not None for entry in entries)
    ]
    network = values(entries, "network", ("clip_score",))
    if network:  # a CLIP score means nothing without the name of its network
        found = [replace(c, title=f"{network[0]} score") if c.key == "clip_score" else c for c in found]
    return found


def number(entry: Mapping[str, Any], column: Column, part: str = "value") -> float | None:
    """The finite number of an entry in the stored unit, or None; ``part`` may be ``"low"`` or ``"high"``."""
    group = entry.get(column.group) or {}
    found = group.get(column.key)
    if isinstance(found, Mapping):
        found = found.get(part)
    elif part != "value":
        found = group.get(column.ends[part == "high"])
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def plain_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of bare numbers in the stored units, each metric followed by its interval's ends."""
    shown = columns(result)
    ranged = [c for c in shown if c.group == "metrics" or any(c.ends)]
    parts = [(c, part) for c in shown for part in (("value", "low", "high") if c in ranged else ("value",))]
    headings = ["stage"] + [c.key if part == "value" else f"{c.key}_{part}" for c, part in parts]
    return headings, [[name] + [number(entry, c, part) for c, part in parts] for name, entry in rows(result)]


def cells(result: Mapping[str, Any], shown: Sequence[Column]) -> list[list[Cell]]:
    """The written numbers, by row and column."""
    entries = [entry for _, entry in rows(result)]
    teacher = result.get("teacher") or {}
    table = []
    for index, entry in enumerate(entries):
        above = entries[index - 1] if index else {}
        table.append([_cell(entry, column, teacher, above) for column in shown])
    return table


def _cell(entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any], above: Mapping[str, Any]) -> Cell:
    value = number(entry, column)
    if value is None:
        return Cell()
    low, high = number(entry, column, "low"), number(entry, column, "high")
    reference = number(teacher, column)
    interval = ratio = ""
    if low is not None and high is not None:
        interval = f"[{_written(low, column)}, {_written(high, column)}]"
    if column.group == "cost" and reference and entry is not teacher:
        ratio = f"{value / reference:.2f}x"
    before = number(above, column, "low"), number(above, column, "high")
    noise = None not in (low, high, *before) and low <= before[1] and before[0] <= high  # type: ignore[operator]
    return Cell(_written(value, column), interval, ratio, noise)


def _written(value: float, column: Column) -> str:
    value *= column.scale
    if column.digits is not None:
        return f"{value:.{column.digits}f}"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(decimals, 0), 6)}f}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """The lines below the table."""
    shown = columns(result)
    titles = {column.key: column.title for column in shown if column.group == "metrics"}
    noise = any(cell.noise for row in cells(result, shown) for cell in row)
    return footer(rows(result), titles, noise)


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table and its footer as Markdown."""
    shown = columns(result)
    head = ["stage", *(column.heading for column in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(shown)]
    for (name, _), row in zip(rows(result), cells(result, shown), strict=True):
        lines.append("| " + " | ".join([name.replace("|", "\\|"), *(cell.line() for cell in row)]) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in notes(result)) + "\n"


def print_table(result: Mapping[str, Any], console: "Console") -> None:
    """Prints the table and its footer; where one table is too wide, cost and quality become tables of their own."""
    shown = columns(result)
    written = cells(result, shown)
    pieces = [list(range(len(shown)))]
    if _width(_rich(result, shown, written, pieces[0]), console) > console.width:
        by_group = [[i for i, c in enumerate(shown) if c.group == group] for group in ("cost", "metrics")]
        pieces = [piece for group in by_group for piece in _fitting(result, shown, written, group, console)]
    for piece in pieces:
        console.print(_rich(result, shown, written, piece))
    for line in notes(result):
        console.print(line, style="dim", markup=False, highlight=False)


def _fitting(
    result: Mapping[str, Any], shown: Sequence[Column], written: list[list[Cell]], group: list[int], console: "Console"
) -> list[list[int]]:
    """Splits a group of columns into tables that fit the console, filling each from the left."""
    pieces: list[list[int]] = []
    for index in group:
        wider = [*pieces[-1], index] if pieces else []
        if wider and _width(_rich(result, shown, written, wider), console) <= console.width:
            pieces[-1] = wider
        else:
            pieces.append([index])
    return pieces


def _width(table: "Table", console: "Console") -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _rich(
    result: Mapping[str, Any], shown: Sequence[Column], written: list[list[Cell]], piece: Iterable[int]
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    piece = list(piece)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("stage", overflow="fold", style="bold")
    for index in piece:
        # A heading breaks before its unit, or before its last word; numbers are never cut.
        words = shown[index].heading.rsplit(" (", 1) if " (" in shown[index].title else [shown[index].heading]
        table.add_column("\n(".join(words), justify="right", overflow="fold", no_wrap=False)
    for (name, _), row in zip(rows(result), written, strict=True):
        texts = []
        for cell in (row[index] for index in piece):
            text = Text(cell.value + (NOISE if cell.noise else ""))
            below = cell.ratio or cell.interval
            texts.append(text.append(f"\n{below}", style="dim") if below else text)
        table.add_row(Text(name), *texts)
    return table
