"""The table of a run: teacher and stages by row, cost and quality by column, each number with its interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.report.footer import NO_NEARER, NOISE, NOISE_FLOOR, footer, values
from compress.report.formats import MISSING, Cell, Table, markdown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


Entry = Mapping[str, Any]


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
        needs: A cost that some row has to have for this one to be shown.
        ratio: Whether a cost is written as a multiple of the teacher's too.
        bounds: What the stored number cannot leave.
    """

    group: str
    key: str
    title: str
    scale: float = 1.0
    digits: int | None = None
    better: str = ""
    ends: tuple[str, str] = ("", "")
    paired: bool = False
    needs: str = ""
    ratio: bool = True
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better values, before the unit."""
        name, space, unit = self.title.partition(" (")
        return name + {"down": " ↓", "up": " ↑", "": ""}[self.better] + space + unit


COST = (
    Column("cost", "params", "parameters (M)", 1e-6),
    Column("cost", "macs", "MACs (G)", 1e-9),
    Column("cost", "macs_without_attention", "MACs without attention (G)", 1e-9),
    Column("cost", "bytes", "on disk (MB)", 1e-6),
    Column("cost", "sparsity", "zeros (%)", 100, digits=1, needs="sparse_bytes", ratio=False),
    Column("cost", "sparse_bytes", "stored sparse (MB)", 1e-6),
    Column("cost", "memory_bytes", "in memory (MB)", 1e-6),
    Column("cost", "peak_memory_bytes", "peak memory (MB)", 1e-6),
    Column("cost", "latency_s", "latency (ms)", 1e3, ends=("latency_low_s", "latency_high_s")),
    Column(
        "cost", "compiled_latency_s", "compiled (ms)", 1e3, ends=("compiled_latency_low_s", "compiled_latency_high_s")
    ),
    Column("cost", "image_latency_s", "image (s)", ends=("image_latency_low_s", "image_latency_high_s")),
)
SHARE = (0.0, 1.0)
SETS = (
    Column("metrics", "fid", "FID", digits=1, better="down"),
    Column("metrics", "fid.infinite", "FID∞", digits=1, better="down"),
    Column("metrics", "kid", "KID", digits=4, better="down"),
    Column("metrics", "cmmd", "CMMD", digits=3, better="down"),
    Column("metrics", "precision", "precision", digits=3, better="up", bounds=SHARE),
    Column("metrics", "recall", "recall", digits=3, better="up", bounds=SHARE),
)
TEXT = (
    Column("metrics", "clip_score", "CLIP score", digits=2, better="up"),
    Column("metrics", "r_at_1", "R@1 (%)", 100, digits=1, better="up", bounds=SHARE),
    Column("metrics", "r_at_5", "R@5 (%)", 100, digits=1, better="up", bounds=SHARE),
)
PAIRED = (
    Column("metrics", "fid_teacher", "FID to teacher", digits=1, better="down", paired=True),
    Column("metrics", "psnr", "PSNR (dB)", digits=2, better="up", paired=True),
    Column("metrics", "ssim", "SSIM", digits=3, better="up", paired=True),
    Column("metrics", "ms_ssim", "MS-SSIM", digits=3, better="up", paired=True),
    Column("metrics", "lpips", "LPIPS", digits=3, better="down", paired=True),
    Column("metrics", "latent_psnr", "latent PSNR (dB)", digits=2, better="up", paired=True),
)
METRICS = (*SETS, *TEXT, *PAIRED)


@dataclass(frozen=True)
class Line:
    """A row of a table and what it is held against.

    Attributes:
        name: Of the row.
        entry: ``cost`` and ``metrics``.
        teacher: The entry of its teacher; empty if there is none.
        floor: The entry of that teacher with other seeds; empty if there is none.
    """

    name: str
    entry: Entry
    teacher: Entry
    floor: Entry

    @property
    def is_student(self) -> bool:
        """Whether it is neither the teacher nor the noise floor."""
        return self.entry is not self.teacher and self.entry is not self.floor


def lines(result: Entry) -> list[Line]:
    """The rows of a report as lines."""
    teacher, floor = result.get("teacher") or {}, result.get("noise_floor") or {}
    return [Line(name, entry, teacher, floor) for name, entry in rows(result)]


def rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and entry (``cost``, ``metrics``) of the teacher, the noise floor, each stage and the last one's engine."""
    found = [("teacher", result["teacher"])] if result.get("teacher") else []
    found += [(NOISE_FLOOR, result["noise_floor"])] if result.get("noise_floor") else []
    last = [result["accelerated"]] if result.get("accelerated") else []
    return found + [(stage["name"], stage) for stage in (*result.get("stages", []), *last)]


def columns(result: Mapping[str, Any]) -> list[Column]:
    """The columns that hold a number in some row of a report; see :func:`columns_of`."""
    return columns_of([entry for _, entry in rows(result)])


def columns_of(entries: Sequence[Entry]) -> list[Column]:
    """The columns that hold a number in some entry; metrics this module does not know stand before the paired ones."""
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
    return Column("metrics", name, name.replace("_", " "), digits=3, better="down" if distance else "up")


def number(entry: Mapping[str, Any], column: Column, part: str = "value") -> float | None:
    """The finite number of an entry in the stored unit, or None; ``part`` may be ``"low"`` or ``"high"``."""
    group = entry.get(column.group) or {}
    key, _, inner = column.key.partition(".")
    found = group.get(key)
    if inner:  # a number beside another metric's value, without an interval
        found = found.get(inner) if isinstance(found, Mapping) and part == "value" else None
    if isinstance(found, Mapping):
        found = found.get(part)
    elif part != "value":
        found = group.get(column.ends[part == "high"])
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def plain_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of bare numbers of a report; see :func:`plain_lines`."""
    return plain_lines(lines(result))


def plain_lines(found: Sequence[Line]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of bare numbers in the stored units, each metric followed by its interval's ends."""
    shown = columns_of([line.entry for line in found])
    ranged = [c for c in shown if c.group == "metrics" and "." not in c.key or any(c.ends)]
    parts = [(c, part) for c in shown for part in (("value", "low", "high") if c in ranged else ("value",))]
    keys = {c: c.key.replace(".", "_") for c in shown}
    headings = ["stage"] + [keys[c] if part == "value" else f"{keys[c]}_{part}" for c, part in parts]
    return headings, [[line.name] + [number(line.entry, c, part) for c, part in parts] for line in found]


def cell(entry: Entry, column: Column, teacher: Entry, floor: Entry) -> Cell:
    """An entry's number as written, with its ratio to the teacher's and its mark."""
    value = number(entry, column)
    if value is None:
        return Cell()
    low, high = number(entry, column, "low"), number(entry, column, "high")
    reference = number(teacher, column)
    interval = ratio = ""
    if low is not None and high is not None:
        interval = f"[{written(low, column)}, {written(high, column)}]"
    if column.group == "cost" and column.ratio and reference and entry is not teacher:
        ratio = f"{value / reference:.2f}x"
    return Cell(written(value, column), interval, ratio, mark(entry, column, teacher, floor), number=value)


def mark(entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any], floor: Mapping[str, Any]) -> str:
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


def written(value: float, column: Column) -> str:
    """A number in the column's unit, with the column's decimals."""
    return significant(value, column) if column.digits is None else f"{value * column.scale:.{column.digits}f}"


def notes(result: Entry) -> list[str]:
    """What the numbers mean and how they were measured; one sentence each."""
    return notes_of(lines(result), result.get("manifest"))


def notes_of(found: Sequence[Line], manifest: Entry | None, marked: bool = True) -> list[str]:
    """The same for rows of several reports that were measured in the same way, perhaps in tables without marks."""
    shown = columns_of([line.entry for line in found])
    titles = {column.key: column.title for column in shown if column.group == "metrics"}
    marks = {mark(line.entry, column, line.teacher, line.floor) for line in found for column in shown if marked}
    return footer([(line.name, line.entry) for line in found], titles, marks, manifest)


def markdown_table(result: Mapping[str, Any]) -> str:
    """The tables of cost and of quality and the notes below them, as Markdown."""
    return wide_tables(result) + "\n" + markdown_notes(result)


def markdown_notes(result: Mapping[str, Any]) -> str:
    """The notes as a Markdown list."""
    return "".join(f"- {line}\n" for line in notes(result))


def wide_tables(result: Entry) -> str:
    """All numbers: the tables of cost and of quality as Markdown."""
    return "".join(f"{markdown(table)}\n" for table in tables(lines(result)))


def tables(found: Sequence[Line], first: str = "stage") -> list[Table]:
    """The tables of cost and of quality; each has the rows that hold some number of its.

    Args:
        found: The rows.
        first: Heading of their names.
    """
    made = []
    for group, title in (("cost", "Cost"), ("metrics", "Quality")):
        shown = [column for column in columns_of([line.entry for line in found]) if column.group == group]
        there = [line for line in found if any(number(line.entry, column) is not None for column in shown)]
        body = tuple((line.name, tuple(cell(line.entry, c, line.teacher, line.floor) for c in shown)) for line in there)
        if shown:
            made.append(Table(title, (first, *(column.heading for column in shown)), body))
    return made


def summary_metrics(result: Mapping[str, Any]) -> list[Column]:
    """One column each of a distance between sets, of a score of the captions, and of what compares with the teacher."""
    shown = [column for column in columns(result) if column.group == "metrics"]
    sets = [column for column in shown if not column.paired and column.better == "down"]
    scores = [column for column in shown if not column.paired and column.better == "up"]
    text = [column for column in scores if column not in SETS]
    paired = [column for column in PAIRED[1:] + PAIRED[:1] if column in shown]  # PSNR before FID to the teacher
    return [*sets[:1], *(text or scores)[:1], *paired[:1]]


def summary_table(result: Mapping[str, Any]) -> str:
    """The short table as Markdown."""
    headings, lines = _summary(result)
    texts = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for name, *row in lines:
        written = [f"{value} {below if '[' in below else f'({below})'}" if below else value for value, below in row]
        texts.append("| " + " | ".join([name[0].replace("|", "\\|"), *written]) + " |")
    return "\n".join(texts) + "\n"


def print_summary(result: Mapping[str, Any], console: "Console") -> None:
    """Prints the short table; it fits 80 columns, and on fewer the intervals are left out."""
    headings, lines = _summary(result)
    table = _rich(headings, lines, intervals=True)
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table = _rich(headings, lines, intervals=False)
    console.print(table)


Two = tuple[str, str]  # what a cell of the short table says, and what stands below it, smaller


def _summary(result: Mapping[str, Any]) -> tuple[list[str], list[list[Two]]]:
    """Headings and rows of the short table: size and speed as multiples of the teacher's, three metrics, intervals."""
    teacher, floor = result.get("teacher") or {}, result.get("noise_floor") or {}
    shown = columns(result)
    metrics = summary_metrics(result)
    costs = [column for column in shown if column.key in ("params", "bytes", "latency_s")]
    if not metrics:  # then there is room
        costs = [
            column for column in shown if column.key in ("params", "macs", "bytes", "peak_memory_bytes", "latency_s")
        ]
    lines = []
    for name, entry in rows(result):
        line: list[Two] = [(name, "")]
        line += [_summary_cost(cell(entry, column, teacher, floor), entry, column, teacher) for column in costs]
        line += [_summary_metric(entry, column, teacher, floor) for column in metrics]
        lines.append(line)
    titles = {"params": "params", "bytes": "size", "peak_memory_bytes": "memory", "latency_s": "speed"}
    named = [titles.get(column.key, column.title.partition(" (")[0]) for column in costs]
    return ["stage", *named, *(column.heading for column in metrics)], lines


def _summary_cost(cell: Cell, entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any]) -> Two:
    if cell.value == MISSING:
        return MISSING, ""
    unit = column.title.rpartition("(")[2].rstrip(")")
    absolute, ratio = f"{cell.value} {unit}", cell.ratio
    if column.key != "latency_s":
        return absolute, ratio
    ours, theirs = number(entry, column), number(teacher, column)
    return (f"{theirs / ours:.2f}x{cell.mark}", absolute) if ours and theirs else (absolute, "")


def _summary_metric(
    entry: Mapping[str, Any], column: Column, teacher: Mapping[str, Any], floor: Mapping[str, Any]
) -> Two:
    value, low, high = (number(entry, column, part) for part in ("value", "low", "high"))
    if value is None:
        return MISSING, ""
    interval = "" if low is None or high is None else f"[{significant(low, column)}, {significant(high, column)}]"
    return significant(value, column) + mark(entry, column, teacher, floor), interval


def significant(value: float, column: Column) -> str:
    """A number to three significant digits in the column's unit, with no more decimals than the column has."""
    decimals = 2 - math.floor(math.log10(abs(value * column.scale))) if value else 0
    return f"{value * column.scale:.{min(max(decimals, 0), 6 if column.digits is None else column.digits)}f}"


def _rich(headings: Sequence[str], lines: Sequence[Sequence[Two]], intervals: bool) -> "RichTable":
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    table = rich_table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(headings[0], overflow="fold", style="bold", max_width=16)
    for heading in headings[1:]:
        short = heading.replace(" score", "\nscore").replace(" (", "\n(")
        table.add_column(short, justify="right", overflow="fold", max_width=14)
    for line in lines:
        texts = [Text(value).append(f"\n{below}" if below and intervals else "", style="dim") for value, below in line]
        table.add_row(*texts)
    return table
