"""The table of a run: teacher and stages by row, cost and quality by column, each number with its interval."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.report.footer import NO_NEARER, NOISE, NOISE_FLOOR, footer, values

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
        paired: Whether it compares with the teacher's image of the same prompt and noise.
        screen: Whether it is shown on the screen too, which is narrow.
        needs: A cost that some row has to have for this one to be shown.
        ratio: Whether a cost is written as a multiple of the teacher's too.
    """

    group: str
    key: str
    title: str
    scale: float = 1.0
    digits: int | None = None
    better: str = ""
    ends: tuple[str, str] = ("", "")
    paired: bool = False
    screen: bool = True
    needs: str = ""
    ratio: bool = True

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better values, before the unit."""
        name, space, unit = self.title.partition(" (")
        return name + {"down": " ↓", "up": " ↑", "": ""}[self.better] + space + unit


COST = (
    Column("cost", "params", "parameters (M)", 1e-6),
    Column("cost", "macs", "MACs (G)", 1e-9),
    Column("cost", "macs_without_attention", "MACs without attention (G)", 1e-9, screen=False),
    Column("cost", "bytes", "on disk (MB)", 1e-6),
    Column("cost", "sparsity", "zeros (%)", 100, digits=1, needs="sparse_bytes", ratio=False),
    Column("cost", "sparse_bytes", "stored sparse (MB)", 1e-6),
    Column("cost", "memory_bytes", "in memory (MB)", 1e-6, screen=False),
    Column("cost", "peak_memory_bytes", "peak memory (MB)", 1e-6),
    Column("cost", "latency_s", "latency (ms)", 1e3, ends=("latency_low_s", "latency_high_s")),
    Column(
        "cost", "compiled_latency_s", "compiled (ms)", 1e3, ends=("compiled_latency_low_s", "compiled_latency_high_s")
    ),
    Column("cost", "image_latency_s", "image (s)", ends=("image_latency_low_s", "image_latency_high_s")),
)
SETS = (
    Column("metrics", "fid", "FID", digits=1, better="down"),
    Column("metrics", "fid.infinite", "FID∞", digits=1, better="down", screen=False),
    Column("metrics", "kid", "KID", digits=4, better="down"),
    Column("metrics", "cmmd", "CMMD", digits=3, better="down", screen=False),
    Column("metrics", "precision", "precision", digits=3, better="up", screen=False),
    Column("metrics", "recall", "recall", digits=3, better="up", screen=False),
)
TEXT = (
    Column("metrics", "clip_score", "CLIP score", digits=2, better="up"),
    Column("metrics", "r_at_1", "R@1 (%)", 100, digits=1, better="up"),
    Column("metrics", "r_at_5", "R@5 (%)", 100, digits=1, better="up", screen=False),
)
PAIRED = (
    Column("metrics", "fid_teacher", "FID to teacher", digits=1, better="down", paired=True),
    Column("metrics", "psnr", "PSNR (dB)", digits=2, better="up", paired=True),
    Column("metrics", "ssim", "SSIM", digits=3, better="up", paired=True),
    Column("metrics", "ms_ssim", "MS-SSIM", digits=3, better="up", paired=True, screen=False),
    Column("metrics", "lpips", "LPIPS", digits=3, better="down", paired=True),
    Column("metrics", "latent_psnr", "latent PSNR (dB)", digits=2, better="up", paired=True, screen=False),
)
METRICS = (*SETS, *TEXT, *PAIRED)


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        value: The number as written.
        interval: ``"[low, high]"`` or empty.
        ratio: Share of the teacher's number, ``"0.58x"``, or empty.
        mark: Whether the difference from the teacher, or from the teacher with other seeds, lies inside the noise:
            :data:`NOISE`, :data:`NO_NEARER` or empty.
    """

    value: str = MISSING
    interval: str = ""
    ratio: str = ""
    mark: str = ""

    def line(self) -> str:
        """The cell in one line."""
        parts = (self.value + self.mark, self.interval, self.ratio and f"({self.ratio})")
        return " ".join(part for part in parts if part)


def rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and entry (``cost``, ``metrics``) of the teacher, the noise floor and each stage."""
    found = [("teacher", result["teacher"])] if result.get("teacher") else []
    found += [(NOISE_FLOOR, result["noise_floor"])] if result.get("noise_floor") else []
    return found + [(stage["name"], stage) for stage in result.get("stages", [])]


def columns(result: Mapping[str, Any]) -> list[Column]:
    """The columns that hold a number in some row; metrics this module does not know stand before the paired ones."""
    entries = [entry for _, entry in rows(result)]
    known = {column.key for column in METRICS}
    names = list(dict.fromkeys(name for entry in entries for name in entry.get("metrics") or {}))
    others = [_unknown(name) for name in names if name not in known]
    every = (*COST, *SETS, *TEXT, *others, *PAIRED)
    costs = {name for entry in entries for name, value in (entry.get("cost") or {}).items() if value is not None}
    found = [
        column
        for column in every
        if (not column.needs or column.needs in costs) and any(number(entry, column) is not None for entry in entries)
    ]
    network = values(entries, "network", ("clip_score",))
    if network:  # a CLIP score means nothing without the name of its network
        found = [replace(c, title=f"{network[0]} score") if c.key == "clip_score" else c for c in found]
    return found


def _unknown(name: str) -> Column:
    """The column of a metric that a recipe named: an encoder's distance, which is better when small, or a score."""
    distance = name.startswith(("fd_", "mmd_"))
    return Column(
        "metrics", name, name.replace("_", " "), digits=3, better="down" if distance else "up", screen=not distance
    )


def number(entry: Mapping[str, Any], column: Column, part: str = "value") -> float | None:
    """The finite number of an entry in the stored unit, or None; ``part`` may be ``"low"`` or ``"high"``."""
    group = entry.get(column.group) or {}
    key, _, inner = column.key.partition(".")
    found = group.get(key)
    if inner:  # a number beside another metric's value, which has no interval of its own
        found = found.get(inner) if isinstance(found, Mapping) and part == "value" else None
    if isinstance(found, Mapping):
        found = found.get(part)
    elif part != "value":
        found = group.get(column.ends[part == "high"])
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def plain_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of bare numbers in the stored units, each metric followed by its interval's ends."""
    shown = columns(result)
    ranged = [c for c in shown if c.group == "metrics" and "." not in c.key or any(c.ends)]
    parts = [(c, part) for c in shown for part in (("value", "low", "high") if c in ranged else ("value",))]
    keys = {c: c.key.replace(".", "_") for c in shown}
    headings = ["stage"] + [keys[c] if part == "value" else f"{keys[c]}_{part}" for c, part in parts]
    return headings, [[name] + [number(entry, c, part) for c, part in parts] for name, entry in rows(result)]


def cells(result: Mapping[str, Any], shown: Sequence[Column]) -> list[list[Cell]]:
    """The written numbers, by row and column."""
    teacher, floor = result.get("teacher") or {}, result.get("noise_floor") or {}
    return [[_cell(entry, column, teacher, floor) for column in shown] for _, entry in rows(result)]


def _cell(entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any], floor: Mapping[str, Any]) -> Cell:
    value = number(entry, column)
    if value is None:
        return Cell()
    low, high = number(entry, column, "low"), number(entry, column, "high")
    reference = number(teacher, column)
    interval = ratio = ""
    if low is not None and high is not None:
        interval = f"[{_written(low, column)}, {_written(high, column)}]"
    if column.group == "cost" and column.ratio and reference and entry is not teacher:
        ratio = f"{value / reference:.2f}x"
    return Cell(_written(value, column), interval, ratio, _mark(entry, column, teacher, floor))


def _mark(entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any], floor: Mapping[str, Any]) -> str:
    """Whether chance alone may explain an entry's difference from the row it is held against, as of independent draws.

    That is the teacher; of what compares images with the teacher's own, the teacher with other seeds.
    """
    other = floor if column.paired else teacher
    if entry is other or entry is teacher:
        return ""
    parts = [{part: number(row, column, part) for part in ("value", "low", "high")} for row in (entry, other)]
    if any(value is None for part in parts for value in part.values()):
        return ""
    from compress.evaluate.intervals import difference

    ours, theirs = parts
    further = ours["value"] - theirs["value"]  # type: ignore[operator]
    if column.paired:
        nearer = further if column.better == "up" else -further
        return NO_NEARER if nearer <= difference(ours, theirs) else ""
    return NOISE if abs(further) <= difference(ours, theirs) else ""


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
    marks = {cell.mark for row in cells(result, shown) for cell in row}
    return footer(rows(result), titles, marks, result.get("manifest"))


def markdown_table(result: Mapping[str, Any]) -> str:
    """The tables of cost and of quality and their footer as Markdown."""
    shown = columns(result)
    written = cells(result, shown)
    lines = []
    for group in ("cost", "metrics"):
        places = [index for index, column in enumerate(shown) if column.group == group]
        if not places:
            continue
        lines.append("| " + " | ".join(["stage", *(shown[index].heading for index in places)]) + " |")
        lines.append("|---|" + "---:|" * len(places))
        for (name, entry), row in zip(rows(result), written, strict=True):
            if entry.get(group):
                texts = [row[index].line() for index in places]
                lines.append("| " + " | ".join([name.replace("|", "\\|"), *texts]) + " |")
        lines.append("")
    return "\n".join(lines) + "\n" + "\n".join(f"- {line}" for line in notes(result)) + "\n"


def print_table(result: Mapping[str, Any], console: "Console") -> None:
    """Prints the main columns and the footer; where one table is too wide, cost and quality are tables of their own."""
    every = columns(result)
    shown = [column for column in every if column.screen]
    written = cells(result, shown)
    pieces = [list(range(len(shown)))]
    if _width(_rich(result, shown, written, pieces[0]), console) > console.width:
        groups = [
            [index for index, column in enumerate(shown) if (column.group, column.paired) == group]
            for group in (("cost", False), ("metrics", False), ("metrics", True))
        ]
        pieces = [piece for group in groups for piece in _fitting(result, shown, written, group, console)]
    for piece in pieces:
        console.print(_rich(result, shown, written, piece))
    hidden = ", ".join(column.title for column in every if not column.screen)
    for line in [*notes(result), *([f"The report has besides: {hidden}."] if hidden else [])]:
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
    groups = {shown[index].group for index in piece}
    for (name, entry), row in zip(rows(result), written, strict=True):
        if not any(entry.get(group) for group in groups):
            continue  # the noise floor has no cost of its own
        texts = []
        for cell in (row[index] for index in piece):
            text = Text(cell.value + cell.mark)
            below = cell.ratio or cell.interval
            texts.append(text.append(f"\n{below}", style="dim") if below else text)
        table.add_row(Text(name), *texts)
    return table
