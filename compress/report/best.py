"""The best of a column, named only where its distance from all others is beyond the noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from compress.report.formats import Table
from compress.report.table import Column, Entry, Line, columns_of, number

# Costs that are counted, not measured: any difference is one.
COUNTED = ("params", "macs", "macs_without_attention", "bytes", "sparse_bytes", "memory_bytes")

Beyond = Callable[[Column, Entry, Entry], bool]


def beyond_noise(column: Column, ours: Entry, theirs: Entry) -> bool:
    """Whether two rows differ by more than two independent draws do; False where the noise is not known."""
    from compress.evaluate.intervals import difference

    parts = [{part: number(entry, column, part) for part in ("value", "low", "high")} for entry in (ours, theirs)]
    if column.key in COUNTED:
        return parts[0]["value"] != parts[1]["value"]
    if any(value is None for part in parts for value in part.values()):
        return False
    one, two = parts
    return abs(one["value"] - two["value"]) > difference(one, two)  # type: ignore[operator]


def better(column: Column) -> str:
    """Where the better values of a column are: ``"down"``, ``"up"`` or ``""``; a cost is better when it is small."""
    return column.better or ("down" if column.group == "cost" and column.ratio else "")


def best(column: Column, entries: Sequence[Entry], beyond: Beyond = beyond_noise) -> list[int]:
    """The places of the best entries: one, or several that have the same count; none if another is within the noise.

    Args:
        column: What is compared.
        entries: To compare.
        beyond: Whether two of them differ by more than chance.
    """
    values = {place: value for place, entry in enumerate(entries) if (value := number(entry, column)) is not None}
    if len(values) < 2 or not better(column):
        return []
    ranked = sorted(values, key=lambda place: values[place], reverse=better(column) == "up")
    first = [place for place in ranked if values[place] == values[ranked[0]]]
    if len(first) == len(ranked) or (len(first) > 1 and column.key not in COUNTED):
        return []
    others = ranked[len(first) :]  # all of them: one that is further away may be known less exactly
    return first if all(beyond(column, entries[ranked[0]], entries[place]) for place in others) else []


def with_best(table: Table, lines: Sequence[Line], beyond: Beyond = beyond_noise) -> Table:
    """The table with the best student of each column marked.

    Args:
        table: From :func:`compress.report.table.tables` of these lines.
        lines: The rows of all its tables.
        beyond: Whether two of them differ by more than chance.
    """
    shown = [column for column in columns_of([line.entry for line in lines]) if column.heading in table.headings[1:]]
    there = {name for name, _ in table.rows}
    students = [line for line in lines if line.is_student and line.name in there]
    winners = {c.heading: {students[i].name for i in best(c, [s.entry for s in students], beyond)} for c in shown}
    body = tuple(
        (name, tuple(replace(cell, best=name in winners[c.heading]) for cell, c in zip(cells, shown, strict=True)))
        for name, cells in table.rows
    )
    return replace(table, rows=body)
