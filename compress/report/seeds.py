"""Means over seeds and differences paired by seed, with intervals by Student's t."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.report.best import beyond_noise
from compress.report.footer import NOISE
from compress.report.formats import MISSING, Cell, Table
from compress.report.runs import SEED, Student
from compress.report.table import Column, Entry, Line, columns_of, number, written

PLUS = {True: "+", False: "−"}


@dataclass(frozen=True)
class Series:
    """The same row of runs that differ in nothing but their seed.

    Attributes:
        line: The mean row; of a single run, its row.
        students: The rows by seed.
    """

    line: Line
    students: Mapping[Any, Student]


def all_series(found: Sequence[Student]) -> list[Series]:
    """The rows grouped into series, in the order of their first run."""
    grouped: dict[tuple[str, str, int], list[Student]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for student in found:
        key = (student.run.series, student.part, str(student.run.seed))
        grouped.setdefault((*key[:2], seen[key]), []).append(student)  # the same run once more is another point
        seen[key] += 1
    made = []
    shown = columns_of([student.line.entry for student in found])
    several = columns_of([entry for s in found for entry in (s.line.entry, s.line.teacher, s.line.floor)])
    for members in grouped.values():
        by_seed = {student.run.seed: student for student in members}
        lines = [student.line for student in by_seed.values()]
        if len(lines) == 1:
            line = lines[0]
        else:
            line = Line(
                without_seed(lines[0].name),
                mean([line.entry for line in lines], shown),
                mean([line.teacher for line in lines], several),
                mean([line.floor for line in lines], several),
            )
        made.append(Series(line, by_seed))
    return made


def without_seed(name: str) -> str:
    """A run's name without its seed."""
    kept = re.sub(rf"(^|, ){SEED}=\w+", "", name).removeprefix(", ")
    return f"all{kept}" if kept[:1] in ("", ",", ":") else kept


def student(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, at least two, and half the width of its 95 % interval by Student's t."""
    from scipy.special import stdtrit

    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * spread


def mean(entries: Sequence[Entry], shown: Sequence[Column]) -> Entry:
    """The mean row: each number that all entries have, with its interval where the column has one.

    What else an entry says, such as a metric's network, is the first's, but for what belongs to a seed: the seeds are
    all named, images of one color or equal to the teacher's are added up, and what an interval is of is left out.
    """
    first = entries[0]
    made: dict[str, Any] = {"cost": {}, "metrics": {}}
    for group in made:
        kept = dict(first.get(group) or {})
        made[group] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
    for column in shown:
        values = [number(entry, column) for entry in entries]
        key, _, inner = column.key.partition(".")
        group, there = made[column.group], [value for value in values if value is not None]
        if len(there) < len(entries):
            if not inner:
                group[key] = None
            continue
        value, low, high = _mean(there, column, entries)
        if column.group == "cost":
            group[key] = value
            group |= {end: bound for end, bound in zip(column.ends, (low, high), strict=True) if end}
        elif inner:
            group[key][inner] = value
        else:
            group[key] |= {"value": value, "low": low, "high": high}
    made["cost"]["interval_of"] = "mean over seeds"
    for key, metric in made["metrics"].items():
        if isinstance(metric, dict):
            every = [entry["metrics"][key] for entry in entries if isinstance(entry["metrics"].get(key), Mapping)]
            for name in ("interval", "interval_of", "why"):
                metric.pop(name, None)
            if all("seed" in one for one in every):
                metric["seed"] = ", ".join(str(one["seed"]) for one in every)
            for name in ("blank", "equal"):
                if all(name in one for one in every):
                    metric[name] = sum(one[name] for one in every)
    return made | {key: first[key] for key in ("model_file",) if key in first}


def _mean(values: Sequence[float], column: Column, entries: Sequence[Entry]) -> tuple[float, float, float]:
    """The mean of a column's numbers and the ends of its interval, inside of what the number can be.

    A time's mean is that of its logarithm, so no end is below 0. Where all numbers are the same, which says little (a
    share that counts few images), the interval is as wide as that of one seed, over the root of the number of seeds.
    """
    if any(column.ends) and min(values) > 0:
        value, half = student([math.log(time) for time in values])
        return math.exp(value), math.exp(value - half), math.exp(value + half)
    value, half = student(values)
    if not half and column.group == "metrics" and "." not in column.key:
        ends = [(number(entry, column, "low"), number(entry, column, "high")) for entry in entries]
        halves = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
        half = statistics.fmean(halves) / len(values) ** 0.5 if halves else half
    least, most = column.bounds
    return value, max(value - half, least), min(value + half, most)


def difference(column: Column, ours: Mapping[Any, Entry], theirs: Mapping[Any, Entry]) -> tuple[float, float] | None:
    """The mean difference of two rows and half the width of its interval, in the stored unit.

    With two seeds or more that both have, the differences are paired by seed. With one, or where all differences are
    the same (one image of a share that counts images), the interval is that of two independent draws.

    Args:
        column: What is compared.
        ours: Entries by seed.
        theirs: Entries by seed.

    Returns:
        None if no seed has both numbers, or the noise is not known.
    """
    pairs = [(number(ours[seed], column), number(theirs[seed], column)) for seed in ours if seed in theirs]
    there = [one - other for one, other in pairs if one is not None and other is not None]
    if len(there) >= 2:
        value, half = student(there)
        if half > 1e-9 * abs(value) or not value or column.group == "cost":
            return value, half
    if not there:
        return None
    from compress.evaluate.intervals import difference as of_two_draws

    ends = []
    for entries in (ours, theirs):
        entry = next(entries[seed] for seed in ours if seed in theirs)
        ends.append({part: number(entry, column, part) for part in ("low", "high")})
    if any(value is None for end in ends for value in end.values()):
        return None
    return there[0], of_two_draws(*ends)


def difference_table(title: str, found: Sequence[Series], others: Sequence[Mapping[Any, Entry]], first: str) -> Table:
    """A table of differences from other rows; one within the noise is marked.

    Args:
        title: Of the table.
        found: The rows.
        others: For each, the entries by seed that it is compared with.
        first: Heading of the rows' names.
    """
    every = columns_of([series.line.entry for series in found])
    shown = [column for column in every if any(column.ends) or (column.group == "metrics" and "." not in column.key)]
    rows = []
    for series, other in zip(found, others, strict=True):
        ours = {seed: student.line.entry for seed, student in series.students.items()}
        rows.append((series.line.name, tuple(_cell(difference(c, ours, other), c) for c in shown)))
    kept = [place for place in range(len(shown)) if any(cells[place].number is not None for _, cells in rows)]
    body = tuple((name, tuple(cells[place] for place in kept)) for name, cells in rows)
    return Table(title, (first, *(shown[place].heading for place in kept)), body, note=NOTE)


NOTE = f"95 % intervals, paired by seed where there are two seeds or more; {NOISE} marks a difference within the noise."


def _cell(found: tuple[float, float] | None, column: Column) -> Cell:
    if found is None:
        return Cell(MISSING)
    value, half = found
    low, high = (_signed(end, column) for end in (value - half, value + half))
    return Cell(_signed(value, column), f"[{low}, {high}]", mark=NOISE * (abs(value) <= half), number=value)


def _signed(value: float, column: Column) -> str:
    text = written(abs(value), column)
    return text if not float(text) else PLUS[value > 0] + text


class Seeds:
    """Whether two mean rows differ by more than chance: paired by seed where they share two seeds or more."""

    def __init__(self, found: Sequence[Series]) -> None:
        """Remembers which rows are means."""
        self._of = {id(series.line.entry): series for series in found}

    def beyond(self, column: Column, ours: Entry, theirs: Entry) -> bool:
        """Whether they do; False where the noise is not known."""
        one, two = (self._of.get(id(entry)) for entry in (ours, theirs))
        entries = [
            {seed: s.line.entry for seed, s in series.students.items()} if series else {} for series in (one, two)
        ]
        if len(entries[0].keys() & entries[1].keys()) < 2:
            return beyond_noise(column, ours, theirs)
        found = difference(column, entries[0], entries[1])
        return found is not None and abs(found[0]) > found[1]


def unmarked(table: Table) -> Table:
    """The table without the marks of independent draws."""
    rows = tuple((name, tuple(replace(cell, mark="") for cell in cells)) for name, cells in table.rows)
    return replace(table, rows=rows)
