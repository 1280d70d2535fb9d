"""Which rows nobody should choose, and which one is the best within limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.benchmark.config import Limits

Row = Mapping[str, Any]
PSNR_CAP = 100.0  # dB, of pictures that are the reference row's
SAME = 0.1  # share by which memory and latency have to differ to count: two processes never take quite the same


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in rows if row["status"] == "measured"]


def psnr(row: Row) -> float:
    """PSNR to the reference row's pictures in dB; that of the reference row itself is the cap."""
    found = row["metrics"]["psnr"]
    return PSNR_CAP if found is None else float(found["value"])


def loses_score(row: Row) -> bool:
    """Whether the row's CLIP score is below the reference row's by more than the noise."""
    found = row["metrics"]["clip_difference"]
    return found is not None and found["high"] < 0


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
    """The best row within limits: the fastest; with a limit for the latency alone, the one most like the reference.

    A row whose CLIP score is below the reference row's by more than the noise is no candidate, unless a limit for PSNR
    says how far pictures may be from the reference row's.

    Args:
        rows: All rows.
        limits: Those to keep to.

    Returns:
        Its name, or None where no row keeps to the limits; and a sentence that says what it is the best of, or what
        comes nearest.
    """
    within = [row for row in measured(rows) if not _broken(row, limits)]
    candidates = within if limits.psnr_db is not None else [row for row in within if not loses_score(row)]
    stated = _stated(limits)
    if not candidates:
        return None, _nearest(rows, limits, stated)
    if limits.latency_s is not None and limits.psnr_db is None:
        chosen = max(candidates, key=lambda row: (psnr(row), -row["cost"]["latency_s"]))
        return chosen["name"], f"most like the reference{stated}"
    chosen = min(candidates, key=lambda row: row["cost"]["latency_s"])
    loss = "" if limits.psnr_db is not None else " without a clear loss of CLIP score"
    return chosen["name"], f"fastest{stated}{loss if chosen['metrics']['clip_score'] else ''}"


def _broken(row: Row, limits: Limits) -> list[str]:
    """Keys of the limits that a row does not keep to."""
    cost = row["cost"]
    over = {
        "memory_gb": limits.memory_gb is not None and cost["peak_memory_bytes"] > 1e9 * limits.memory_gb,
        "psnr_db": limits.psnr_db is not None and psnr(row) < limits.psnr_db,
        "latency_s": limits.latency_s is not None and cost["latency_s"] > limits.latency_s,
    }
    return [key for key, broken in over.items() if broken]


def _stated(limits: Limits) -> str:
    parts = []
    if limits.memory_gb is not None:
        parts.append(f"at most {limits.memory_gb:g} GB")
    if limits.psnr_db is not None:
        parts.append(f"at least {limits.psnr_db:g} dB")
    if limits.latency_s is not None:
        parts.append(f"at most {limits.latency_s:g} s")
    return f" with {' and '.join(parts)}" if parts else ""


def _nearest(rows: Sequence[Row], limits: Limits, stated: str) -> str:
    found = measured(rows)
    if not found:
        return "no row could be measured"
    least = min(row["cost"]["peak_memory_bytes"] for row in found) / 1e9
    fastest = min(row["cost"]["latency_s"] for row in found)
    return f"no row{stated}: the least memory is {least:.3g} GB, the lowest latency {fastest:.3g} s"
