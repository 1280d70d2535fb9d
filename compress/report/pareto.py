"""Pareto fronts: the rows that no other row beats in both cost and quality."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.best import better
from compress.report.footer import values
from compress.report.table import Column, Entry, Line, columns_of, number

# Cost over quality, by their keys.
FRONTS = (("bytes", "fid"), ("latency_s", "fid"), ("latency_s", "psnr"), ("latency_s", "clip_score"))


@dataclass(frozen=True)
class Spot:
    """A row in a plane of cost and quality, in the written units.

    Attributes:
        name: Of the row.
        x: Cost.
        y: Quality.
        low: Lower end of the quality's interval; the quality itself where there is none.
        high: Upper end.
        teacher: Whether it is the teacher.
        dominated: Whether another row is no worse in both and better in one.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    teacher: bool
    dominated: bool


@dataclass(frozen=True)
class Front:
    """Rows in a plane of cost and quality.

    Attributes:
        cost: The column along the x axis; small is good.
        quality: The column along the y axis.
        spots: The rows, with the teacher where it has such a quality.
        floor: Quality of the teacher with other seeds, or None.
    """

    cost: Column
    quality: Column
    spots: tuple[Spot, ...]
    floor: float | None

    @property
    def title(self) -> str:
        """Both names, without units."""
        return f"{self.quality.title.partition(' (')[0]} and {'size' if self.cost.key == 'bytes' else 'latency'}"


def fronts(lines: Sequence[Line], paired: bool = True) -> list[Front]:
    """The planes in which at least one student can be drawn.

    Latency is that of one pass, or of a whole image where rows are not sampled alike.

    Args:
        lines: The rows.
        paired: Whether they have one teacher, so that its noise floor and what is measured from its images count.
    """
    shown = {column.key: column for column in columns_of([line.entry for line in lines]) if paired or not column.paired}
    if len({_sampled(line.entry) for line in lines} - {()}) > 1 and "image_latency_s" in shown:
        shown["latency_s"] = shown["image_latency_s"]
    planes = [(shown[cost], shown[quality]) for cost, quality in FRONTS if cost in shown and quality in shown]
    made = [_front(cost, quality, lines, floor=paired) for cost, quality in planes]
    return [front for front in made if not all(spot.teacher for spot in front.spots)]


def _sampled(entry: Entry) -> tuple[str, ...]:
    """Steps and passes of a row's images; nothing for a row without images."""
    return tuple(" / ".join(found) for key in ("steps", "passes") if (found := values([entry], key)))


def _front(cost: Column, quality: Column, lines: Sequence[Line], floor: bool) -> Front:
    found = []
    for line in lines:
        x, y = number(line.entry, cost), number(line.entry, quality)
        if x is not None and y is not None:
            low, high = number(line.entry, quality, "low"), number(line.entry, quality, "high")
            found.append((line, x, y, y if low is None else low, y if high is None else high))
    sign = -1 if better(quality) == "up" else 1
    places = [(x, sign * y) for _, x, y, *_ in found]
    scale = quality.scale
    spots = tuple(
        Spot(
            line.name, x * cost.scale, y * scale, low * scale, high * scale,
            not line.is_student, is_dominated(place, places),
        )
        for (line, x, y, low, high), place in zip(found, places, strict=True)
    )  # fmt: skip
    floors = [value for line in lines if (value := number(line.floor, quality)) is not None]
    return Front(cost, quality, spots, floors[0] * scale if floor and floors else None)


def is_dominated(place: tuple[float, float], places: Sequence[tuple[float, float]]) -> bool:
    """Whether another place is no larger in both coordinates and smaller in one."""
    return any(x <= place[0] and y <= place[1] and (x, y) != place for x, y in places)
