"""Which rows nobody should choose, and which one is the best within limits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.jobs.benchmark.config import Limits

Row = Mapping[str, Any]
PSNR_CAP = 100.0  # dB, of images that are the reference row's
SAME = 0.1  # share by which memory and latency have to differ to count: two processes never take quite the same


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in rows if row["status"] == "measured"]


def psnr(row: Row) -> float:
    """PSNR to the reference row's images in dB; that of the reference row itself is the cap."""
    found = row["metrics"]["psnr"]
    return PSNR_CAP if found is None else float(found["value"])


def loses_score(row: Row) -> bool:
    """Whether the row's CLIP score is below the reference row's by more than the noise."""
    found = row["metrics"]["clip_difference"]
    return found is not None and found["high"] < 0


def within_noise(row: Row) -> bool:
    """Whether chance alone may explain the difference of the CLIP score; false where there is none at all."""
    found = row["metrics"]["clip_difference"]
    return found is not None and found["low"] <= 0 <= found["high"] and found["low"] < found["high"]


def dominating(row: Row, rows: Sequence[Row]) -> str | None:
    """The name of a row that is at least as good in everything and clearly better in something; the fastest of them.

    At least as good: latency, throughput and PSNR by their values, peak memory within 10 %, and a CLIP score that is
    not below the reference row's by more than the noise, unless this row's is too. Clearly better: a latency smaller by
    more than 10 % whose interval lies below (one call has none), a memory smaller by more than 10 %, or a PSNR whose
    interval lies above.
    """
    better = [other for other in measured(rows) if other is not row and _dominates(other, row)]
    return min(better, key=lambda other: other["cost"]["latency_s"])["name"] if better else None


def _dominates(a: Row, b: Row) -> bool:
    ours, theirs = a["cost"], b["cost"]
    as_good = (
        ours["latency_s"] <= theirs["latency_s"]
        and ours["throughput"] >= theirs["throughput"]
        and (1 - SAME) * ours["peak_memory_bytes"] <= theirs["peak_memory_bytes"]
        and psnr(a) >= psnr(b)
        and (not loses_score(a) or loses_score(b))
    )
    better = (
        _clearly_faster(ours, theirs)
        or ours["peak_memory_bytes"] < (1 - SAME) * theirs["peak_memory_bytes"]
        or _end(a, "low") > _end(b, "high")
    )
    return as_good and better


def _clearly_faster(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return (
        min(ours["latency_repeats"], theirs["latency_repeats"]) > 1
        and ours["latency_high_s"] < theirs["latency_low_s"]
        and ours["latency_s"] < (1 - SAME) * theirs["latency_s"]
    )


def _end(row: Row, end: str) -> float:
    """An end of the interval of the row's PSNR."""
    found = row["metrics"]["psnr"]
    return PSNR_CAP if found is None else float(found[end])


def best(rows: Sequence[Row], limits: Limits) -> tuple[str | None, str]:
    """The best row within limits: the fastest call; with a limit for the latency alone, the most like the reference.

    A row whose CLIP score is below the reference row's by more than the noise is no candidate, unless a limit for PSNR
    says how far images may be from the reference row's.

    Args:
        rows: All rows.
        limits: Those to keep to.

    Returns:
        Its name, or None where no row keeps to the limits; and a sentence that says what it is the best of, or what
        is in the way and what can be reached.
    """
    within = [row for row in _eligible(rows, limits) if not _broken(row, limits)]
    stated = _stated(limits, LIMITS)
    if not within:
        return None, _nearest(rows, limits)
    if limits.latency_s is not None and limits.psnr_db is None:
        chosen = max(within, key=lambda row: (psnr(row), -row["cost"]["latency_s"]))
        return chosen["name"], f"most like the reference{stated}"
    chosen = min(within, key=lambda row: row["cost"]["latency_s"])
    loss = "" if limits.psnr_db is not None else " without a clear loss of CLIP score"
    size = chosen["choices"]["batch_size"]
    fastest = "fastest for one image at a time" if size == 1 else f"fastest call, of {size} images"
    return chosen["name"], f"{fastest}{stated}{loss if chosen['metrics']['clip_score'] else ''}"


def most_images(rows: Sequence[Row], limits: Limits) -> str | None:
    """The row of the highest throughput within the limits of :func:`best`, which looks at the latency of a call."""
    within = [row for row in _eligible(rows, limits) if not _broken(row, limits)]
    return max(within, key=lambda row: row["cost"]["throughput"])["name"] if within else None


def _eligible(rows: Sequence[Row], limits: Limits) -> list[Row]:
    """The measured rows that may be chosen if they keep to the limits."""
    return [row for row in measured(rows) if limits.psnr_db is not None or not loses_score(row)]


@dataclass(frozen=True)
class _Limit:
    """What a limit is about.

    Attributes:
        words: The limit in words, with a place for its number.
        nearest: What the best value is called.
        unit: Of the value.
        value: The row's.
        least: Whether the limit is the smallest value allowed, and not the largest.
    """

    words: str
    nearest: str
    unit: str
    value: Callable[[Row], float]
    least: bool = False

    def keeps(self, row: Row, limit: float) -> bool:
        value = self.value(row)
        return value >= limit if self.least else value <= limit

    def best(self, rows: Sequence[Row]) -> Row:
        return (max if self.least else min)(rows, key=self.value)


LIMITS = {
    "memory_gb": _Limit("at most {:g} GB", "least memory", "GB", lambda row: row["cost"]["peak_memory_bytes"] / 1e9),
    "psnr_db": _Limit("at least {:g} dB", "highest PSNR", "dB", psnr, least=True),
    "latency_s": _Limit("at most {:g} s", "lowest latency", "s", lambda row: row["cost"]["latency_s"]),
}


def _broken(row: Row, limits: Limits, keys: Iterable[str] = LIMITS) -> bool:
    """Whether a row does not keep to one of the limits of these keys."""
    given = {key: limit for key in keys if (limit := getattr(limits, key)) is not None}
    return not all(LIMITS[key].keeps(row, limit) for key, limit in given.items())


def _stated(limits: Limits, keys: Iterable[str]) -> str:
    """The limits of these keys in words, with a space before them; nothing where there are none."""
    parts = [LIMITS[key].words.format(limit) for key in keys if (limit := getattr(limits, key)) is not None]
    return f" with {' and '.join(parts)}" if parts else ""


def _nearest(rows: Sequence[Row], limits: Limits) -> str:
    """What can be reached of each limit while keeping to the others, and which rows only their score rules out."""
    if not measured(rows):
        return "no row could be measured"
    given = [key for key in LIMITS if getattr(limits, key) is not None]
    parts = [_reach(_eligible(rows, limits), limits, key, [other for other in given if other != key]) for key in given]
    lost = [row["name"] for row in measured(rows) if loses_score(row) and not _broken(row, limits)]
    if lost and limits.psnr_db is None:
        be = "is" if len(lost) == 1 else "are"
        parts.append(
            f"{', '.join(lost)} would keep to it, but {be} left out for a clear loss of CLIP score; limit.psnr_db "
            "decides by PSNR instead"
        )
    return f"no row{_stated(limits, LIMITS)}: {'; '.join(parts)}"


def _reach(rows: Sequence[Row], limits: Limits, key: str, others: Sequence[str]) -> str:
    """The best value of one limit among the rows that keep to the others."""
    about = LIMITS[key]
    within = [row for row in rows if not _broken(row, limits, others)]
    if not within:
        return f"no row{_stated(limits, others)}, whatever its {about.nearest.split()[-1]}"
    row = about.best(within)
    value = about.value(row)
    cap = ", as much as PSNR can be" if about.least and value == PSNR_CAP else ""
    among = f"{_stated(limits, others).strip()}, " if others else ""
    return f"{among}the {about.nearest} is {value:.3g} {about.unit} ({row['name']}{cap})"
