"""Rows with random numbers."""

from dataclasses import asdict
from typing import Any

from compress.jobs.benchmark import Choices


def row(
    name: str,
    latency: float = 1.0,
    memory: float = 1.0,
    psnr: float | None = 40.0,
    score: float = 0.0,
    batch: int = 1,
    calls: int = 4,
) -> dict[str, Any]:
    """A measured row.

    Args:
        name: Its name.
        latency: Seconds of a call; its interval is 1 % to each side.
        memory: Peak in 10^9 bytes.
        psnr: dB, its interval 1 dB to each side; None for the reference row.
        score: Difference of the CLIP score from the reference row's, its interval 1 to each side.
        batch: Images in a call.
        calls: How many were timed.
    """

    def metric(value: float, **more: Any) -> dict[str, Any]:
        return {"value": value, "low": value - 1, "high": value + 1, "n": 8, **more}

    reference = psnr is None
    return {
        "name": name,
        "status": "measured",
        "reason": None,
        "choices": asdict(Choices(batch_size=batch)),
        "cost": {
            "latency_s": latency,
            "latency_low_s": 0.99 * latency,
            "latency_high_s": 1.01 * latency,
            "latency_repeats": calls,
            "throughput": batch / latency,
            "peak_memory_bytes": 1e9 * memory,
            "memory_method": "made up",
        },
        "metrics": {
            "psnr": None if psnr is None else metric(psnr, equal=0),
            "ssim": None if reference else metric(0.9),
            "clip_score": metric(30 + score, network="a-clip"),
            "clip_difference": None if reference else metric(score),
        },
        "dominated_by": None,
    }


def refused(name: str, status: str = "skipped") -> dict[str, Any]:
    """A row that could not be measured."""
    return {"name": name, "status": status, "reason": "not here", "cost": None, "metrics": None}


def floor() -> dict[str, Any]:
    """The metrics of the reference row with other noise."""
    return row("floor", psnr=12.0, score=0.5)["metrics"]
